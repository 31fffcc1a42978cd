"""A language model behind an endpoint that speaks the OpenAI API (vLLM, llama.cpp, Ollama, OpenAI)."""

from __future__ import annotations

import os
import time
from typing import Any

import httpx

from dpo_cli.errors import RunFailed

KEY = "OPENAI_API_KEY"
AT_ONCE = 8  # requests
PAUSES_SECONDS = (1.0, 4.0, 16.0)  # before a retry
SHOWN = 200  # characters of a refusal


class Endpoint:
    """`option` is the part of `augment` that has the address: "judge" of judge_url, for example."""

    def __init__(self, url: str, option: str, what: str, timeout_s: float) -> None:
        self.url, self.option, self.what = f"{url.rstrip('/')}/chat/completions", option, what
        key = os.environ.get(KEY)
        self.client = httpx.Client(headers={"Authorization": f"Bearer {key}"} if key else {}, timeout=timeout_s)

    def complete(self, body: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The reply to a chat, and its first choice. `RunFailed` if the endpoint cannot be reached, or speaks another API."""
        try:
            reply = self._post(body).json()
            choice = reply["choices"][0]
            _ = choice["message"]["content"]
        except (ValueError, LookupError, TypeError) as error:
            what = f"{self.url} does not answer as the OpenAI API does"
            raise RunFailed(what, f'check "{self.option}_url": it is the address before /chat/completions') from error
        return reply, choice

    def _post(self, body: dict[str, Any]) -> httpx.Response:
        """The response; retried after a pause if the endpoint is busy, slow or unreachable."""
        for pause in (*PAUSES_SECONDS, None):
            try:
                response = self.client.post(self.url, json=body)
            except httpx.TransportError as error:
                why = f"{type(error).__name__}: {error}".rstrip(": ")
            else:
                if response.is_success:
                    return response
                why = f"status {response.status_code}"
                if response.status_code in (401, 403):
                    raise RunFailed(f"{self.url} denies access ({why})", f"set {KEY} to a valid key")
                if response.status_code < 500 and response.status_code not in (408, 429):
                    says = f"{self.url} rejects the request ({why}): {response.text[:SHOWN]}".rstrip(": ")
                    fix = f'check what it says, "{self.option}_url" (it often ends in /v1) and "{self.option}_model"'
                    raise RunFailed(says, fix)
            if pause is not None:
                time.sleep(pause)
        fix = "check the endpoint; then run the same command to continue"
        raise RunFailed(f"{self.what} cannot be reached: {self.url}: {why}", fix)

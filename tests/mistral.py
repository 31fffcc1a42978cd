"""What `make tokenizers` leaves of PyPI's mistral-common: its tokenizer as transformers reads it, and the ids it makes itself.

Run with mistral-common and sentencepiece on the path; tests/test_templates.py needs neither.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import mistral_common  # type: ignore[import-not-found]
from mistral_common.protocol.instruct.request import ChatCompletionRequest  # type: ignore[import-not-found]
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer  # type: ignore[import-not-found]
from test_templates import PROMPTS, USER
from transformers import LlamaTokenizer

# As Mistral 7B Instruct v0.3 publishes it, without its part for tools: the system message stands in the last user turn, and
# only while that turn is the last message of all.
TEMPLATE = """\
{%- set system = messages[0]["content"] if messages[0]["role"] == "system" %}
{%- set turns = messages[1:] if messages[0]["role"] == "system" else messages %}
{{- bos_token }}
{%- for message in turns %}
    {%- if (message["role"] == "user") != (loop.index0 % 2 == 0) %}
        {{- raise_exception("After the optional system message, conversation roles must alternate user/assistant/...") }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {{- "[INST] " + (system + "\\n\\n" if loop.last and system else "") + message["content"] + "[/INST]" }}
    {%- else %}
        {{- " " + message["content"] | trim + eos_token }}
    {%- endif %}
{%- endfor %}"""


def main(place: Path) -> None:
    model = next((Path(mistral_common.__file__).parent / "data").glob("*.model.v3"))
    theirs = MistralTokenizer.from_file(str(model))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.model").write_bytes(model.read_bytes())
        tokenizer = LlamaTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(place)
    conversations = {name: [USER] if isinstance(prompt, str) else prompt for name, prompt in PROMPTS.items()}
    ids = {
        name: theirs.encode_chat_completion(ChatCompletionRequest(messages=messages)).tokens
        for name, messages in conversations.items()
    }
    (place / "ids.json").write_text(json.dumps(ids), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

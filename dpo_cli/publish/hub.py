"""Uploading a folder to the hub. The token is the client's own affair: it is neither asked for nor written here."""

from __future__ import annotations

from pathlib import Path

import httpx
from huggingface_hub import HfApi

from dpo_cli.errors import RunFailed

WEIGHTS = ["adapter_*", "*.safetensors*", "*.gguf", "Modelfile"]


def push(folder: Path, repository: str) -> str:
    """Upload the files of `folder` as the model owner/name, and return its address. A new repository is private.

    Raises `RunFailed` with the command that tries again: the folder stays as it is.
    """
    api = HfApi()
    try:
        address = api.create_repo(repository, private=True, exist_ok=True)
        # Weights of another upload would be loaded with, or instead of, these.
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload by dpo", delete_patterns=WEIGHTS)
    except (httpx.HTTPError, OSError, RuntimeError, ValueError) as error:  # a refusal, no network, no token, half a large file
        response = getattr(error, "response", None)
        needs_login = response is not None and response.status_code in (401, 403)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        again = f"`hf upload {repository} {folder} . --private`"
        first = f"`hf auth login` with a token that may write to {repository}, then " if needs_login else "try again: "
        raise RunFailed(f"the upload to {repository} failed ({reason}); {folder} is complete", first + again) from error
    return str(address)

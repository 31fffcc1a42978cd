"""Uploading a folder to the hub. The client library handles the token: dpo neither reads nor writes it."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from shlex import join, quote

import httpx
from huggingface_hub import HfApi

from dpo_cli.errors import RunFailed

WEIGHTS = ("adapter_*", "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*")
SHOWN = 10  # files listed in a message


def push(folder: Path, repository: str) -> str:
    """Upload the files of `folder` as the model owner/name, and return its address. A new repository is private.

    Files of the same name are replaced, and no other file is deleted. `RunFailed` if the repository has other weights, or with
    a command for a retry: the folder does not change.
    """
    api = HfApi()
    try:
        address = api.create_repo(repository, private=True, exist_ok=True)
        others = _other_weights(folder, api.list_repo_files(repository))
        if not others:
            api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload by dpo")
    except (httpx.HTTPError, OSError, RuntimeError, ValueError) as error:  # denied, no network, no token, an incomplete file
        response = getattr(error, "response", None)
        needs_login = response is not None and response.status_code in (401, 403)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        again = f"`hf upload {repository} {quote(str(folder))} . --private`"
        first = f"`hf auth login` with a token that may write to {repository}, then " if needs_login else "try again: "
        raise RunFailed(f"the upload to {repository} failed ({reason}); {folder} is complete", first + again) from error
    if others:
        named = ", ".join(others[:SHOWN]) + (f" and {len(others) - SHOWN} more" if len(others) > SHOWN else "")
        message = f"{repository} holds other weights, which would be loaded with or instead of these: {named}"
        delete = f"`hf repos delete-files {repository} {join(others)}`"
        upload = f"`hf upload {repository} {quote(str(folder))} .`"
        fix = f"upload to another repository, or delete them there ({delete}) and then {upload}"
        raise RunFailed(f"{message}; nothing was uploaded, and {folder} is complete", fix)
    return str(address)


def _other_weights(folder: Path, there: list[str]) -> list[str]:
    """The weight files at the top of a repository that `folder` does not replace."""
    return sorted(
        name
        for name in there
        if "/" not in name and any(fnmatch(name, kind) for kind in WEIGHTS) and not (folder / name).is_file()
    )

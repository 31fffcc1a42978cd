"""Datasets of the hub: files alone, never a script. What was fetched once is read from the local cache."""

from __future__ import annotations

import re
from pathlib import Path

from dpo_cli.errors import RunFailed

SUFFIXES = (".parquet", ".jsonl", ".json", ".csv", ".tsv")  # the first that a repository has is read
TIMEOUT_SECONDS = 8


def is_hub_id(name: str) -> bool:
    """Whether a name that is no path here may be one there: owner/name."""
    is_file = Path(name).suffix.lower() in (*SUFFIXES, ".txt", ".gz", ".zip")
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None and not is_file and not Path(name).parent.exists()


def cached(name: str) -> list[str]:
    """The data files of a fetched dataset: those of its training split where it is divided; none when it was not fetched."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, repo_type="dataset", local_files_only=True))
    except LocalEntryNotFoundError:
        return []
    files = sorted(file for file in folder.rglob("*") if file.suffix in SUFFIXES and "info" not in file.name)
    kinds = [[file for file in files if file.suffix == suffix] for suffix in SUFFIXES]
    of_one_kind = next(filter(None, kinds), [])
    training = [file for file in of_one_kind if "train" in str(file.relative_to(folder))]
    return [str(file) for file in training or of_one_kind]


def fetch(name: str) -> None:
    """Bring the data files of a dataset into the local cache, and complete what is there; `RunFailed` says why it cannot be.

    Where the hub does not answer, what was fetched before serves.
    """
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        patterns = [f"*{suffix}" for suffix in SUFFIXES]
        snapshot_download(name, repo_type="dataset", allow_patterns=patterns, etag_timeout=TIMEOUT_SECONDS)
    except GatedRepoError as error:
        raise RunFailed(f"the dataset {name} is gated", "ask for access on its page, then `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise RunFailed(f"there is no dataset {name} on the hub", "check the name: owner/name, or name a file") from error
    except (httpx.TransportError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        if cached(name):
            return
        fix = f"check the network, or fetch it elsewhere with `hf download --repo-type dataset {name}`, or name a local file"
        raise RunFailed(f"the hub cannot be reached, and the dataset {name} is not in the local cache", fix) from error
    if not cached(name):
        raise RunFailed(
            f"the dataset {name} has no {', '.join(SUFFIXES)} file", "download it in another form, and name the file"
        )

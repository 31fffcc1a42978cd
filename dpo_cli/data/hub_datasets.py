"""Hub datasets: only files, never scripts. Fetched datasets are read from the local cache.

A name is owner/name, or owner/name:split if a dataset has several splits to train on.
"""

from __future__ import annotations

import re
from pathlib import Path

from dpo_cli.data.folders import GZIP, SUFFIXES, by_split, holds_rows, kind, to_train_on
from dpo_cli.errors import RunFailed
from dpo_cli.storage import hub

OF_FILES = (*SUFFIXES, GZIP, ".txt", ".zip", ".zst", ".bz2", ".xz", ".tgz", ".arrow")  # endings of files, never of hub datasets


def is_hub_id(name: str) -> bool:
    """Whether a name that is not a local path may be a hub dataset: owner/name or owner/name:split."""
    is_file = Path(name).suffix.lower() in OF_FILES
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?", name) is not None and not is_file and not Path(name).parent.exists()


def cached(name: str) -> tuple[str, list[str]]:
    """(split, its data files) of a fetched dataset: the named split, or the only one to train on; else no files."""
    repository, _, wanted = name.partition(":")
    files_by_split = splits(repository)
    training = to_train_on(files_by_split)
    split = wanted or (training[0] if len(training) == 1 else "")
    return split, files_by_split.get(split, [])


def splits(repository: str) -> dict[str, list[str]]:
    """The data files of a fetched dataset by their split; empty if it was not fetched."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repository, repo_type="dataset", local_files_only=True))
    except LocalEntryNotFoundError:
        return {}
    files = sorted(file for file in folder.rglob("*") if holds_rows(file))
    kinds = [[file for file in files if kind(file) == suffix] for suffix in SUFFIXES]
    files_by_split = by_split(next(filter(None, kinds), []), folder)
    return {split: [str(file) for file in its_files] for split, its_files in files_by_split.items()}


def fetch(name: str) -> None:
    """Fetch the data files of a dataset into the local cache, or the missing ones; raise `RunFailed` if that fails.

    If the hub does not answer, a dataset that was fetched before is used.
    """
    name = name.partition(":")[0]
    import httpx
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        hub.answer(lambda: HfApi().dataset_info(name, timeout=hub.DEADLINE_SECONDS))
        patterns = [f"*{suffix}{packed}" for suffix in SUFFIXES for packed in ("", GZIP)]
        snapshot_download(name, repo_type="dataset", allow_patterns=patterns, etag_timeout=hub.DEADLINE_SECONDS)
    except GatedRepoError as error:
        raise hub.gated("dataset", name) from error
    except RepositoryNotFoundError as error:
        raise RunFailed(f"dataset {name} not found on the hub", "check the name: owner/name, or name a file") from error
    except (hub.Unreachable, httpx.TransportError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        if splits(name):
            return
        raise hub.unreachable("dataset", name) from error
    except OSError as error:
        raise hub.cache_fault(error) or error from error
    if not splits(name):
        raise RunFailed(
            f"the dataset {name} has no {', '.join(SUFFIXES)} file", "convert it to one of these formats, and name the file"
        )

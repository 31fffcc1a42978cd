"""Hub models before anything is loaded: whether a name exists, and its revision. No torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from dpo_cli.errors import RunFailed
from dpo_cli.models.checks import common_name
from dpo_cli.models.model_files import CONFIG, ModelFiles
from dpo_cli.storage import hub


def require(name: str) -> None:
    """`RunFailed` unless the model is local, in the local cache, or on the hub."""
    from huggingface_hub import try_to_load_from_cache

    if os.path.exists(name) or answers(name) or isinstance(try_to_load_from_cache(name, CONFIG), str):
        return
    raise hub.unreachable("model", name)


def answers(name: str) -> bool:
    """Whether the hub has the model; False if the hub cannot be reached, so that only the cache can be used.

    One request, because from_pretrained retries for most of a minute.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        hub.answer(lambda: HfApi().model_info(name, timeout=hub.DEADLINE_SECONDS))
    except hub.Unreachable:
        return False
    except GatedRepoError as error:
        raise hub.gated("model", name) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        near = common_name(name)
        fix = f"did you mean {near}? " if near else "check the name (owner/model); "
        fix += "a private model needs `hf auth login`, or HF_TOKEN"
        raise RunFailed(f"model {name} not found on the hub", fix) from error
    return True


def revision(name: str) -> str | None:
    """The commit of a hub model, which names its folder in the cache. None for a local model."""
    from huggingface_hub import try_to_load_from_cache

    if os.path.exists(name):
        return None
    file = try_to_load_from_cache(name, CONFIG)
    return Path(file).parent.name if isinstance(file, str) else None


@dataclass(frozen=True)
class HubFiles(ModelFiles):
    """The files of a hub model. Each is fetched at its first use; with `only_cached` none is fetched."""

    only_cached: bool = False

    def found(self, name: str) -> Path | None:
        from transformers.utils import cached_file

        there = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
        file = cached_file(str(self.path), name, local_files_only=self.only_cached, **there)
        return Path(file) if file else None

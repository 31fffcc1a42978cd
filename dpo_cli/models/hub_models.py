"""Models of the hub, before anything is loaded: whether there is one of that name, and where it comes from. No torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from dpo_cli.errors import RunFailed
from dpo_cli.models.checks import common_name
from dpo_cli.models.model_files import CONFIG, ModelFiles
from dpo_cli.storage import hub


def require(name: str) -> None:
    """`RunFailed` unless the model is here, in the local cache, or on a hub that can be reached."""
    from huggingface_hub import try_to_load_from_cache

    if os.path.exists(name) or answers(name) or isinstance(try_to_load_from_cache(name, CONFIG), str):
        return
    raise hub.unreachable("model", name)


def answers(name: str) -> bool:
    """Whether the hub has the model; False when it cannot be reached, so that only what is cached can be used.

    Asked once, because from_pretrained alone retries for most of a minute.
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
        raise RunFailed(f"there is no model {name} on the hub", fix) from error
    return True


def revision(name: str) -> str | None:
    """The commit of a model of the hub: in the cache its files lie in a folder of that name. None of a local one."""
    from huggingface_hub import try_to_load_from_cache

    if os.path.exists(name):
        return None
    found = try_to_load_from_cache(name, CONFIG)
    return Path(found).parent.name if isinstance(found, str) else None


@dataclass(frozen=True)
class HubFiles(ModelFiles):
    """The files of a model of the hub by its name. Each is fetched when it is asked for, or with `only_cached` never."""

    only_cached: bool = False

    def found(self, name: str) -> Path | None:
        from transformers.utils import cached_file

        there = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
        file = cached_file(str(self.path), name, local_files_only=self.only_cached, **there)
        return Path(file) if file else None

"""The model that `model_name` names, resolved once per command. No torch.

hub id               owner/model               the model, which has no local files before it is fetched
model                a directory, a GGUF file  the model
run directory        plan.json + adapter/      the adapter on the model that the plan names, which may be another run
                     plan.json + model/        the whole model, if every weight was trained
adapter directory    adapter_config.json       the adapter on the model that the file names
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from dpo_cli.models.adapter_config import ADAPTER_CONFIG, Adapter
from dpo_cli.models.model_files import CONFIG, GENERATION, ModelFiles
from dpo_cli.models.shape import ModelFacts, known_models
from dpo_cli.models.tensor_files import Fault
from dpo_cli.storage.digests import sha256_of_all, sha256_of_settings, state_of_files
from dpo_cli.storage.jsonio import read_object
from dpo_cli.storage.run_directory import ADAPTER, MODEL, PLAN, SUMMARY

CONTINUED = ("adapter", "first")  # values of "reference" with which the adapter in model_name is trained further
FIX = "name the directory of a finished run, or of a complete adapter"


class Unusable(ValueError):
    """A run or an adapter that cannot be used, and the fix."""

    def __init__(self, message: str, fix: str = FIX) -> None:
        super().__init__(message)
        self.fix = fix


@dataclass(frozen=True)
class ModelSource:
    """A model by its name, and the models below it. Its files are read once, at their first use."""

    name: str
    own: ModelFiles  # the named files: for a run its adapter/ or model/
    below: ModelSource | None = None  # the base of an adapter
    own_fault: Fault | None = None

    @classmethod
    def of(cls, name: str, above: tuple[Path, ...] = ()) -> ModelSource:
        """Resolve a name. `above` are the folders of the adapters above it, to detect a cycle."""
        try:
            return cls._resolved(name, above)
        except (OSError, ValueError) as error:  # reported as a problem of model_name (checks.py)
            fix = error.fix if isinstance(error, Unusable) else FIX
            return cls(name, ModelFiles(Path(name)), own_fault=Fault(str(error), fix))

    @classmethod
    def _resolved(cls, name: str, above: tuple[Path, ...]) -> ModelSource:
        path = Path(name)
        if path in above:
            raise Unusable("it is its own base model")
        is_run = (path / PLAN).is_file()
        if is_run and not (path / SUMMARY).is_file():
            raise Unusable("its run is not finished")
        if is_run and (path / MODEL).is_dir():
            return cls(name, ModelFiles(path / MODEL))
        adapter = Adapter.in_folder(path / ADAPTER if is_run else path)
        if adapter is None and is_run:
            raise Unusable("its run has no adapter")
        if adapter is None:
            return cls(name, ModelFiles(path))
        if (kind := adapter.config.get("peft_type")) != "LORA":
            raise Unusable(f"its adapter has the type {kind}, but only LORA can be trained on")
        if fault := adapter.fault:
            raise Unusable(f"its adapter {fault.message}", fault.fix)
        above = (*above, path, adapter.directory)
        if (plan := adapter.directory.parent / PLAN).is_file():
            return cls(name, adapter.files, cls._of_run(read_object(plan), above))
        base = adapter.config.get("base_model_name_or_path")
        if not base or not isinstance(base, str):
            raise Unusable(f"its {ADAPTER_CONFIG} names no base model")
        return cls(name, adapter.files, cls.of(base, above))

    @classmethod
    def _of_run(cls, plan: Mapping[str, object], above: tuple[Path, ...]) -> ModelSource:
        """The base model of a run's adapter: if it continued another adapter, the base of that one."""
        config = plan.get("config")
        name = config.get("model_name") if isinstance(config, dict) else None
        if not isinstance(config, dict) or not isinstance(name, str) or not name:
            raise Unusable(f"its {PLAN} names no model")
        start = cls.of(name, above)
        if config.get("reference") not in CONTINUED:
            return start
        if start.own_fault is not None:
            raise Unusable(start.own_fault.message, start.own_fault.fix)
        return start.below or start

    @property
    def adapter(self) -> Adapter | None:
        """The named adapter; None for a model."""
        return Adapter(self.own) if self.below is not None else None

    @property
    def adapters(self) -> list[Adapter]:
        """All its adapters, from the named one down."""
        return [Adapter(self.own), *self.below.adapters] if self.below is not None else []

    @property
    def fault(self) -> Fault | None:
        """Why it cannot be trained on, by its adapters, in words that follow a colon; None if it can."""
        return self.own_fault or (self.below.fault if self.below is not None else None)

    @property
    def foundation(self) -> str:
        """The name of the model below all adapters, which gives shape and tokenizer; for a run its model/ folder."""
        if self.below is not None:
            return self.below.foundation
        return str(self.own.path) if self.is_whole_run else self.name

    @property
    def is_whole_run(self) -> bool:
        """Whether it is a run that trained every weight."""
        return self.below is None and self.own.path != Path(self.name)

    @property
    def files(self) -> ModelFiles:
        """The files of the model below all adapters."""
        return self.below.files if self.below is not None else self.own

    @property
    def tokenizer_files(self) -> ModelFiles:
        """The files with the tokenizer: those of the adapter if it has its own, else of the model."""
        return self.own if self.adapter is not None and self.adapter.has_tokenizer else self.files

    @property
    def generation(self) -> dict[str, object] | None:
        """The generation_config.json next to the tokenizer; None without a local folder."""
        files = self.tokenizer_files
        return files.sound(GENERATION) if files.path.is_dir() else None

    @property
    def facts(self) -> ModelFacts | None:
        """The shape of the model: from a GGUF header, a config.json or the table of common models; None if unknown."""
        if self.files.gguf is not None or self.files.has(CONFIG):
            return self.files.facts
        return known_models().get(self.foundation)

    @property
    def folders(self) -> list[str]:
        """The folders of its runs and adapters, from the named one down. Reads no weights."""
        if self.below is not None:
            return [str(self.own.path), *self.below.folders]
        return [str(self.own.path)] if self.is_whole_run else []

    @cached_property
    def weights_sha256(self) -> dict[str, str]:
        """The same folders, each with the SHA-256 of its weights; this reads all weights."""
        return {folder: sha256_of_all(Path(folder)) for folder in self.folders}

    @cached_property
    def settings_sha256(self) -> dict[str, str]:
        """The same folders, each with the SHA-256 of its settings."""
        return {folder: sha256_of_settings(Path(folder)) for folder in self.folders}

    @property
    def state(self) -> dict[str, list[tuple[str, int, int]]]:
        """By the place of each of its files: names, sizes and times of change."""
        places = [*self.folders, str(self.tokenizer_files.path), str(self.files.path)]
        return {place: state_of_files(Path(place)) for place in dict.fromkeys(places) if Path(place).exists()}

    def absolute(self) -> ModelSource:
        """The same with an absolute path if it is local; what is already read is kept."""
        if not os.path.exists(self.name):
            return self
        return replace(self, name=str(Path(self.name).absolute()), own=self.own.absolute())

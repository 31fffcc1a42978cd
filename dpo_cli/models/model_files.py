"""The files of one model, or of one adapter: each is opened once, at its first use. No torch."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_cli.models import shape
from dpo_cli.models.gguf_header import Header, NoGguf, read_header
from dpo_cli.models.quantised_files import Quantisation, stored_quantisation, text_part
from dpo_cli.models.shape import ModelFacts
from dpo_cli.models.tensor_files import TensorFiles
from dpo_cli.storage.jsonio import read_object

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Fast

CONFIG, GENERATION = "config.json", "generation_config.json"
TOKENIZER_CONFIG, TOKENIZER, SPECIAL_TOKENS = "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json"
TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True)
class ModelFiles:
    """A folder with a model or an adapter, or a GGUF file; it may not exist."""

    path: Path
    _objects: dict[str, dict[str, object]] = field(default_factory=dict, repr=False, compare=False)

    def absolute(self) -> ModelFiles:
        """The same with an absolute path; what is already read is kept."""
        absolute = copy.copy(self)
        object.__setattr__(absolute, "path", self.path.absolute())
        return absolute

    def found(self, name: str) -> Path | None:
        """The file with this name; None if there is none."""
        return self.path / name if (self.path / name).is_file() else None

    def has(self, name: str) -> bool:
        return self.found(name) is not None

    def json(self, name: str) -> dict[str, object]:
        """The object in a JSON file, {} without the file; `ValueError` if the file is not a JSON object."""
        if name not in self._objects:
            self._objects[name] = read_object(file) if (file := self.found(name)) is not None else {}
        return self._objects[name]

    def sound(self, name: str) -> dict[str, object]:
        """The same, and {} for a damaged file, which the loading of the model reports."""
        try:
            return self.json(name)
        except (OSError, ValueError):
            return {}

    @property
    def config(self) -> dict[str, object]:
        return self.json(CONFIG)

    @cached_property
    def tensors(self) -> TensorFiles:
        return TensorFiles(self.path)

    @cached_property
    def gguf(self) -> Header | None:
        """The header of a GGUF file, None for another file; `ValueError` for a damaged one."""
        try:
            return read_header(self.path) if self.path.is_file() else None
        except NoGguf:
            return None

    @property
    def is_gguf(self) -> bool:
        """Whether it is a GGUF file, which may be damaged."""
        try:
            return self.gguf is not None
        except ValueError:
            return True

    @cached_property
    def facts(self) -> ModelFacts | None:
        """The shape of the model, None if it is unknown."""
        if self.gguf is not None:
            return shape.gguf_facts(self.gguf)
        return shape.config_facts(self.config, self.tensors) if self.has(CONFIG) else None

    @cached_property
    def fast_tokenizer(self) -> Fast | None:
        """The tokenizer.json as transformers uses it: without saved truncation and padding."""
        if (file := self.found(TOKENIZER)) is None:
            return None
        from tokenizers import Tokenizer as Fast

        try:
            fast = Fast.from_file(str(file))
        except Exception:  # the library's only error class; the loading of the model reports the problem
            return None
        fast.no_truncation()
        fast.no_padding()
        return fast

    @cached_property
    def added_tokens(self) -> dict[str, int]:
        """The ids of the tokens that tokenizer.json adds to its vocabulary; the large vocabulary is not kept."""
        file = self.found(TOKENIZER)
        added = read_object(file).get("added_tokens") if file is not None else None
        return {token["content"]: token["id"] for token in added or ()}

    @property
    def is_mixture(self) -> bool:
        """Whether the model is a mixture of experts, by its config.json or its GGUF header."""
        return shape.is_gguf_mixture(self.gguf) if self.gguf is not None else shape.is_mixture(self.config)

    @property
    def quantisation(self) -> Quantisation | None:
        """The quantisation of the weights in the files; None for plain or unknown weights."""
        return stored_quantisation(self.config)

    @property
    def token_rows(self) -> int | None:
        """The rows of the model's embedding, by its config.json; None if it does not give them."""
        rows = text_part(self.config).get("vocab_size")
        return rows if isinstance(rows, int) else None

    @property
    def has_chat_template(self) -> bool:
        """Whether a chat template comes with the tokenizer."""
        if self.gguf is not None:
            return "tokenizer.chat_template" in self.gguf.metadata
        return self.has(TEMPLATE) or "chat_template" in self.json(TOKENIZER_CONFIG)

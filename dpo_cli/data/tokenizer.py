"""The tokenizer as the data modules use it: from one that transformers loaded, or from a model's files
(models/tokenizer_files.py) without torch."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_cli.data.chat_template import ChatTemplate
from dpo_cli.data.fast_encoder import fast_encoder
from dpo_cli.data.hub_datasets import is_hub_id
from dpo_cli.data.pieces import Added, Encode, Faster, Pieces
from dpo_cli.storage.jsonio import read_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION = "generation_config.json"
PROBE = "a"  # every tokenizer has a token for this text
PROBES = (PROBE, " two  words\n", "é, 中 and 1234")


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids, and the chat template."""

    encode: Callable[[str, bool], list[int]]  # the text, and whether the tokenizer adds its special tokens
    encode_many: Encode
    decode: Callable[[Sequence[int]], str]
    template: ChatTemplate | None
    eos: str
    size: int  # number of tokens
    ends: frozenset[int]  # tokens that end an answer: EOS, and those of generation_config.json
    added: Sequence[Added] = ()  # tokens that are found before all others
    text: Callable[[], str] | None = None  # all that decides the ids of a text, if that can be written
    faster: Faster | None = None  # makes a faster `encode_many`

    @classmethod
    def loaded(
        cls, tokenizer: PreTrainedTokenizerBase, day: date | None = None, generation: Mapping[str, Any] | None = None
    ) -> Tokenizer:
        """From a tokenizer of transformers, and the generation_config.json of its model if it was already read."""
        if generation is None:
            generation = _generation(tokenizer.name_or_path)
        encode_many = _many(tokenizer)
        return cls(
            encode=lambda text, special: list(tokenizer(text, add_special_tokens=special)["input_ids"]),
            encode_many=encode_many,
            decode=lambda ids: str(tokenizer.decode(ids)),
            template=ChatTemplate.of(tokenizer, day),
            eos=str(tokenizer.eos_token),
            size=len(tokenizer),
            ends=ends_of(int(tokenizer.eos_token_id), generation),
            added=[*tokenizer.added_tokens_decoder.values()],
            text=_text(tokenizer),
            faster=_faster(tokenizer, encode_many),
        )

    def against(self, token_rows: int) -> str:
        """A text with the number of tokens and of the model's rows for them."""
        return f"the tokenizer has {self.size} tokens, the model {token_rows} rows"

    @property
    def digest(self) -> str | None:
        """The SHA-256 of what decides the tokens of a row; None if that is not known."""
        if self.text is None:
            return None
        template = self.template and [self.template.sources, {name: str(token) for name, token in self.template.tokens.items()}]
        day = self.template.day.isoformat() if self.template and self.template.writes_date else None
        parts = [self.text(), template, day, self.eos, self.size, sorted(self.ends), self.prefix]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def resize(self) -> str:
        return f"resize the model's embedding to {self.size} rows"

    @cached_property
    def pieces(self) -> Pieces:
        """The same as `encode_many`, for texts that share parts."""
        return Pieces(self.encode_many, self.added, self.template.source if self.template else "", self.faster)

    @cached_property
    def prefix(self) -> list[int]:
        """The special tokens that the tokenizer puts before a text (BOS)."""
        special, bare = self.encode(PROBE, True), self.encode(PROBE, False)
        return special[: special.index(bare[0])] if bare and bare[0] in special else []

    def plain(self, ids: list[int]) -> list[int]:
        """The ids of a text without a template: with exactly one BOS, and without an added EOS."""
        return ids if ids[: len(self.prefix)] == self.prefix else [*self.prefix, *ids]


def _text(tokenizer: PreTrainedTokenizerBase) -> Callable[[], str] | None:
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    return (lambda: f"{type(tokenizer).__name__} {backend.to_str()}") if hasattr(backend, "to_str") else None


def _many(tokenizer: PreTrainedTokenizerBase) -> Encode:
    """Several texts to their ids, on all cores."""

    lock = threading.Lock()  # a call sets options of the tokenizer, and two at once fail

    def slow(texts: Sequence[str]) -> list[list[int]]:
        with lock:
            return list(tokenizer(list(texts), add_special_tokens=False)["input_ids"]) if texts else []

    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if not hasattr(backend, "encode_batch_fast"):
        return slow

    def fast(texts: Sequence[str]) -> list[list[int]]:
        """Without the positions of tokens, which nobody reads here, and which take a third of the time."""
        if backend.truncation is not None:  # a setting of the file, which transformers removes with each of its calls
            backend.no_truncation()
        if backend.padding is not None:
            backend.no_padding()
        return [each.ids for each in backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    return fast if fast(PROBES) == slow(PROBES) else slow


def _faster(tokenizer: PreTrainedTokenizerBase, encode: Encode) -> Faster | None:
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    return partial(fast_encoder, backend, encode) if hasattr(backend, "to_str") else None


def _generation(name: str) -> Mapping[str, Any]:
    """The generation_config.json of a model's folder, or of a cached hub model; {} if it is missing or damaged (the loading of
    the model reports that)."""
    file: object = Path(name) / GENERATION
    if not Path(name).is_dir() and is_hub_id(name):
        from huggingface_hub import try_to_load_from_cache

        file = try_to_load_from_cache(name, GENERATION)
    try:
        return read_object(Path(file)) if name and isinstance(file, str | Path) else {}
    except (OSError, ValueError):
        return {}


def ends_of(eos: int, generation: Mapping[str, Any]) -> frozenset[int]:
    """The ids of EOS and of the other tokens that end an answer, by a generation_config.json."""
    known = generation.get("eos_token_id")
    return frozenset({eos, *(known if isinstance(known, list) else [] if known is None else [known])})

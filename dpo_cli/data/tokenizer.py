"""What the data room needs of a tokenizer: of one that transformers loaded, or of a model's files, without torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_cli.data.chat_template import ChatTemplate
from dpo_cli.data.hub_datasets import is_hub_id
from dpo_cli.storage.jsonio import read_shared_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Fast
    from transformers import PreTrainedTokenizerBase

CONFIG, FAST, TEMPLATE, GENERATION = "tokenizer_config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json"
SPECIAL, ADDED = "special_tokens_map.json", "added_tokens.json"  # of older versions of transformers
PROBE = "a"  # a text that every tokenizer has a token for


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids, and the chat template."""

    encode: Callable[[str, bool], list[int]]  # the text, and whether the tokenizer adds its special tokens
    decode: Callable[[Sequence[int]], str]
    template: ChatTemplate | None
    eos: str
    size: int  # tokens that it has
    ends: frozenset[int]  # the tokens that end an answer: EOS, and those that generation_config.json adds

    @classmethod
    def loaded(cls, tokenizer: PreTrainedTokenizerBase, day: date | None = None) -> Tokenizer:
        """Of a tokenizer of transformers."""
        return cls(
            encode=lambda text, special: list(tokenizer(text, add_special_tokens=special)["input_ids"]),
            decode=lambda ids: str(tokenizer.decode(ids)),
            template=ChatTemplate.of(tokenizer, day),
            eos=str(tokenizer.eos_token),
            size=len(tokenizer),
            ends=_ends(int(tokenizer.eos_token_id), _beside(tokenizer.name_or_path)),
        )

    @classmethod
    def in_folder(cls, folder: Path, day: date | None = None) -> Tokenizer | None:
        """Of the files in a model's folder; None where they do not tell enough without transformers."""
        if (fast := fast_tokenizer(folder)) is None or not (folder / CONFIG).is_file():
            return None
        config = _object(folder / CONFIG)
        named = {**_object(folder / SPECIAL), **config}
        tokens = {name: _content(value) for name, value in named.items() if name.endswith("_token") and _content(value)}
        _add_missing(fast, config, _object(folder / ADDED))
        eos = tokens.get("eos_token")
        eos_id = fast.token_to_id(eos) if eos else None
        if eos is None or eos_id is None:
            return None
        sources = _templates(folder, config)
        return cls(
            encode=lambda text, special: list(fast.encode(text, add_special_tokens=special).ids),
            decode=lambda ids: str(fast.decode(list(ids), skip_special_tokens=False)),
            template=ChatTemplate(sources, tokens, day) if sources else None,
            eos=eos,
            size=fast.get_vocab_size(),
            ends=_ends(eos_id, folder / GENERATION),
        )

    def against(self, token_rows: int) -> str:
        """How many tokens there are, and how many rows a model has for them."""
        return f"the tokenizer has {self.size} tokens, the model {token_rows} rows"

    @property
    def resize(self) -> str:
        return f"resize the model's embedding to {self.size} rows"

    @cached_property
    def prefix(self) -> list[int]:
        """The special tokens that the tokenizer puts before a text (BOS)."""
        special, bare = self.encode(PROBE, True), self.encode(PROBE, False)
        return special[: special.index(bare[0])] if bare and bare[0] in special else []

    def plain(self, text: str) -> list[int]:
        """The ids of a text without a template: with BOS, and with one alone where the text begins with it; no EOS is added."""
        ids = self.encode(text, False)
        return ids if ids[: len(self.prefix)] == self.prefix else [*self.prefix, *ids]


def fast_tokenizer(folder: Path) -> Fast | None:
    """The tokenizer.json of a folder, as transformers uses it: without the limits that its last user had set."""
    if not (folder / FAST).is_file():
        return None
    from tokenizers import Tokenizer as Fast

    try:
        fast = Fast.from_file(str(folder / FAST))
    except Exception:  # the library's only class of error; the model's loading says what is wrong
        return None
    fast.no_truncation()
    fast.no_padding()
    return fast


def _add_missing(fast: Fast, config: dict[str, Any], added: dict[str, Any]) -> None:
    """Give a tokenizer the tokens that only the files beside it name, as transformers does."""
    from tokenizers import AddedToken

    decoder = config.get("added_tokens_decoder") or {}
    named = [_content(decoder[number]) for number in sorted(decoder, key=int)] + sorted(added, key=lambda token: added[token])
    for key in ("extra_special_tokens", "additional_special_tokens"):
        value = config.get(key) or ()
        named += [_content(token) for token in (value.values() if isinstance(value, dict) else value)]
    missing = [token for token in dict.fromkeys(named) if token and fast.token_to_id(token) is None]
    fast.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in missing])


def _object(file: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one where there is none, or it is damaged, which the model's loading reports."""
    try:
        value = read_shared_json(file)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _content(value: object) -> str:
    """A special token, which is a string or an object."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else ""


def _templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """The chat templates of a folder by their names."""
    own = config.get("chat_template")
    if isinstance(own, list):  # several with names
        found = {entry["name"]: entry["template"] for entry in own if {"name", "template"} <= entry.keys()}
    else:
        found = {"default": own} if isinstance(own, str) else {}
    if (folder / TEMPLATE).is_file():
        found["default"] = (folder / TEMPLATE).read_text(encoding="utf-8")
    beside = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    return found | {file.stem: file.read_text(encoding="utf-8") for file in beside}


def _beside(name: str) -> Path | None:
    """The generation_config.json of a model's folder, or of a model of the hub that is in the cache."""
    if Path(name).is_dir() or not is_hub_id(name):
        return Path(name) / GENERATION if name else None
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(name, GENERATION)
    return Path(file) if isinstance(file, str) else None


def _ends(eos: int, file: Path | None) -> frozenset[int]:
    """The ids of EOS and of the other tokens that end an answer, by a generation_config.json where there is one."""
    known = _object(file).get("eos_token_id") if file is not None else None
    return frozenset({eos, *(known if isinstance(known, list) else [] if known is None else [known])})

"""The tokenizer of a model's files, without transformers. No torch."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from datetime import date
from typing import TYPE_CHECKING

from dpo_cli.data.chat_template import ChatTemplate
from dpo_cli.data.tokenizer import Tokenizer, ends_of
from dpo_cli.models.model_files import GENERATION, SPECIAL_TOKENS, TEMPLATE, TOKENIZER_CONFIG, ModelFiles

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Fast

ADDED = "added_tokens.json"  # written by older versions of transformers


def tokenizer_of(files: ModelFiles, day: date | None = None) -> Tokenizer | None:
    """The tokenizer of these files; None if only transformers can load it."""
    if (fast := files.fast_tokenizer) is None or not files.has(TOKENIZER_CONFIG):
        return None
    config = files.sound(TOKENIZER_CONFIG)
    named = {**files.sound(SPECIAL_TOKENS), **config}
    tokens = {name: _content(value) for name, value in named.items() if name.endswith("_token") and _content(value)}
    if missing := _missing(fast, config, files.sound(ADDED)):
        from tokenizers import AddedToken

        fast = copy.deepcopy(fast)  # the cached one stays unchanged
        fast.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in missing])
    eos = tokens.get("eos_token")
    eos_id = fast.token_to_id(eos) if eos else None
    if eos is None or eos_id is None:
        return None
    sources = _templates(files, config)
    return Tokenizer(
        encode=lambda text, special: list(fast.encode(text, add_special_tokens=special).ids),
        encode_many=lambda texts: [each.ids for each in fast.encode_batch_fast(list(texts), add_special_tokens=False)],
        decode=lambda ids: str(fast.decode(list(ids), skip_special_tokens=False)),
        template=ChatTemplate(sources, tokens, day) if sources else None,
        eos=eos,
        size=fast.get_vocab_size(),
        ends=ends_of(eos_id, files.sound(GENERATION)),
        added=[*fast.get_added_tokens_decoder().values()],
    )


def _missing(fast: Fast, config: Mapping[str, object], added: Mapping[str, object]) -> list[str]:
    """The tokens that only other files than tokenizer.json name; transformers adds them too."""
    decoder = config.get("added_tokens_decoder")
    in_order = sorted(decoder.items(), key=lambda item: int(item[0])) if isinstance(decoder, dict) else []
    named = [_content(token) for _, token in in_order] + sorted(added, key=lambda token: int(str(added[token])))
    for key in ("extra_special_tokens", "additional_special_tokens"):
        value = config.get(key)
        named += [_content(token) for token in (value.values() if isinstance(value, dict) else _listed(value))]
    return [token for token in dict.fromkeys(named) if token and fast.token_to_id(token) is None]


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _content(value: object) -> str:
    """The text of a special token, which is a string or an object."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else ""


def _templates(files: ModelFiles, config: Mapping[str, object]) -> dict[str, str]:
    """The chat templates of a model by their names."""
    own = config.get("chat_template")
    if isinstance(own, list):  # several templates with names
        found = {entry["name"]: entry["template"] for entry in own if {"name", "template"} <= entry.keys()}
    else:
        found = {"default": own} if isinstance(own, str) else {}
    if (alone := files.found(TEMPLATE)) is not None:
        found["default"] = alone.read_text(encoding="utf-8")
    named = sorted((files.path / "additional_chat_templates").glob("*.jinja"))
    return found | {file.stem: file.read_text(encoding="utf-8") for file in named}

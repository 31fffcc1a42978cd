"""Texts by pieces: the ids of the whole text, for tokenizers that can be cut and for those that cannot; each piece once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from builders import tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from dpo_cli.data import pieces
from dpo_cli.data.pieces import Pieces
from dpo_cli.data.tokens import common

TEMPLATE = "{{ '<|a|>' }}{{ '<|b|>' }}</s>"


def made(
    pre_tokenizer: Any = None, normalizer: Any = None, options: dict[str, Any] | None = None, extra: Sequence[AddedToken] = ()
) -> Tokenizer:
    """A tokenizer with the special tokens <|a|>, <|b|> and </s>."""
    own = Tokenizer(models.BPE(unk_token="<unk>"))
    own.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    if normalizer is not None:
        own.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"], initial_alphabet=[*alphabet, "▁"])
    own.train_from_iterator(["the cat sat on the mat; the answer is 42\n\n"] * 3, trainer)
    own.add_special_tokens(
        [AddedToken(text, special=True, normalized=False, **(options or {})) for text in ("<|a|>", "<|b|>", "</s>")]
    )
    own.add_tokens(list(extra))
    return own


TOKENIZERS = {
    "byte-level": made(),
    "a prefix at each part": made(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "a mark at the start of a text only": made(pre_tokenizers.Metaspace(prepend_scheme="first")),
    "a mark at each part": made(pre_tokenizers.Metaspace(prepend_scheme="always")),
    "a normalizer that prepends": made(normalizer=normalizers.Prepend("▁")),
    "a normalizer that strips": made(normalizer=normalizers.Strip()),
    "tokens that take the blanks before": made(options={"lstrip": True}),
    "tokens that take the blanks after": made(options={"rstrip": True}),
    "tokens that stand alone as words": made(options={"single_word": True}),
    "a token that contains another": made(extra=[AddedToken("<|a|>user", normalized=False)]),
    "a token that runs into another": made(extra=[AddedToken("x<|", normalized=False)]),
}
WHOLE = {"a mark at the start of a text only"} | {name for name in TOKENIZERS if name.startswith("tokens that")}
TEXTS = st.lists(
    st.sampled_from(["<|a|>", "<|b|>", "</s>", "<|a|>user", "x", " ", "\n", "the cat", "é中", "<|", "|>", "42", "  \n"])
)


def encoder(own: Tokenizer, asked: list[str] | None = None) -> pieces.Encode:
    def encode(texts: Sequence[str]) -> list[list[int]]:
        if asked is not None:
            asked.extend(texts)
        return [each.ids for each in own.encode_batch_fast(list(texts), add_special_tokens=False)]

    return encode


def pieces_of(own: Tokenizer) -> Pieces:
    return Pieces(encoder(own), own.get_added_tokens_decoder().values(), TEMPLATE)


PIECES = {name: pieces_of(own) for name, own in TOKENIZERS.items()}


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(TEXTS, min_size=1, max_size=4))
@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_ids_are_those_of_the_whole_text(name: str, texts: list[list[str]]) -> None:
    whole = ["".join(parts) for parts in texts]
    assert PIECES[name].ids(whole) == encoder(TOKENIZERS[name])(whole)


def test_which_tokenizers_are_cut() -> None:
    assert {name for name, own in PIECES.items() if own._end is None} == WHOLE


def test_each_piece_is_encoded_once() -> None:
    asked: list[str] = []
    own = tiny_tokenizer()
    backend = own.backend_tokenizer
    by_pieces = Pieces(encoder(backend, asked), own.added_tokens_decoder.values(), own.chat_template)
    asked.clear()
    prompt = "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n"
    texts = [prompt, f"{prompt}yes<|im_end|>\n", f"{prompt}no<|im_end|>\n"]
    assert by_pieces.ids(texts) == encoder(backend)(texts)
    assert sorted(asked) == sorted(set(asked)) and asked.count("user\nthe cat<|im_end|>") == 1
    asked.clear()
    assert by_pieces.ids(texts) == encoder(backend)(texts) and asked == []


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "KEPT", 10)
    own = pieces_of(TOKENIZERS["byte-level"])
    for start in range(20):
        texts = [f"<|a|>{number}<|b|>" for number in range(start, start + 4)]
        assert own.ids(texts) == encoder(TOKENIZERS["byte-level"])(texts)
        assert len(own._known) <= 15


@settings(max_examples=300, deadline=None)
@given(one=st.lists(st.integers(0, 2), max_size=12), other=st.lists(st.integers(0, 2), max_size=12))
def test_the_common_start(one: list[int], other: list[int]) -> None:
    expected = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    assert common(one, other) == common("".join(map(str, one)), "".join(map(str, other))) == expected

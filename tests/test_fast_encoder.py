"""Ids by fastokens: those of the tokenizer, or not used; only for many texts, and only where no fork can follow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from builders import tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pieces import TOKENIZERS, encoder
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from dpo_cli.data import pieces, tokenizer
from dpo_cli.data.fast_encoder import HARD, fast_encoder
from dpo_cli.data.pieces import Encode, Pieces
from dpo_cli.data.rows import Pair
from dpo_cli.data.tokens import encode_all
from dpo_cli.storage import processes


def without_bytes() -> Tokenizer:
    """A byte-level tokenizer with tokens for the bytes of ASCII only, as SmolLM2's, which lacks some."""
    own = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"])
    own.train_from_iterator(["the cat sat on the mat; the answer is 42\n\n" + "".join(map(chr, range(32, 127)))], trainer)
    return own


def trained(model: object, trainer: object, pre_tokenizer: object = None) -> Tokenizer:
    own = Tokenizer(model)
    if pre_tokenizer is not None:
        own.pre_tokenizer = pre_tokenizer
    own.train_from_iterator(["the cat sat on the mat; the answer is 42\n\n"] * 3, trainer)
    return own


OTHERS = {
    "Unigram": trained(models.Unigram(), trainers.UnigramTrainer(special_tokens=["<unk>"], unk_token="<unk>")),
    "WordPiece": trained(models.WordPiece(), trainers.WordPieceTrainer(special_tokens=["[UNK]"]), pre_tokenizers.Whitespace()),
    "WordLevel": trained(models.WordLevel(), trainers.WordLevelTrainer(special_tokens=["[UNK]"]), pre_tokenizers.Whitespace()),
    "dropout": trained(models.BPE(dropout=0.5), trainers.BpeTrainer(vocab_size=90), pre_tokenizers.ByteLevel()),
}
OWN = {**TOKENIZERS, **OTHERS, "bytes without tokens": without_bytes()}
FAST = {name: fast_encoder(own, encoder(own), []) for name, own in OWN.items()}
UNREAD = {name for name, fast in FAST.items() if fast is None}
TEXTS = st.lists(
    st.one_of(
        st.text(max_size=12),
        st.sampled_from(["<|a|>", "</s>", "<|a|>user", "x<|", "the cat", " ", "  \n", "é", "e\u0301", "42", "don't", "\x04"]),
    )
)


def test_which_tokenizers_it_reads() -> None:
    assert {"byte-level", "bytes without tokens"} <= FAST.keys() - UNREAD
    assert {*OTHERS, *(name for name in OWN if "Metaspace" in OWN[name].to_str())} <= UNREAD


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(TEXTS, min_size=1, max_size=4))
@pytest.mark.parametrize("name", [name for name in OWN if FAST[name] is not None])
def test_the_ids_are_those_of_the_tokenizer(name: str, texts: list[list[str]]) -> None:
    whole, fast = ["".join(parts) for parts in texts], FAST[name]
    assert fast is not None and fast(whole) == encoder(OWN[name])(whole)


def test_a_byte_without_a_token_is_left_to_the_tokenizer() -> None:
    own, asked = OWN["bytes without tokens"], list[str]()
    fast = fast_encoder(own, encoder(own, asked), [])
    assert fast is not None
    asked.clear()
    texts = ["the cat", "é", "the mat", "a\x04"]
    assert fast(texts) == encoder(own)(texts) and asked == ["é", "a\x04"]


@pytest.mark.parametrize("text", [*HARD[1:], "of the data"])
def test_other_ids_for_one_text_are_seen(text: str) -> None:
    own = OWN["byte-level"]

    def other(texts: Sequence[str]) -> list[list[int]]:
        return [[*ids, 0] if given == text else ids for given, ids in zip(texts, encoder(own)(texts), strict=True)]

    assert fast_encoder(own, other, ["of the data"]) is None


def test_other_ids_for_one_token_are_seen() -> None:
    own = OWN["byte-level"]
    texts = {number: own.decode([number]) for number in range(own.get_vocab_size())}
    reached = [number for number, text in texts.items() if encoder(own)([text]) == [[number]]]
    assert len(reached) > 100
    for number in reached[::7]:
        other: Encode = lambda texts, number=number: [[id for id in ids if id != number] for ids in encoder(own)(texts)]  # noqa: E731
        assert fast_encoder(own, other, []) is None, texts[number]


def test_it_is_looked_for_once_after_many_characters_and_never_before_a_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    own, asked = OWN["byte-level"], list[list[str]]()

    def faster(texts: Sequence[str]) -> Encode | None:
        asked.append(list(texts))
        return FAST["byte-level"]

    monkeypatch.setattr(pieces, "MANY", 10)
    by_pieces = Pieces(encoder(own), (), "", faster)
    monkeypatch.setattr(processes, "CAN_FORK", True)
    monkeypatch.setattr(processes, "cores", lambda: 2)
    assert by_pieces.ids(["the cat sat"] * 2) == encoder(own)(["the cat sat"] * 2) and not asked
    monkeypatch.setattr(processes, "CAN_FORK", False)
    for texts in (["on the mat"], ["the answer is 42"]):
        assert by_pieces.ids(texts) == encoder(own)(texts)
    assert asked == [["on the mat"]] and by_pieces._encode is FAST["byte-level"]


@pytest.mark.skipif(not processes.CAN_FORK, reason="without fork there are no processes to encode in")
def test_the_processes_use_it_and_the_ids_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Pair(f"Is {number} even?", f"yes {number}" * 3, f"no {number}" * 2, number + 1) for number in range(2000)]
    plain = tokenizer.Tokenizer.loaded(tiny_tokenizer())
    expected = [(row.prompt_ids, row.responses) for row in encode_all([rows], plain).sides[0]]

    def counted(*given: object) -> Encode | None:
        found = fast_encoder(*given)  # type: ignore[arg-type]
        (tmp_path / f"{id(found)}-{processes.os.getpid()}-{found is not None}").touch()
        return found

    monkeypatch.setattr(tokenizer, "fast_encoder", counted)
    monkeypatch.setattr(pieces, "MANY", 1000)
    monkeypatch.setattr(processes, "cores", lambda: 2)
    hastened = tokenizer.Tokenizer.loaded(tiny_tokenizer())
    assert [(row.prompt_ids, row.responses) for row in encode_all([rows], hastened).sides[0]] == expected
    used = [file.name.split("-")[1:] for file in tmp_path.iterdir()]
    assert used and all(was_read == "True" and process != str(processes.os.getpid()) for process, was_read in used)

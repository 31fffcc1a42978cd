"""Texts to token ids by pieces, each different one once: a conversation is in three texts of a pair, and a turn in many.

A piece ends with a special token of the chat template. A tokenizer cuts a text at such tokens before anything else. So the ids
of a text are those of its pieces one after another, unless the start of a text is treated in another way: that is tried first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, pairwise
from typing import Protocol

from dpo_cli.storage.processes import may_fork

Encode = Callable[[Sequence[str]], list[list[int]]]  # several texts to their ids, without added special tokens
Faster = Callable[[Sequence[str]], Encode | None]

BEFORE = ("", "x ", "x\n")  # texts before a special token
AFTER = ("a", " a", "\na", "  \n", "é", "中", "1 2", ":")  # and after it
KEPT = 1024  # pieces that are remembered
MANY = 1 << 23  # characters, which take about as long as the start of a faster encoder


class Added(Protocol):
    """An added token as the package tokenizers describes it."""

    @property
    def content(self) -> str: ...
    @property
    def special(self) -> bool: ...
    @property
    def normalized(self) -> bool: ...
    @property
    def lstrip(self) -> bool: ...
    @property
    def rstrip(self) -> bool: ...
    @property
    def single_word(self) -> bool: ...


class Pieces:
    """Encodes texts by their pieces. `added` are the tokenizer's added tokens, `source` is the chat template.

    `faster` makes a faster `encode` of some texts, or None. It is called once, after many characters.
    """

    def __init__(self, encode: Encode, added: Iterable[Added], source: str, faster: Faster | None = None) -> None:
        self._encode, self._known = encode, dict[str, list[int]]()
        self._faster, self._characters = faster, 0
        tokens = list(added)
        ends = [token for token in tokens if token.content in source and _stands_alone(token, tokens)]
        ends = [token for token in ends if _cuts(token.content, encode)]
        self._end = re.compile("|".join(re.escape(token.content) for token in ends)) if ends else None

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""
        pieces = [self._cut(text) for text in texts]
        if len(self._known) > KEPT:
            self._known.clear()
        new = [piece for piece in dict.fromkeys(chain.from_iterable(pieces)) if piece not in self._known]
        self._hasten(new)
        self._known.update(zip(new, self._encode(new), strict=True))
        return [list(chain.from_iterable(self._known[piece] for piece in of_text)) for of_text in pieces]

    def ids_of(self, text: str) -> list[int]:
        """The ids of one text."""
        return self.ids([text])[0]

    def last(self, text: str) -> str:
        """The last piece of a text."""
        return self._cut(text)[-1]

    def _hasten(self, texts: Sequence[str]) -> None:
        """Look for a faster encoder after many characters, if no fork can follow: its threads do not survive one."""
        self._characters += sum(map(len, texts))
        if self._faster is not None and self._characters > MANY and not may_fork():
            self._encode, self._faster = self._faster(texts) or self._encode, None

    def _cut(self, text: str) -> list[str]:
        ends = [match.end() for match in self._end.finditer(text)] if self._end else []
        return [text[start:end] for start, end in pairwise([0, *ends, len(text)])]


def _stands_alone(token: Added, others: Sequence[Added]) -> bool:
    """Whether a token is found at each place of its text: no other one contains its text, or ends in its beginning."""
    text = token.content
    if not token.special or token.normalized or token.lstrip or token.rstrip or token.single_word:
        return False
    starts = tuple(text[:length] for length in range(1, len(text) + 1))
    return not any(other.content != text and (text in other.content or other.content.endswith(starts)) for other in others)


def _cuts(token: str, encode: Encode) -> bool:
    """Whether the ids of a text with this token are those of its two parts."""
    pairs = [(before + token, after) for before in BEFORE for after in (*AFTER, token)]
    whole = encode([before + after for before, after in pairs])
    before, after = (encode([pair[side] for pair in pairs]) for side in (0, 1))
    return all(ids == [*one, *other] for ids, one, other in zip(whole, before, after, strict=True))

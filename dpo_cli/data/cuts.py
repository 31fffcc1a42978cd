"""The shortest cut of a prompt with which its row fits: found by trying, as a cut may change the tokens around it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from dpo_cli.data.encoded import Encoded
from dpo_cli.data.messages import Text

FIRST_STEP = 4  # characters from a guess to the next try
NEAR = 64  # characters, or tokens, after a cut that it may change


class Cut:
    """The cuts of a text of a row at its start, by their counts of characters."""

    def __init__(
        self,
        text: str,
        prompt: Callable[[str], Text],
        encode: Callable[[Text], Encoded],
        count: Callable[[Text, str], int],
        guess: int,
    ) -> None:
        """`prompt` is the prompt with a shorter text, `encode` makes the row with a prompt, and `count` counts the tokens of a
        prompt before a tail. About `guess` characters are cut."""
        self.text, self.most, self.prompt, self.count = text, len(text) - 1, prompt, count
        self.guess = min(guess, self.most)
        self.row = cache(lambda at: encode(prompt(text[at:])))

    def least(self, max_length: int) -> Encoded | None:
        """The row with the shortest cut that fits; None if none does.

        Two cuts differ in the tokens at the start only. So those are counted, and the row that is found is encoded as a whole:
        if it has another length than counted, all rows are.
        """
        found = _least(self.most, lambda at: self._length(at) <= max_length, self.guess)
        if found is not None and self.row(found).length == self._length(found):
            return self.row(found)
        return least_cut(self.most, self.row, max_length, self.guess)

    def _length(self, at: int) -> int:
        """The length of the row after a cut, by that of the guess."""
        if at == self.guess:
            return self.row(at).length
        end = self.text.find(" ", max(at, self.guess) + NEAR)
        tail = self.text[end:] if end >= 0 else ""
        here, there = (self.count(self.prompt(self.text[start:]), tail) for start in (at, self.guess))
        return self.row(self.guess).length + here - there


def least_cut(most: int, cut: Callable[[int], Encoded], max_length: int, guess: int | None = None) -> Encoded | None:
    """The row, cut by the smallest count in 0..most that fits; None if none does."""
    tried = cache(cut)
    found = _least(most, lambda count: tried(count).length <= max_length, guess)
    return None if found is None else tried(found)


def _least(most: int, fits: Callable[[int], bool], guess: int | None = None) -> int | None:
    """The smallest count in 0..most that fits (every larger one fits too); None if none does.

    By bisection, of the neighbourhood of the `guess` if there is one.
    """
    fits = cache(fits)
    low, high = 0, most + 1  # the smallest count that fits is in low..high; none fits if it is the end
    at, step = most if guess is None else min(guess, most), FIRST_STEP
    while low <= at < high:
        low, high = (low, at) if fits(at) else (at + 1, high)
        at = at - step if high == at else at + step
        step *= 4
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return high if high <= most else None

"""Near duplicates among pairs: MinHash signatures of rensa give candidates, and RapidFuzz confirms them.

A signature has 6 bands of 4 values. Two pairs are compared if they share a band, which happens with probability
1 - (1 - s^4)^6 for pairs whose sets overlap by s (Jaccard): 0.998 at 0.9, 0.05 at 0.3 (Leskovec, Rajaraman and Ullman, Mining
of Massive Datasets, section 3.4). The sets hold pairs of neighbouring words, since single words are the same everywhere.
Each pair keeps 60 bytes and a hash; the texts of compared pairs are read again.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Iterator
from itertools import groupby
from operator import add

from rapidfuzz import fuzz, utils

from dpo_cli.data.dataset import Dataset
from dpo_cli.data.findings import COMPARED, MOST_FILES, Finding, Limits, Seen
from dpo_cli.data.rows import Pair
from dpo_cli.errors import Problem

Place = tuple[str, int, int]  # file, line, and number of a pair in that line

BANDS, ROWS = 6, 4
CHUNK_WORDS = 200_000  # signatures are computed for about this many words at a time
MOST_COMPARED = 50_000  # maximum candidates: a set with more was written from a template


class NearDuplicates(Finding):
    """Pairs that are nearly the same as an earlier one in every text; `SeenBefore` finds exact copies."""

    code = "near-duplicates"
    reason = "nearly the same as an earlier pair"
    fix = "keep one of each, or the model trains on the same text repeatedly"

    def __init__(self, limits: Limits) -> None:
        super().__init__(limits)
        self.words: list[list[str]] = []  # words of the pairs without a signature yet
        self.bands = array("q")  # BANDS hashes a pair
        # Of each such pair (exact copies are not included): its line and file as one number, and its number in that line.
        self.places, self.numbers = array("q"), array("I")
        self.files: list[str] = []
        self.known: set[int] = set()
        self.waiting = self.in_line = 0
        self.line = -1

    def see(self, seen: Seen) -> None:
        pair = seen.pair
        if not self.files or self.files[-1] != pair.file:
            self.files.append(pair.file)
            self.line = -1
        self.in_line = self.in_line + 1 if pair.line == self.line else 0
        self.line = pair.line
        if (key := hash(seen.exact)) in self.known:
            return
        self.known.add(key)
        words = " ".join(_texts(seen)).split()
        self.words.append([*map(add, words, words[1:])] or words)
        self.places.append(pair.line * MOST_FILES + len(self.files) - 1)
        self.numbers.append(self.in_line)
        self.waiting += len(words)
        if self.waiting > CHUNK_WORDS:
            self._sign()

    def problems(self, data: Dataset) -> Iterator[Problem]:
        self._sign()
        candidates = self._candidates()
        texts = self._read_again(data, {self._place(index) for both in candidates for index in both})
        for index, earlier in sorted(candidates):
            seen, first = texts[self._place(index)], texts[self._place(earlier)]
            pair, limit = seen.pair, self.limits["near_duplicate"]
            near = all(fuzz.ratio(*both, score_cutoff=limit) > 0 for both in zip(_texts(seen), _texts(first), strict=True))
            is_noted = bool(self.rows[pair.file]) and self.rows[pair.file][-1] == pair.line
            if near and not is_noted and seen.same != first.same:
                self.note(pair, (first.pair.file, first.pair.line))
        self.rows = {file: lines for file, lines in self.rows.items() if lines}
        yield from super().problems(data)

    def _sign(self) -> None:
        if self.words:
            from rensa import RMinHash  # not needed for a config without rows

            for signature in RMinHash.digest_matrix_from_token_sets(self.words, BANDS * ROWS, 1).to_rows():
                self.bands.extend(hash(tuple(signature[start : start + ROWS])) for start in range(0, BANDS * ROWS, ROWS))
            self.words.clear()
            self.waiting = 0

    def _candidates(self) -> set[tuple[int, int]]:
        """(pair, first pair with the same band), by their numbers in `places`."""
        candidates: set[tuple[int, int]] = set()
        for band in range(BANDS):
            first: dict[int, int] = {}
            for index, value in enumerate(self.bands[band::BANDS]):
                if (earlier := first.setdefault(value, index)) != index and len(candidates) < MOST_COMPARED:
                    candidates.add((index, earlier))
        return candidates

    def _place(self, index: int) -> Place:
        line, file = divmod(self.places[index], MOST_FILES)
        return self.files[file], line, self.numbers[index]

    def _read_again(self, data: Dataset, wanted: set[Place]) -> dict[Place, Seen]:
        """The pairs at these places, read again unless they are in memory."""
        lines: dict[str, set[int]] = defaultdict(set)
        for file, line, _ in wanted:
            lines[file].add(line)
        found: dict[Place, Seen] = {}
        for (file, line), pairs in groupby(data.usable(lines), key=lambda row: (row.file, row.line)):
            for number, pair in enumerate(pairs):
                if (place := (file, line, number)) in wanted and isinstance(pair, Pair):
                    found[place] = Seen.of(pair)
        return found


def _texts(seen: Seen) -> Iterator[str]:
    return (utils.default_process(text[:COMPARED]) for text in (seen.prompt, seen.chosen, seen.rejected))

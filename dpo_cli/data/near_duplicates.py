"""Near duplicates among pairs: MinHash signatures of rensa give candidates, and RapidFuzz confirms them.

A signature has 6 bands of 4 values. Two pairs are compared if they share a band, which happens with probability
1 - (1 - s^4)^6 for pairs whose sets overlap by s (Jaccard): 0.998 at 0.9, 0.05 at 0.3 (Leskovec, Rajaraman and Ullman, Mining
of Massive Datasets, section 3.4). The sets hold pairs of neighbouring words, since single words are the same everywhere.
Each pair keeps 56 bytes and a hash; the texts of compared pairs are read again.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from itertools import pairwise

from rapidfuzz import fuzz, utils

from dpo_cli.data.dataset import Dataset
from dpo_cli.data.findings import COMPARED, Finding, Limits, Seen
from dpo_cli.data.rows import Pair
from dpo_cli.errors import Problem

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
        self.numbers = array("q")  # the number of each such pair in the pass; exact copies are not included
        self.known: set[int] = set()
        self.count = self.waiting = 0

    def see(self, seen: Seen) -> None:
        texts = _texts(seen)
        self.count += 1
        if (key := hash(seen.same)) in self.known:
            return
        self.known.add(key)
        words = " ".join(texts).split()
        self.words.append([f"{one} {other}" for one, other in pairwise(words)] or words)
        self.numbers.append(self.count - 1)
        self.waiting += len(words)
        if self.waiting > CHUNK_WORDS:
            self._sign()

    def problems(self, data: Dataset) -> Iterator[Problem]:
        self._sign()
        candidates = self._candidates()
        texts = self._read_again(data, {index for both in candidates for index in both})
        for index, earlier in sorted(candidates):
            (pair, mine), (first, before) = texts[index], texts[earlier]
            limit = self.limits["near_duplicate"]
            near = all(fuzz.ratio(one, other, score_cutoff=limit) > 0 for one, other in zip(mine, before, strict=True))
            if near and (not self.rows[pair.file] or self.rows[pair.file][-1] != pair.line):
                self.note(pair, (first.file, first.line))
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
        """(pair, first pair with the same band), by their numbers in the pass."""
        candidates: set[tuple[int, int]] = set()
        for band in range(BANDS):
            first: dict[int, int] = {}
            for index, value in enumerate(self.bands[band::BANDS]):
                if (earlier := first.setdefault(value, index)) != index and len(candidates) < MOST_COMPARED:
                    candidates.add((self.numbers[index], self.numbers[earlier]))
        return candidates

    def _read_again(self, data: Dataset, wanted: set[int]) -> dict[int, tuple[Pair, tuple[str, str, str]]]:
        """The pairs with these numbers and their texts, read again unless they are in memory."""
        if not wanted:
            return {}
        pairs = (row for row in data.usable() if isinstance(row, Pair))
        chosen = ((index, pair) for index, pair in enumerate(pairs) if index in wanted)
        return {index: (pair, _texts(Seen.of(pair, ""))) for index, pair in chosen}


def _texts(seen: Seen) -> tuple[str, str, str]:
    prompt, chosen, rejected = (utils.default_process(text[:COMPARED]) for text in (seen.prompt, seen.chosen, seen.rejected))
    return prompt, chosen, rejected

"""Findings about the quality of pairs, from the text of valid rows. A finding never stops a command.

Each finding is a class that sees every pair of one pass over the files and then yields its problems; `FINDINGS` in lint.py
lists them. Their limits are the option `quality` of config/schema.json.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from rapidfuzz import fuzz, utils

from dpo_cli.data.dataset import Dataset
from dpo_cli.data.files import about_rows, unit
from dpo_cli.data.messages import flat, said
from dpo_cli.data.rows import Pair, Rating, Row
from dpo_cli.data.text_features import (
    ABOUT_LANGUAGE,
    FREE_TEXT,
    MARKER_SIGNS,
    MARKERS,
    REFUSAL,
    auc,
    compiled,
    differ,
    plain,
    same_answer,
    script,
    words,
)
from dpo_cli.data.transcripts import turns_of
from dpo_cli.errors import Problem, Severity

Limits = Mapping[str, float]

MOST_FILES = 1 << 16  # of one dataset
COMPARED = 20_000  # characters of a text: the time of a comparison grows with their square


@dataclass(frozen=True)
class Seen:
    """A row with each text as one string; the answer of a rating is `chosen`, and there is no other."""

    pair: Row
    prompt: str
    chosen: str
    rejected: str

    @classmethod
    def of(cls, row: Row) -> Seen:
        first, *others = map(said, row.responses)
        return cls(row, flat(row.prompt), first, others[0] if others else "")

    @cached_property
    def exact(self) -> tuple[str, str, str]:
        """What is different for different pairs."""
        return self.pair.prompt_key, self.chosen, self.rejected

    @cached_property
    def same(self) -> tuple[str, str, str]:
        """The same without differences of case and spaces."""
        prompt, chosen, rejected = map(plain, self.exact)
        return prompt, chosen, rejected


class Finding:
    """Base of the findings: remembers the rows that it notes, and yields one problem per file."""

    code: str
    severity: Severity = "hint"
    reason: str
    fix: str

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.rows: dict[str, array[int]] = defaultdict(lambda: array("q"))
        self.examples: dict[str, tuple[int, str, int]] = {}  # by file, the first row with a partner, and the partner's place

    def see(self, seen: Seen) -> None:
        """Look at one pair."""

    def note(self, pair: Row, partner: tuple[str, int] | None = None) -> None:
        """Remember a row, and for the first row of a file the place of the earlier pair that it repeats."""
        self.rows[pair.file].append(pair.line)
        if partner is not None:
            self.examples.setdefault(pair.file, (pair.line, *partner))

    def problems(self, data: Dataset) -> Iterator[Problem]:
        """The problems, at the end of the pass."""
        for file, lines in self.rows.items():
            reason = self.reason
            if file in self.examples:
                line, other, place = self.examples[file]
                partner = f"{unit(file)} {place}" if other == file else f"{other}:{place}"
                reason += f" ({unit(file)} {line} is like {partner})"
            yield about_rows(self.severity, self.code, reason, self.fix, data.key, file, lines)

    def about_all(self, data: Dataset, message: str) -> Problem:
        """A problem of the whole set, not of rows."""
        return Problem(self.severity, self.code, message, self.fix, data.key, data.name)


class FewPairs(Finding):
    """dpo-strategy, "Best Practices": 500+ preference pairs recommended."""

    code, fix = "few-pairs", "add rows; until then, read each figure with its interval"

    def problems(self, data: Dataset) -> Iterator[Problem]:
        if 0 < data.pairs < self.limits["few_pairs"]:
            yield self.about_all(
                data, f"{data.pairs} {data.noun} are few; at least {self.limits['few_pairs']:g} are recommended"
            )


class FewPrompts(Finding):
    """dpo-strategy, "Best Practices": diverse prompts, covering various scenarios."""

    code, fix = "few-prompts", "add rows with other prompts"

    def problems(self, data: Dataset) -> Iterator[Problem]:
        most = self.limits["pairs_per_prompt"]
        if data.pairs >= 10 * most and data.pairs > most * data.prompts:
            few = f"{data.pairs} {data.noun} have only {data.prompts} different prompts"
            message = f"{few}; the documentation recommends diverse prompts"
            yield self.about_all(data, message)


class SeenBefore(Finding):
    """The same prompt and responses again: in the same order a copy, in the other order a wrong label."""

    code, reason = "repeated-pairs", "the same as an earlier pair, except for case and spaces"
    fix = "keep one of each: a repeated pair is trained on repeatedly"

    def __init__(self, limits: Limits) -> None:
        super().__init__(limits)
        self.other_order = Reversed(limits)
        self.files: list[str] = []
        # By prompt and both responses: the order and the place of the first such pair, as one number, to save memory.
        self.first: dict[int, int] = {}

    def see(self, seen: Seen) -> None:
        pair, (prompt, chosen, rejected) = seen.pair, seen.same
        order = chosen < rejected
        if not self.files or self.files[-1] != pair.file:
            self.files.append(pair.file)
        key = hash((prompt, *((chosen, rejected) if order else (rejected, chosen))))
        place = (pair.line * MOST_FILES + len(self.files) - 1) * 2 + order
        first = self.first.setdefault(key, place)
        if first == place:
            return
        line, file = first // 2 // MOST_FILES, self.files[first // 2 % MOST_FILES]
        if first % 2 == order:
            self.note(pair, (file, line))
        else:
            self.other_order.note_both(line, file, pair)

    def problems(self, data: Dataset) -> Iterator[Problem]:
        yield from super().problems(data)
        yield from self.other_order.problems(data)


class Reversed(Finding):
    """Pairs that `SeenBefore` saw in both orders."""

    code, severity = "reversed-preference", "warning"
    reason = "the same prompt and responses, with opposite preferences"
    fix = "decide which response is better, and delete the other row"

    def __init__(self, limits: Limits) -> None:
        super().__init__(limits)
        self.firsts: set[tuple[str, int]] = set()

    def note_both(self, line: int, file: str, pair: Row) -> None:
        if (file, line) not in self.firsts:
            self.firsts.add((file, line))
            self.rows[file].append(line)
        self.note(pair)


class RatedBefore(Finding):
    """The same answer to the same prompt again: with the same rating a copy, with the other one a wrong label."""

    code, reason = "repeated-ratings", "the same as an earlier rating, except for case and spaces"
    fix = "keep one of each: a repeated rating is trained on repeatedly"

    def __init__(self, limits: Limits) -> None:
        super().__init__(limits)
        self.contradicted = Contradicted(limits)
        self.first: dict[int, tuple[str, int, bool]] = {}  # by prompt and answer: the place and the rating

    def see(self, seen: Seen) -> None:
        rating = seen.pair
        assert isinstance(rating, Rating)
        own = (rating.file, rating.line, rating.is_good)
        file, line, is_good = first = self.first.setdefault(hash(seen.same), own)
        if first is own:
            return
        if is_good == rating.is_good:
            self.note(rating, (file, line))
        else:
            self.contradicted.note_both(line, file, rating)

    def problems(self, data: Dataset) -> Iterator[Problem]:
        yield from super().problems(data)
        yield from self.contradicted.problems(data)


class Contradicted(Reversed):
    """Answers that `RatedBefore` saw with both ratings."""

    code = "contradicting-ratings"
    reason = "the same answer to the same prompt, rated good and bad"
    fix = "decide which rating is right, and delete the other row"


class TooSimilar(Finding):
    """Responses too similar to choose between (dpo-strategy, "Bad Examples").

    One different word can make an answer wrong, so two answers must have the same words in the same order, except for fillers
    and words of the question. For a free text (a description, a letter) similarity is enough.
    """

    code, severity = "too-similar", "warning"
    reason = "chosen and rejected are nearly the same"
    fix = "write a rejected response that is clearly worse, or delete the row"

    def see(self, seen: Seen) -> None:
        if compiled(FREE_TEXT).search(seen.prompt):
            chosen, rejected = (utils.default_process(text[:COMPARED]) for text in (seen.chosen, seen.rejected))
            alike = fuzz.ratio(chosen, rejected, score_cutoff=self.limits["too_similar"]) > 0
        elif differ(seen.chosen.lower(), seen.rejected.lower()):
            return  # nearly always true, and cheaper to check
        else:
            alike = same_answer(words(seen.chosen), words(seen.rejected), set(words(seen.prompt)))
        if alike:
            self.note(seen.pair)


class LongerWins(Finding):
    """Whether the longer response is (nearly) always preferred: a model then learns to write more, or less.

    Lengths are in characters. The AUC is the probability that a random chosen response is longer than a random rejected one
    (Mann-Whitney's U over the product of the counts): 0.5 if length has no influence.
    """

    code, fix = "length-decides", "add pairs where the other length is better, or the model only learns length"

    def __init__(self, limits: Limits) -> None:
        super().__init__(limits)
        self.chosen, self.rejected = array("q"), array("q")

    def see(self, seen: Seen) -> None:
        self.chosen.append(len(seen.chosen))
        self.rejected.append(len(seen.rejected))

    @property
    def share(self) -> float:
        """The share of pairs whose chosen response is longer; a tie counts one half."""
        wins = sum((c > r) + (c == r) / 2 for c, r in zip(self.chosen, self.rejected, strict=True))
        return wins / max(1, len(self.chosen))

    @property
    def auc(self) -> float:
        return auc(self.chosen, self.rejected)

    def problems(self, data: Dataset) -> Iterator[Problem]:
        share, limit = self.share, self.limits["length_decides"]
        if len(self.chosen) >= self.limits["length_pairs"] and max(share, 1 - share) >= limit:
            which = "longer" if share > 0.5 else "shorter"
            wins = f"{max(share, 1 - share):.0%}"
            yield self.about_all(data, f"the {which} response is preferred in {wins} of pairs (AUC of length {self.auc:.2f})")


class OneSideRefuses(Finding):
    """Refusals that are (nearly) always on the same side: a model then learns to refuse always, or never."""

    code, fix = "refusals-on-one-side", "add pairs where a refusal is right, and pairs where it is wrong"

    def __init__(self, limits: Limits) -> None:
        super().__init__(limits)
        self.sides: dict[str, list[tuple[str, int]]] = {"chosen": [], "rejected": []}

    def see(self, seen: Seen) -> None:
        refusal = compiled(REFUSAL)
        refuses = [side for side, text in (("chosen", seen.chosen), ("rejected", seen.rejected)) if refusal.match(text)]
        if len(refuses) == 1:
            self.sides[refuses[0]].append((seen.pair.file, seen.pair.line))

    def problems(self, data: Dataset) -> Iterator[Problem]:
        side, other = sorted(self.sides, key=lambda name: -len(self.sides[name]))
        count, opposite = len(self.sides[side]), len(self.sides[other])
        if count < max(10, self.limits["refusals"] * data.pairs) or opposite > count / 10:
            return
        by_file: dict[str, list[int]] = defaultdict(list)
        for file, line in self.sides[side]:
            by_file[file].append(line)
        reason = f"only the {side} response refuses, {'never' if not opposite else 'almost never'} the other one"
        for file, lines in by_file.items():
            yield about_rows(self.severity, self.code, reason, self.fix, data.key, file, lines)


class ChatMarkers(Finding):
    """Texts that already went through a chat template: the model's template would be applied to them again."""

    code, severity, reason = "chat-markers", "warning", "the text holds markers of a chat template"
    fix = 'write the messages without the template, or write "use_chat_template": false'

    def see(self, seen: Seen) -> None:
        texts = [text for text in (seen.prompt, seen.chosen, seen.rejected) if any(sign in text for sign in MARKER_SIGNS)]
        if not texts:
            return
        is_split = isinstance(seen.pair.prompt, str) and bool(turns_of(seen.prompt))  # a transcript becomes messages
        markers = [marker for text in texts for marker in compiled(MARKERS).finditer(text)]
        if any(marker[4] is None or not is_split for marker in markers):
            self.note(seen.pair)


class OtherScript(Finding):
    """Prompts in one script (Latin, Cyrillic, Han) with a chosen response in another. Languages of one script are alike."""

    code, reason = "mixed-languages", "prompt and chosen response are in different scripts"
    fix = "check that the response is in the right language"

    def see(self, seen: Seen) -> None:
        if (seen.prompt.isascii() and seen.chosen.isascii()) or compiled(ABOUT_LANGUAGE).search(seen.prompt):
            return
        prompt, chosen = script(seen.prompt), script(seen.chosen)
        if prompt and chosen and prompt != chosen:
            self.note(seen.pair)


class Overlap:
    """Prompts of the evaluation set that are trained on; an observer of the dataset, and `eval_side` one of that set."""

    def __init__(self, is_trained: Callable[[str], bool] = lambda prompt_key: True) -> None:
        self.is_trained = is_trained  # whether a prompt of the dataset is on the training side
        self.trained: set[int] = set()
        self.rows: dict[str, list[int]] = defaultdict(list)
        self.eval_side = _EvalSide(self)

    def see(self, pair: Pair, prompt_key: str) -> None:
        if self.is_trained(prompt_key):
            self.trained.add(hash(plain(prompt_key)))

    def problems(self, key: str | None) -> Iterator[Problem]:
        """The rows that were trained on; `key` is the option that names their file."""
        fix = "delete these rows: figures on trained prompts measure memorisation"
        for file, lines in self.rows.items():
            yield about_rows("warning", "prompt-in-both", "the prompt is also in the training data", fix, key, file, lines)


class _EvalSide:
    def __init__(self, overlap: Overlap) -> None:
        self.overlap = overlap

    def see(self, pair: Row, prompt_key: str) -> None:
        if hash(plain(prompt_key)) in self.overlap.trained:
            self.overlap.rows[pair.file].append(pair.line)

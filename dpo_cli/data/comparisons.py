"""Rows with several responses, and a label, votes or scores that say which is better.

Longer than other modules: how labels, votes and scores of one row agree can only be told in one place.

response_a  response_b  winner             a label: a number, a letter, left or right, or the name of a column
response_1  response_2  preference         the whole file shows whether numbers count from 0 or from 1
answer_0    answer_1    score_0  score_1   a score for each; or votes (winner_model_a, winner_model_b)
responses   scores                         lists of the same length
completions                                objects with a text and a score or a rank

A label is found by its name: a usual one, or one with a word for better (gold_choice) and a value that names a response.
Scores are found by name too: `score_1` before `style_score_1`, and never a score where high is bad (toxicity).

A label makes a pair of the preferred response and each other one; scores make one pair of the best and the lowest. The names
show the columns, or `columns` does: {"responses": ["one", "two"], "preferred": "label", "labels": ["A", "B"]}.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from statistics import fmean
from typing import TypeGuard

from dpo_cli.data.columns import COMPLETIONS, PROMPTS, RANKS, SCORES, Columns, Row, asked
from dpo_cli.data.messages import BadRow
from dpo_cli.data.text_features import compiled

STEMS = frozenset(
    """response responses output answer completion generation candidate reply summary text ref conversation chat""".split()  # noqa: SIM905
)
DIALOGUES = ("conversation", "chat")  # they hold the prompt too
LISTS = (
    "responses",
    "completions",
    "generations",
    "answers",
    "outputs",
    "candidates",
    "summaries",
    "replies",
    "texts",
    "generated_responses",
)
LABELS = (
    "label",
    "labels",
    "preference",
    "preferred",
    "winner",
    "choice",
    "better_response_id",
    "better_response",
    "better",
    "best",
    "best_response",
    "chosen",
    "preferred_response",
    "overall_preference",
    "preference_strength",
    "human_preference",
    "selected",
    "vote",
    "verdict",
    "comparison",
)
SIGNED = ("overall_preference", "preference_strength")  # HelpSteer: below 0 the first is better, above 0 the second
PROMPT_NAMES = (*PROMPTS, "history", "context", "post", "article", "document", "info")
TEXT_KEYS = ("response", "text", "answer", "completion", "output", "content", "generation", "generated_text", "summary")
SCORE_KEYS = ("overall_score", "score", "rating", "reward", "rank", "votes", "fine-grained_score", "annotations")
LONGEST_NAME = 40  # maximum characters of a value that names a response
LETTERS = "abcdefgh"
NOUNS = "model response answer output option assistant system candidate completion choice text summary conversation".split()  # noqa: SIM905
LABEL_STUDIO = frozenset(["lead_time", "annotation_id"])  # columns of its tables
ORDINALS = (("left", "right"), ("first", "second"))
TIES = frozenset(
    [
        *("tie", "ties", "tied", "draw", "equal", "same", "both", "neither", "none", "tie (bothbad)", "both bad", "bothbad"),
        *("both good", "equally good", "equally bad", "about the same", "no preference", "unsure"),
    ]
)
_BETTER = (
    r"win|wins|winner|winning|prefer\w*|best|better|choice|choose|chosen|gold\w*|votes?|voted|picks?|picked|selected"
    r"|favou?r\w*|verdict|correct"
)
_WORSE = r"los[est]\w*|worse|worst|reject\w*|bad|least|less|not|non|dis\w*|un\w*|wrong|incorrect|inferior"
# For these a high score is bad.
_NO_MERIT = (
    r"toxic\w*|harm(?!less)\w*|unsafe\w*|risk\w*|bias\w*|hate\w*|offens\w*|violence|violations?|hallucinat\w*|loss|losses|errors?"
    r"|perplexity|ppl|penalty|lengths?|long\w*|short\w*|len|tokens?|words?|chars?|characters|verbos\w*|complex\w*|repetit\w*|distance|latency|time|cost"
)
_MEMBER = re.compile(r"(?P<stem>.*?)(?P<gap>[ _.-]?)(?P<which>\d{1,2}|[a-hA-H]|left|right|first|second)")


@dataclass(frozen=True, slots=True)
class Layout:
    """The columns of the responses of a row, and of the label or scores that say which is better."""

    prompt: tuple[str, ...]  # its columns; empty if the responses are conversations that start with it
    responses: tuple[str, ...]  # their columns, or one that holds a list
    label: str | None
    scores: tuple[str, ...]  # like responses; empty if the responses are objects with scores
    which: tuple[str, ...]  # the part of the column names that differs between the responses
    labels: tuple[tuple[str, ...], ...] = ()  # for each response the label values that mean it, then those of a tie
    start: int | None = None  # the number that means the first response

    @property
    def says(self) -> str:
        """A sentence that says how such rows are read."""
        what = " and ".join(self.responses)
        if self.label is None:
            by = " and ".join(self.scores) or "score or rank"
            return (
                f"scored responses: the one of {what} with the highest {by} is chosen, the lowest is rejected; ties are skipped"
            )
        if self.label in SIGNED:
            return f"comparisons: {self.label} below 0 prefers {self.responses[0]}, above 0 {self.responses[-1]}; 0 is skipped"
        names = self._names()
        if self.labels:
            means = ", ".join(f"{' or '.join(values)} means {name}" for values, name in zip(self.labels, names, strict=False))
        elif self.start is not None:
            means = ", ".join(f"{self.start + i} means {name}" for i, name in enumerate(names))
        else:
            means = f"the name or letter of one of {what}"
        each = "" if len(self.responses) == 2 else "; it makes a pair with each other response"
        return f"comparisons: {self.label} says which response is preferred ({means}){each}; ties are skipped"

    def _names(self) -> Sequence[str]:
        return self.responses if len(self.responses) > 1 else [f"{self.responses[0]}[{i}]" for i in range(2)]

    @property
    def reads(self) -> dict[str, str]:
        """The meaning of each column."""
        named = {**dict.fromkeys(self.responses, "response"), **dict.fromkeys(self.scores, "score")}
        return {**named, **({self.label: "label"} if self.label else {}), **dict.fromkeys(self.prompt, "prompt")}

    def rows(self, row: Row) -> list[Row]:
        """The pairs of a row in the documented form, or `BadRow`."""
        answers = self._answers(row)
        scores = self._scores(row)
        if self.label is not None:
            best = self._preferred(row, answers)
            others = [i for i in range(len(answers)) if i != best]
        else:
            scored = [i for i, score in enumerate(scores) if score is not None]
            if len(scored) < 2:
                raise BadRow("row-one-response", "fewer than two responses have a score")
            best = max(scored, key=lambda i: scores[i] or 0.0)
            others = [min(scored, key=lambda i: scores[i] or 0.0)]
            if scores[best] == scores[others[0]]:
                raise BadRow("row-tie", "all responses have the same score")
        own = self.reads.keys() - {"messages", "conversations"} if not self.prompt else self.reads.keys()
        base = {name: value for name, value in row.items() if name not in own}
        if self.prompt:
            base["prompt"] = prompt_of(row)
        return [{**base, "chosen": answers[best], "rejected": answers[i], **_pair_scores(scores, best, i)} for i in others]

    def _answers(self, row: Row) -> list[object]:
        """The responses of a row as texts or messages."""
        if len(self.responses) > 1:
            missing = [name for name in self.responses if name not in row]
            if missing:
                raise BadRow("row-missing-key", f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing")
            return [row[name] for name in self.responses]
        return [_text_within(value) for value in self._listed(row)]

    def _listed(self, row: Row) -> list[object]:
        """The list of responses of a row."""
        values = row.get(self.responses[0])
        if not isinstance(values, list):
            raise BadRow("row-wrong-type", f"{self.responses[0]} is {type(values).__name__}, not a list of responses")
        if len(values) < 2:
            raise BadRow("row-one-response", f"{self.responses[0]} holds fewer than two responses")
        return values

    def _scores(self, row: Row) -> list[float | None]:
        """A score for each response, higher is better; empty if the row has no scores."""
        if len(self.responses) == 1 and not self.scores:
            return [_score_within(value) if isinstance(value, Mapping) else None for value in self._listed(row)]
        if len(self.scores) > 1:
            return [_number(row.get(name), name) for name in self.scores]
        if not self.scores:
            return []
        values = row.get(self.scores[0])
        if not isinstance(values, list) or len(values) != len(self._answers(row)):
            raise BadRow("row-score", f"{self.scores[0]} is not a list with a score for each response")
        return [_number(value, self.scores[0]) for value in values]

    def _preferred(self, row: Row, answers: list[object]) -> int:
        """The position of the response that the label prefers, or that has the most votes."""
        assert self.label is not None
        value = row.get(self.label)
        if value is None or value == "" or value == []:
            raise BadRow("row-label", f'"{self.label}" does not say which response is preferred')
        votes = Counter(self._meant(vote, answers) for vote in (value if isinstance(value, list) else [value]))
        (best, most), *rest = votes.most_common()
        if best is None or (rest and rest[0][1] == most):
            raise BadRow("row-tie", "the label is a tie")
        return best

    def _meant(self, value: object, answers: list[object]) -> int | None:
        """The position that a value of the label means; None for a tie."""
        said = plain_value(value)
        for position, values in enumerate(self.labels):
            if said in values:
                return position if position < len(answers) else None
        if said in TIES:
            return None
        number = _integer(said)
        if self.label in SIGNED and number is not None:
            return None if number == 0 else int(number > 0)
        if not self.labels:
            named = self._named(said)
            if named is not None and named < len(answers):
                return named
            if number is not None or said in ("true", "false"):
                if self.start is None:
                    raise BadRow("row-label-unclear", self._unclear())
                if 0 <= number - self.start < len(answers) if number is not None else False:
                    return (number or 0) - self.start
            elif value in answers:
                return answers.index(value)
        raise BadRow("row-label", f'"{self.label}" has an unknown value', repr(value)[:60])

    def _unclear(self) -> str:
        one, other = self._names()[:2]
        return (
            f'the numbers of "{self.label}" may count from 0 or from 1, or be a scale, so they do not show which of {one} and '
            f"{other} they mean: "
            'write "columns": {"labels": [0, 1]} or {"labels": [1, 2]}, one value for each response '
            'in this order, or {"labels": [[1, 2], [4, 5], 3]}, several values for each, and one for ties'
        )

    def _named(self, said: str) -> int | None:
        """The position of a response by the name of its column or a part of it; else by its letter or side."""
        names = [plain_value(name) for name in self.responses] if len(self.responses) > 1 else []
        if said in names:
            return names.index(said)
        said = " ".join(re.split(r"[ _.-]+", said.strip("[]().")))
        *nouns, last = said.split(" ") if said else [""]
        if not all(noun in NOUNS for noun in nouns):
            return None
        if last in self.which and (nouns or not last.isdecimal()):
            return self.which.index(last)
        if any(which in LETTERS for which in self.which):
            return None
        return next((words.index(last) for words in (list(LETTERS), *ORDINALS) if last in words), None)

    @property
    def counts(self) -> bool:
        """Whether numbers in the label may count from 0 or from 1."""
        return self.label is not None and not self.labels and self.label not in SIGNED and self.start is None


def layout_of(row: Row, columns: Columns, more_labels: Sequence[str] = ()) -> Layout | None:
    """The layout of a row if it is a comparison; `more_labels` are columns of any name that may be the label."""
    stated = columns.get("responses") is not None
    responses, which = (_stated(columns["responses"]), ()) if stated else _family(row) or _list(row) or ((), ())
    if not responses:
        return None
    asking = asked(row, PROMPT_NAMES)
    is_dialogue = any(name.lower().startswith(DIALOGUES) for name in responses)
    if asking is None and not is_dialogue and not stated:
        return None
    prompt = asking[1] if asking is not None and not is_dialogue else ()
    scores = _stated(columns["scores"]) if "scores" in columns else _score_columns(row, responses, which)
    label = columns.get("preferred") or _label(row, responses, which, more_labels, search=not scores)
    labels = _labels(columns, label, responses)
    if label is None and not scores and not (len(responses) == 1 and _holds_scores(row.get(responses[0]))):
        if stated or _can_be_short(row, responses):
            raise _without_label(row, responses, which)
        return None
    start = columns.get("start") if label not in SIGNED else None
    if label is not None and label.endswith("_id") and which and which[0].isdecimal():
        start = int(which[0])  # PKU-SafeRLHF: the number in the name
    if label == "choice" and len(responses) == 1:
        start = 0  # summarize_from_feedback
    return Layout(prompt, responses, label, scores, which, labels, start)


def members_named(row: Row, values: Sequence[object]) -> tuple[str, ...] | None:
    """The different columns of responses that these values name; None if they are something else."""
    if any((isinstance(value, str) and len(value) >= LONGEST_NAME) or not isinstance(value, str | int) for value in values):
        return None
    own = tuple(name for name in map(str, values) if isinstance(row.get(name), str | list) and name not in PROMPT_NAMES)
    if len(set(own)) == len(values):  # columns named after the models that wrote them
        return own
    responses, which = _family(row) or ((), ())
    trial, said = Layout((), responses, None, (), which), [plain_value(value) for value in values]
    places = [which.index(one) if one in which else trial._named(one) for one in said]
    named = tuple(responses[place] for place in places if place is not None and place < len(responses))
    return named if len(set(named)) == len(values) else None


def start_of(layouts: Iterable[tuple[Layout, Row]]) -> int | None:
    """The number of the first response, by all labels of a file together.

    None if they do not show it, or if other numbers or fractions show that they are a scale.
    """
    numbers: set[int] = set()
    most, has_fractions = 2, False
    for layout, row in layouts:
        held = row.get(layout.responses[0])
        most = max(most, len(layout.responses), len(held) if len(layout.responses) == 1 and isinstance(held, Sized) else 0)
        value = row.get(layout.label or "")
        for vote in value if isinstance(value, list) else [value]:
            said = plain_value(vote)
            number = _integer(said)
            numbers |= {number} if number is not None else set()
            has_fractions |= number is None and _is_number(said)
    starts = [start for start in (0, 1) if numbers <= {*range(start, start + most)}]
    return starts[0] if numbers and len(starts) == 1 and not has_fractions else None


def prompt_of(row: Row) -> object:
    """The prompt of a comparison; for posts of TL;DR the prompt of OpenAI."""
    asking = asked(row, PROMPT_NAMES)
    prompt = asking[0] if asking is not None else None
    if isinstance(prompt, Mapping):
        if isinstance(prompt.get("full_text"), str):  # WebGPT
            return prompt["full_text"]
        if isinstance(prompt.get("post"), str):
            return f"SUBREDDIT: r/{prompt.get('subreddit')}\n\nTITLE: {prompt.get('title')}\n\nPOST: {prompt['post']}\n\nTL;DR:"
        if isinstance(prompt.get("article"), str):
            return f"Article: {prompt['article']}\n\nTL;DR:"
    return prompt


def plain_value(value: object) -> str:
    """A value of a label as text in one form: 1, 1.0 and "1" are the same, and true is not 1."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    said = " ".join(str(value).split()).casefold()
    return said[:-2] if re.fullmatch(r"-?\d+\.0", said) else said


def _integer(said: str) -> int | None:
    return int(said) if re.fullmatch(r"-?\d{1,4}", said) else None


def _stated(value: str | Sequence[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _labels(columns: Columns, label: str | None, responses: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    if "labels" in columns:
        return tuple(
            tuple(map(plain_value, entry)) if isinstance(entry, list) else (plain_value(entry),) for entry in columns["labels"]
        )
    if label == "labels" and responses[0].startswith("human_ref"):
        return ("1",), ("0",)  # SHP: 1 where the first is better
    return ()


def _family(row: Row) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """(columns, their numbers or letters) of responses with numbered names: response_1, response_2."""
    families: dict[tuple[str, str], dict[str, str]] = {}
    for name, value in row.items():
        member = _MEMBER.fullmatch(name)
        if member is None or not isinstance(value, str | list | Mapping) or value == []:
            continue
        stem, which = member["stem"].lower(), member["which"].lower()
        if re.split(r"[ _.-]", stem)[-1] in STEMS or (not stem and which in ORDINALS[0]):
            families.setdefault((stem, member["gap"]), {})[which] = name
    for members in families.values():
        for order in (LETTERS, *ORDINALS, [str(i) for i in range(20)], [str(i) for i in range(1, 20)]):
            which = tuple(order[: len(members)])
            if len(which) >= 2 and members.keys() == set(which):
                return tuple(members[name] for name in which), which
    return None


def _list(row: Row) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """The column that holds a list of responses: texts, messages or objects."""
    column = next((name for name in LISTS if isinstance(row.get(name), list)), None)
    return ((column,), ()) if column is not None else None


def _score_columns(row: Row, responses: tuple[str, ...], which: tuple[str, ...]) -> tuple[str, ...]:
    """The score columns of the responses: plain names first; None if several others are possible."""
    if len(responses) == 1:
        column = next((name for name in SCORES if isinstance(row.get(name), list)), None)
        return (column,) if column is not None else ()
    by_stem: dict[tuple[str, ...], dict[str, str]] = {}
    for name, value in row.items():
        member = _MEMBER.fullmatch(name)
        if member is not None and not isinstance(value, list | Mapping):
            words = tuple(re.split(r"[ _.-]", member["stem"].lower()))
            if any(word in SCORES for word in words) and not _has(words, _NO_MERIT):
                by_stem.setdefault(words, {})[member["which"].lower()] = name
        for response, place in zip(responses, which, strict=False):
            if name.startswith(response) and name[len(response) :].strip(" _.-").lower() in SCORES:
                by_stem.setdefault((), {})[place] = name
    whole = {words: members for words, members in by_stem.items() if which and set(which) <= members.keys()}
    plain = [words for words in whole if len(words) < 2] or [words for words in whole if "overall" in words]
    taken = plain[0] if plain else next(iter(whole)) if len(whole) == 1 else None
    return tuple(whole[taken][place] for place in which) if taken is not None else ()


def _words(name: str) -> list[str]:
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)]


def _has(words: Iterable[str], pattern: str) -> bool:
    return any(map(compiled(pattern).fullmatch, words))


def has_word(name: str, pattern: str) -> bool:
    """Whether one of the words of a column's name matches a pattern."""
    return _has(_words(name), pattern)


def says_worse(name: str) -> bool:
    """Whether a column has a name like a worse response."""
    return has_word(name, _WORSE)


def _asks_another_matter(name: str) -> bool:
    """Whether a question asks for the worse response, or for something that does not make one better."""
    return says_worse(name) or has_word(name, _NO_MERIT)


def says_better(name: str) -> bool:
    """Whether a column has a name like a better response, or like the label that names it."""
    return has_word(name, _BETTER) and not _asks_another_matter(name)


def _label(row: Row, responses: tuple[str, ...], which: tuple[str, ...], more: Sequence[str], search: bool) -> str | None:
    """The column that says which response is preferred: a question for it, a usual name, or the only question; else a column
    whose name has a word for better and whose value names a response. A value alone may name the worse or the first one."""
    questions = [name for name in more if name in row and name not in responses and not _asks_another_matter(name)]
    asking = [name for name in questions if says_better(name) or name in LABELS]
    usual = [name for name in LABELS if name in row and name not in responses and isinstance(row[name], str | int | float)]
    votes = {name: value[0] if isinstance(value := row[name], list) and value else value for name in questions}
    only = questions if len(more) == 1 else [*_naming(votes, responses, which)]
    label = next(iter((*asking, *usual, *(only if len(only) == 1 else ()))), None)
    if label is not None or len(responses) == 1 or not search:
        return label
    naming = _naming(row, responses, which).items()
    named = {name: place for name, place in naming if says_better(name) or _is_side(row, name)}
    return next(iter(named)) if len(set(named.values())) == 1 else None  # else they contradict


def _is_side(row: Row, name: str) -> bool:
    """Whether a column is an answer to "which is better" in a Label Studio table, where it may have any name."""
    return not LABEL_STUDIO.isdisjoint(row) and plain_value(row[name]) in ORDINALS[0] and not says_worse(name)


def _naming(row: Row, responses: tuple[str, ...], which: tuple[str, ...]) -> dict[str, int]:
    """The columns whose value names a response, and its position."""
    trial = Layout((), responses, None, (), which)
    places = {
        name: trial._named(plain_value(value))
        for name, value in row.items()
        if name not in responses and name not in PROMPT_NAMES and isinstance(value, str) and len(value) < LONGEST_NAME
    }
    return {name: place for name, place in places.items() if place is not None}


def _holds_scores(values: object) -> bool:
    return isinstance(values, list) and any(isinstance(value, Mapping) and _score_within(value) is not None for value in values)


def _can_be_short(row: Row, responses: tuple[str, ...]) -> bool:
    """Whether the responses are certainly those of a comparison that lacks its label."""
    return len(responses) > 1 and not any(name in row for name in (*COMPLETIONS, "text", "messages"))


def _without_label(row: Row, responses: tuple[str, ...], which: tuple[str, ...]) -> BadRow:
    what = " and ".join(responses)
    reason = f'no label, score or vote says which of {what} is preferred: name it with "columns": {{"preferred": ...}}'
    worse = next((name for name in _naming(row, responses, which) if says_worse(name)), None)
    if worse is not None and len(responses) == 2:
        labels = f'["{responses[1]}", "{responses[0]}"]'
        reason += f'; if "{worse}" names the worse one, write {{"preferred": "{worse}", "labels": {labels}}}'
    return BadRow("row-label", reason)


def _text_within(value: object) -> object:
    """A response of a list: a text, messages, or the text or messages inside an object."""
    if isinstance(value, Mapping) and "role" not in value and "from" not in value:
        value = next((value[key] for key in (*TEXT_KEYS, "messages") if value.get(key)), value)
    return value


def _score_within(value: Mapping[str, object]) -> float | None:
    """The score of an object; for annotations by aspect (UltraFeedback) the mean of the ratings."""
    name = next((key for key in SCORE_KEYS if value.get(key) not in (None, "N/A", "")), None)
    if name == "annotations":
        aspects = held.values() if isinstance(held := value[name], Mapping) else ()
        ratings = [aspect.get("Rating", aspect.get("rating")) for aspect in aspects if isinstance(aspect, Mapping)]
        numbers = [float(rating) for rating in ratings if _is_number(rating)]
        return fmean(numbers) if numbers else None
    return _number(value[name], name) if name is not None else None


def _is_number(value: object) -> TypeGuard[str | float]:
    return re.fullmatch(r"-?\d+(\.\d+)?([eE][-+]?\d+)?", str(value).strip()) is not None


def _number(value: object, name: str) -> float | None:
    """A score, higher is better; a rank is negated."""
    if value is None:
        return None
    if isinstance(value, bool) or (isinstance(value, str) and value.strip().lower() in ("true", "false")):
        return float(str(value).strip().lower() == "true")
    if not _is_number(value):
        raise BadRow("row-score", f'"{name}" is not a number', repr(value)[:40])
    words = re.split(r"[ _.-]", name.lower())
    return -float(value) if any(word in RANKS for word in words) else float(value)


def _pair_scores(scores: list[float | None], best: int, other: int) -> dict[str, float | None]:
    """The scores of a pair, to find labels that contradict them."""
    return {"score_chosen": scores[best], "score_rejected": scores[other]} if scores else {}

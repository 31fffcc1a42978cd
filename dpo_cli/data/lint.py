"""What a set of pairs says about itself: findings on sound rows, from their text alone. A finding never stops anything.

Each finding is one function that yields problems; `FINDINGS` at the end lists them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence

from dpo_cli.data.formats import Pair
from dpo_cli.data.reader import Dataset
from dpo_cli.errors import Problem, about_rows

Finding = Callable[[Dataset], Iterator[Problem]]

SUFFICIENT_PAIRS = 500  # dpo-strategy, "Best Practices": 500+ preference pairs recommended
PAIRS_A_PROMPT = 5  # on average; more than that, and a model sees the same prompts again and again


def few_pairs(data: Dataset) -> Iterator[Problem]:
    count = len(data.pairs)
    if 0 < count < SUFFICIENT_PAIRS:
        message = f"{count} pairs are few; {SUFFICIENT_PAIRS} and more are recommended"
        yield Problem(
            "hint", "few-pairs", message, "add pairs, and judge with eval_split what these teach", "dataset", data.file
        )


def few_prompts(data: Dataset) -> Iterator[Problem]:
    """dpo-strategy, "Best Practices": diverse prompts, covering various scenarios."""
    if len(data.pairs) >= PAIRS_A_PROMPT * 10 and len(data.pairs) > PAIRS_A_PROMPT * data.prompts:
        message = f"{len(data.pairs)} pairs share {data.prompts} prompts; the documentation advises diverse ones"
        yield Problem("hint", "few-prompts", message, "add pairs with other prompts", data.key, data.file)


def repeated_pairs(data: Dataset) -> Iterator[Problem]:
    first: dict[Hashable, Pair] = {}
    repeated = [pair.line for pair in data.pairs if first.setdefault(_key(pair), pair) is not pair]
    fix = "keep one of each: a repeated pair is trained on as often as it stands there"
    if repeated:
        reason = "the same as an earlier pair, word for word"
        yield about_rows("hint", "repeated-pairs", reason, fix, data.key, data.file, repeated)


def reversed_preferences(data: Dataset) -> Iterator[Problem]:
    """The same two responses to the same prompt, once in each order: one of the labels is wrong."""
    orders: dict[Hashable, dict[Hashable, list[int]]] = defaultdict(lambda: defaultdict(list))
    for pair in data.pairs:
        key = _key(pair)
        orders[key[0], frozenset(key[1:])][key].append(pair.line)
    lines = [line for both in orders.values() if len(both) > 1 for found in both.values() for line in found]
    fix = "decide which response is better, and delete the other row"
    if lines:
        reason = "the same prompt and responses, preferred in both orders"
        yield about_rows("warning", "reversed-preference", reason, fix, data.key, data.file, lines)


FINDINGS: Sequence[Finding] = (few_pairs, few_prompts, repeated_pairs, reversed_preferences)


def check(data: Dataset) -> list[Problem]:
    """Every problem that every finding finds."""
    return [problem for finding in FINDINGS for problem in finding(data)]


def overlap(train: Dataset, held_out: Dataset) -> Iterator[Problem]:
    """Prompts of the evaluation set that are trained on."""
    known = {pair.prompt_key for pair in train.pairs}
    lines = [pair.line for pair in held_out.pairs if pair.prompt_key in known]
    fix = f"delete them: on a prompt of {train.file} the figures show memory, not learning"
    if lines:
        yield about_rows("warning", "prompt-in-both", "the prompt is trained on too", fix, held_out.key, held_out.file, lines)


def _key(pair: Pair) -> tuple[str, str, str]:
    return pair.prompt_key, str(pair.chosen), str(pair.rejected)

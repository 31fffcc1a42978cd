"""One pass over the data of a config: its rows, their statistics, and all problems. No torch.

What was found in large files is kept in the user's cache: the next command on the same files reads it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import date
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_cli.config.config import Loaded
from dpo_cli.config.options import Config
from dpo_cli.config.schema import defaults, inner_defaults, names_where
from dpo_cli.data import findings
from dpo_cli.data.dataset import (
    Dataset,
    Observer,
    choices,
    epoch_pairs,
    is_held_out_prompt,
    read,
    sources_of,
    state_of,
    unreadable,
)
from dpo_cli.data.lengths import Lengths
from dpo_cli.data.lint import Quality
from dpo_cli.data.rating_balance import one_rating, unbalanced
from dpo_cli.data.rows import Rating, Row
from dpo_cli.data.sample import Sample
from dpo_cli.data.token_cache import key_of
from dpo_cli.errors import Problem, problem_of_json
from dpo_cli.models.model_files import CONFIG
from dpo_cli.models.source import ModelSource
from dpo_cli.plan import known_data
from dpo_cli.results.intervals import FEW_PROMPTS
from dpo_cli.storage.digests import sha256
from dpo_cli.storage.progress import working
from dpo_cli.strategies.row_kinds import KINDS
from dpo_cli.strategies.strategies import STRATEGIES

if TYPE_CHECKING:
    from dpo_cli.data.tokenizer import Tokenizer

MUCH_TOO_LONG = 0.1  # the share of pairs longer than max_seq_length that is reported
# Why no row is rendered.
OF_GGUF = "not shown, because a GGUF file's tokenizer is read when training starts; lengths are in characters"
OF_HUB = "not shown, because the tokenizer of {model} is read when training starts"
NO_TOKENIZER = "none, because the model's tokenizer.json cannot be read"
LARGE_BYTES = 1 << 20  # smaller data is examined, and tokenised, in a second
States = Mapping[str, tuple[int, int]]  # of files, by their paths: sizes and times of change
# Options that decide the findings, besides the limits of quality and the split.
DECIDING = ("strategy", "on_bad_rows", "columns", "max_seq_length", "use_chat_template")


@dataclass(frozen=True)
class Split:
    """The rows and prompts that are held out by the share `eval_split`."""

    share: float
    rows: int
    prompts: int


@dataclass(frozen=True)
class Data:
    """The rows to train on, and those of "eval_dataset" if it is given; `said` holds their statistics."""

    train: Dataset
    held_out: Dataset | None
    said: dict[str, Any]
    longest: int | None  # estimated tokens of the longest sequence
    split: Split
    unrendered: str  # why no row is rendered, if so

    @property
    def rendered_words(self) -> str:
        """The number of rows that went through the chat template and the tokenizer, or why none did."""
        if rendered := self.said["rendered"]:
            return f"{rendered} {self.train.noun}"
        return self.unrendered

    @property
    def held_out_words(self) -> str:
        """The number of held-out rows and prompts, and what decides it; empty if the config holds nothing out."""
        noun, split = self.train.noun, self.split
        if self.held_out is not None:
            rows, prompts, why = self.held_out.pairs, self.held_out.prompts, "eval_dataset"
        elif split.share:
            rows, prompts, why = split.rows, split.prompts, f"eval_split {split.share:g}"
        else:
            return ""
        few = f"; an interval needs {FEW_PROMPTS} prompts" if 0 < prompts < FEW_PROMPTS else ""
        return f"{rows} {noun} of {prompts} prompts ({why}){few}"

    def billed_words(self, max_length: int) -> str:
        """The length that the memory is billed for, where the data and not max_seq_length decide it; else empty."""
        if self.longest is None or self.longest >= max_length:
            return ""
        return f"memory is billed for rows of {self.longest} tokens, about the longest in this data"

    def rows(self, config: Config) -> Iterator[tuple[bool, Row]]:
        """Whether a row is held out, and the row: of two datasets, or of one that is split by prompt."""
        if self.held_out is not None:
            yield from self.train.divided(lambda row: False)
            yield from self.held_out.divided(lambda row: True)
            return
        seed = config.split_seed
        assert seed is not None  # the loader sets it
        yield from self.train.divided(lambda row: is_held_out_prompt(row.prompt_key, config.eval_split, seed))

    @property
    def states(self) -> States:
        """The states of all files."""
        return {**self.train.states, **(self.held_out.states if self.held_out is not None else {})}

    @property
    def count(self) -> int | None:
        """The number of rows to train on and held out; None where weights change it."""
        sets = [rows for rows in (self.train, self.held_out) if rows is not None]
        is_plain = all(source.weight == 1 for rows in sets for source in rows.sources)
        return sum(rows.pairs for rows in sets) if is_plain else None

    def require_unchanged(self) -> None:
        """`InvalidInput` if a file has changed since its rows were read."""
        for rows in filter(None, (self.train, self.held_out)):
            rows.require_unchanged()

    def to_json(self) -> dict[str, object]:
        return {**self.train.to_json(), **self.said, "held_out": self.held_out.to_json() if self.held_out else None}


@dataclass(frozen=True)
class Examined:
    """What a pass over the data found."""

    data: Data | None  # None without a dataset
    epoch_pairs: int  # the number of pairs in an epoch
    problems: list[Problem]

    def to_json(self) -> dict[str, Any]:
        """Without the rows and the sources."""
        assert self.data is not None
        sets = {
            key: rows and _counts(rows) for key, rows in (("dataset", self.data.train), ("eval_dataset", self.data.held_out))
        }
        data = {name: getattr(self.data, name) for name in ("said", "longest", "unrendered")}
        problems = [asdict(problem) for problem in self.problems]
        return {**sets, **data, "split": asdict(self.data.split), "epoch_pairs": self.epoch_pairs, "problems": problems}

    @classmethod
    def of_json(cls, found: Mapping[str, Any], given: Mapping[str, Any], columns: Any, states: States) -> Examined:
        """What an earlier command kept, for the same files, which were in these states before they were hashed."""
        sets: dict[str, Dataset] = {}
        for key, value in given.items():
            sources = sources_of(value)
            its_states = {source.path: states[source.path] for source in sources}
            own = {"sources": sources, "columns": columns, "key": key, "states": its_states, "kind": KINDS[found[key]["kind"]]}
            sets[key] = Dataset(**{**found[key], **own})
        said, longest, unrendered = (found[name] for name in ("said", "longest", "unrendered"))
        data = Data(sets["dataset"], sets.get("eval_dataset"), said, longest, Split(**found["split"]), unrendered)
        return cls(data, found["epoch_pairs"], [problem_of_json(problem) for problem in found["problems"]])


def _counts(rows: Dataset) -> dict[str, object]:
    return {name: getattr(rows, name) for name in ("name", "rows", "pairs", "prompts", "unusable", "read_as")} | {
        "kind": rows.kind.noun
    }


def examine(loaded: Loaded, model: ModelSource | None, wrong: set[str | None], rendered_rows: int) -> Examined:
    """Examine the data of a config. Keys in `wrong` are already reported."""
    values = {key: value for key, value in loaded.values.items() if key not in wrong}
    given = {key: values[key] for key in names_where(lambda option: option.place == "data") if values.get(key)}
    states = large_files(given)
    if states is None or loaded.config is None:
        return _examined(loaded.config, given, model, values, rendered_rows)
    key = _key(loaded.config, loaded.day, given, model, values, rendered_rows)
    if (found := known_data.recalled(key)) is not None:
        return Examined.of_json(found, given, values.get("columns"), states)
    examined = _examined(loaded.config, given, model, values, rendered_rows)
    is_sound = not any(problem.severity == "error" for problem in examined.problems)
    if examined.data and is_sound and examined.data.states == states:  # else a file has changed since it was hashed
        known_data.keep(key, examined.data.train.name, examined.to_json())
    return examined


def _key(
    config: Config,
    day: date | None,
    given: Mapping[str, Any],
    model: ModelSource | None,
    values: Mapping[str, Any],
    rendered_rows: int,
) -> str:
    """The name of what decides the findings."""
    deciding = {name: getattr(config, name) for name in DECIDING}
    return key_of(
        {
            "files": digests_of(given),
            "read": [problem.message for key, value in given.items() for problem in choices(value, key)],
            "values": {**deciding, "quality": _limits(values), "split": [config.eval_split, config.split_seed]},
            "model": model and [model.foundation, model.state],
            "rendered": [rendered_rows, (day or date.today()).isoformat() if rendered_rows else None],
        }
    )


def _limits(values: Mapping[str, Any]) -> dict[str, Any]:
    return {**inner_defaults("quality"), **values.get("quality", {})}


def large_files(given: Mapping[str, Any]) -> States | None:
    """The states of the files of the data; None if they are small, or one cannot be read."""
    if any(unreadable(value, key) for key, value in given.items()):
        return None
    states = {source.path: state_of(source.path) for value in given.values() for source in sources_of(value)}
    return states if sum(size for size, _ in states.values()) >= LARGE_BYTES else None


def digests_of(given: Mapping[str, Any]) -> dict[str, list[tuple[str, float, str]]]:
    """Path, weight and SHA-256 of each file of the data."""
    sources = {key: sources_of(value) for key, value in given.items()}
    paths = [Path(source.path) for of_key in sources.values() for source in of_key]
    with working("hashing the data", len(paths), "files"):
        hashed = {path: _digest(path, state_of(str(path))) for path in dict.fromkeys(paths)}
    return {key: [(one.path, one.weight, hashed[Path(one.path)]) for one in of_key] for key, of_key in sources.items()}


@cache
def _digest(path: Path, state: tuple[int, int]) -> str:
    """The SHA-256 of a file in this state: computed once in a process."""
    return sha256(path)


def _examined(
    config: Config | None, given: Mapping[str, Any], model: ModelSource | None, values: Mapping[str, Any], rendered_rows: int
) -> Examined:
    skip, columns = values.get("on_bad_rows") == "skip", values.get("columns")
    kind = STRATEGIES[str(values.get("strategy", defaults()["strategy"]))].rows
    quality, overlap, balance = (
        Quality(_limits(values), kind),
        findings.Overlap(),
        Balance(config),
    )
    lengths = Lengths(model.files.fast_tokenizer if model is not None else None)
    own = _tokenizer_of(model) if rendered_rows and model is not None else (None, None)
    sample, other_sample = Sample(*own, rendered_rows), Sample(*own, rendered_rows)
    observers: dict[str, list[Observer]] = {"dataset": [balance, lengths, sample]}
    judged = Balance(None)
    observers["eval_dataset"] = [overlap.eval_side, other_sample, judged]
    observers["dataset"] += [overlap] if "eval_dataset" in given else []
    observers["dataset"].append(quality)
    found: list[Problem] = []
    sets: dict[str, Dataset] = {}
    for key, value in given.items():
        sets[key] = read(value, skip, key, columns, observers[key], kind)
        found += sets[key].problems
    if "dataset" not in sets:
        return Examined(None, 0, found)
    said = {**quality.length_bias(), "length": lengths.to_json(values.get("max_seq_length", 0))}
    said["rendered"] = len(sample.rows)
    found += _length_problems(lengths, values.get("max_seq_length"), sets["dataset"].noun)
    unrendered = _why_unrendered(model) if model is not None else NO_TOKENIZER
    data = Data(sets["dataset"], sets.get("eval_dataset"), said, lengths.most_tokens, balance.split, unrendered)
    use_chat_template = values.get("use_chat_template", "auto")
    is_as_it_is = use_chat_template is False or not sample.is_chat  # then markers of a template are intended
    found += (
        problem for problem in quality.problems(data.train) if not (is_as_it_is and problem.code == findings.ChatMarkers.code)
    )
    found += sample.problems(use_chat_template, skip) + other_sample.problems(use_chat_template, skip)
    found += overlap.problems(data.held_out.key) if data.held_out is not None else balance.problems()
    found += _rating_problems(balance.ratings, judged.ratings if "eval_dataset" in sets else None, values)
    pairs = epoch_pairs(balance.train, data.train.sources)
    if balance.train and not pairs:
        message = f"with these weights none of the {balance.train.total()} {data.train.noun} is left to train on"
        found.append(Problem("error", "nothing-to-train", message, "increase the weights in dataset", "dataset"))
    return Examined(data, pairs, found)


def _rating_problems(
    ratings: Counter[tuple[bool, bool]], judged: Counter[tuple[bool, bool]] | None, values: Mapping[str, Any]
) -> Iterator[Problem]:
    """What is wrong with the numbers of good and bad answers to train on, and of those that are held out."""
    if not ratings:
        return
    trained = {is_good: ratings[False, is_good] for is_good in (True, False)}
    yield from one_rating(trained, "to train on", "dataset")
    held_out, key = ratings, "eval_split"
    is_held_out = True
    if judged is not None:
        held_out, key, is_held_out = judged, "eval_dataset", False
    yield from one_rating({is_good: held_out[is_held_out, is_good] for is_good in (True, False)}, "that are held out", key)
    yield from unbalanced(trained, values.get("desirable_weight", 1.0), values.get("undesirable_weight", 1.0))


def _why_unrendered(model: ModelSource) -> str:
    """Why no row can be rendered with the tokenizer of a model."""
    files = model.tokenizer_files
    if files.is_gguf:
        return OF_GGUF
    return NO_TOKENIZER if files.path.exists() else OF_HUB.format(model=model.foundation)


def _tokenizer_of(model: ModelSource) -> tuple[Tokenizer | None, int | None]:
    """The tokenizer of an adapter or else of its model, and the rows of the model's embedding."""
    try:
        rows = model.files.token_rows
    except (OSError, ValueError):  # reported as a problem of model_name
        return None, None
    if not model.files.has(CONFIG) or model.fault is not None:
        return None, None
    from dpo_cli.models.tokenizer_files import tokenizer_of  # late, because it imports jinja2

    return tokenizer_of(model.tokenizer_files), rows


def _length_problems(lengths: Lengths, max_length: int | None, noun: str) -> Iterator[Problem]:
    if max_length and (share := lengths.share_over(max_length)) >= MUCH_TOO_LONG:
        message = (
            f"about {share:.0%} of the {noun} are longer than max_seq_length {max_length}: their prompts are cut at the start, "
            "and they are skipped if a response alone is longer"
        )
        yield Problem("warning", "pairs-too-long", message, "increase max_seq_length, or use shorter rows", "max_seq_length")


class Balance:
    """Counts the pairs on both sides of the split; an observer of the pass over the dataset."""

    def __init__(self, config: Config | None) -> None:
        self.share, self.seed = (config.eval_split, config.split_seed or 0) if config else (0.0, 0)
        self.train: Counter[str] = Counter()  # by file
        self.held_out = 0
        self.held_out_prompts: set[int] = set()  # hashes
        self.ratings: Counter[tuple[bool, bool]] = Counter()  # whether a rated answer is held out, and whether it is good

    def see(self, row: Row, prompt_key: str) -> None:
        is_held_out = is_held_out_prompt(prompt_key, self.share, self.seed)
        if isinstance(row, Rating):
            self.ratings[is_held_out, row.is_good] += 1
        if is_held_out:
            self.held_out += 1
            self.held_out_prompts.add(hash(prompt_key))
        else:
            self.train[row.file] += 1

    @property
    def split(self) -> Split:
        return Split(self.share, self.held_out, len(self.held_out_prompts))

    def problems(self) -> Iterator[Problem]:
        if not self.share or not self.train.total() + self.held_out:
            return
        if not self.train:
            fix = "reduce eval_split, or add pairs with other prompts"
            yield Problem("error", "nothing-to-train", f"all {self.held_out} pairs are held out", fix, "eval_split")
        if not self.held_out:
            fix = "increase eval_split, or add pairs with other prompts"
            yield Problem("warning", "nothing-held-out", "no prompt is held out by this eval_split", fix, "eval_split")

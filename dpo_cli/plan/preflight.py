"""All checks of a config before torch is imported: config, data, model and hardware together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dpo_cli.config.config import Loaded
from dpo_cli.config.options import Config
from dpo_cli.config.schema import defaults, inner_defaults, names_where
from dpo_cli.data import findings
from dpo_cli.data.dataset import Dataset, Observer, epoch_pairs, is_held_out_prompt, read
from dpo_cli.data.lengths import Lengths
from dpo_cli.data.lint import Quality
from dpo_cli.data.prompts import Prompts, read_prompts, without_reference
from dpo_cli.data.rows import Row
from dpo_cli.data.sample import Sample
from dpo_cli.errors import DoesNotFit, Exit, InvalidInput, Problem
from dpo_cli.hardware.machine import Machine
from dpo_cli.models import checks, target_layers
from dpo_cli.models.model_files import CONFIG
from dpo_cli.models.source import ModelSource
from dpo_cli.plan import adapter_start
from dpo_cli.plan.feasibility import DOES_NOT_FIT, NO_ROOM, disk_problem, does_not_fit, hardware_problems
from dpo_cli.plan.plan import Plan, resolve
from dpo_cli.results.intervals import FEW_PROMPTS
from dpo_cli.strategies.row_kinds import DEMONSTRATIONS
from dpo_cli.strategies.strategies import STRATEGIES

if TYPE_CHECKING:
    from dpo_cli.data.tokenizer import Tokenizer

MUCH_TOO_LONG = 0.1  # the share of pairs longer than max_seq_length that is reported
# Why no row is rendered.
OF_GGUF = "not shown, because a GGUF file's tokenizer is read when training starts; lengths are in characters"
OF_HUB = "not shown, because the tokenizer of {model} is read when training starts"
NO_TOKENIZER = "none, because the model's tokenizer.json cannot be read"


@dataclass(frozen=True)
class Data:
    """The rows to train on, and those of "eval_dataset" if it is given; `said` holds their statistics."""

    train: Dataset
    held_out: Dataset | None
    said: dict[str, Any]
    longest: int | None  # estimated tokens of the longest sequence
    balance: Balance  # of the split by prompt
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
        noun, balance = self.train.noun, self.balance
        if self.held_out is not None:
            rows, prompts, why = self.held_out.pairs, self.held_out.prompts, "eval_dataset"
        elif balance.share:
            rows, prompts, why = balance.held_out, len(balance.held_out_prompts), f"eval_split {balance.share:g}"
        else:
            return ""
        few = f"; an interval needs {FEW_PROMPTS} prompts" if 0 < prompts < FEW_PROMPTS else ""
        return f"{rows} {noun} of {prompts} prompts ({why}){few}"

    def billed_words(self, max_length: int) -> str:
        """The length that the memory is billed for, where the data and not max_seq_length decide it; else empty."""
        if self.longest is None or self.longest >= max_length:
            return ""
        return f"memory is billed for rows of {self.longest} tokens, about the longest in this data"

    def sides(self, config: Config) -> tuple[Sequence[Row], Sequence[Row]]:
        """(train, held out): two datasets, or one split by prompt."""
        if self.held_out is not None:
            return self.train.load(), self.held_out.divided(lambda row: True)[1]
        seed = config.split_seed
        assert seed is not None  # the loader sets it
        return self.train.divided(lambda row: is_held_out_prompt(row.prompt_key, config.eval_split, seed))

    def require_unchanged(self) -> None:
        """`InvalidInput` if a file has changed since its rows were read."""
        for rows in filter(None, (self.train, self.held_out)):
            rows.require_unchanged()

    def to_json(self) -> dict[str, object]:
        return {**self.train.to_json(), **self.said, "held_out": self.held_out.to_json() if self.held_out else None}


@dataclass(frozen=True)
class Inspection:
    """The result of all checks before torch is imported: every problem, the data, and the plan if there is one."""

    problems: tuple[Problem, ...]
    data: Data | None
    plan: Plan | None

    @property
    def errors(self) -> tuple[Problem, ...]:
        return tuple(problem for problem in self.problems if problem.severity == "error")

    @property
    def only_misfit(self) -> bool:
        """Whether all errors are about the hardware."""
        return bool(self.errors) and all(problem.code in (DOES_NOT_FIT, NO_ROOM) for problem in self.errors)

    @property
    def exit_code(self) -> Exit:
        return Exit.DONE if not self.errors else Exit.UNFIT if self.only_misfit else Exit.INVALID

    def stricter(self, when: Callable[[Problem], bool]) -> Inspection:
        """The same with the selected warnings as errors."""
        stopped = [replace(p, severity="error") if p.severity == "warning" and when(p) else p for p in self.problems]
        return replace(self, problems=tuple(stopped))

    def require(self) -> tuple[Data, Plan]:
        """The data and the plan, or an exception with every problem."""
        if self.data is not None and self.plan is not None and not self.errors:
            return self.data, self.plan
        raise (DoesNotFit if self.only_misfit else InvalidInput)(self.problems)


def inspect(
    loaded: Loaded,
    machine: Machine,
    vram_gb: float | None = None,
    with_data: bool = True,
    with_fit: bool = True,
    rendered_rows: int = 0,
    keep_rows: bool = False,
    is_begun: bool = False,
) -> Inspection:
    """Check config, data, model and hardware together, so that one call reports every problem.

    Without `with_fit` the memory is not checked: a training checks it later, with the real lengths. Up to `rendered_rows` rows
    go through the chat template and the tokenizer; a training does that later with all rows, and keeps them (`keep_rows`). The
    plan of a started run (`is_begun`) keeps its decided values.
    """
    found = list(loaded.problems)
    wrong = {problem.key for problem in found if problem.severity == "error"}
    name = loaded.values.get("model_name") if "model_name" not in wrong else None
    model = ModelSource.of(name) if isinstance(name, str) else None
    strategy = STRATEGIES.get(str(loaded.values.get("strategy")))
    about_model = list(checks.problems(model, to_align=strategy is not None and strategy.aligns)) if model is not None else []
    found += map(loaded.placed, about_model)
    damaged = any(problem.severity == "error" for problem in about_model)
    data, pairs = None, 0
    if with_data:
        data, pairs, about_data = _read_data(loaded, model, wrong, rendered_rows, keep_rows)
        found += [problem if problem.file else loaded.placed(problem) for problem in about_data]
    plan = None
    draft = loaded.draft()
    if draft.config is not None and not damaged:
        longest = data.longest if data else None
        plan = resolve(draft, machine, vram_gb=vram_gb, longest=longest, is_resumed=is_begun, model=model)
        found += map(loaded.placed, hardware_problems(plan, machine, vram_gb))
        found += map(
            loaded.placed, adapter_start.problems(draft, model or plan.model, plan.run_dir)
        )  # with the names of the config
        found += map(loaded.placed, _model_problems(plan))
        if plan.config.lora_r and not plan.goes_on:
            found += map(loaded.placed, target_layers.problems(plan.config, plan.model, plan.model_label))
        found += map(loaded.placed, step_problems(plan, pairs))
        if with_fit and (misfit := does_not_fit(plan)) is not None:
            if vram_gb is None and not machine.gpus:  # a config for a GPU is often checked on a machine without one
                misfit = replace(misfit, severity="warning", stops_training=True)
            found.append(loaded.placed(misfit))
        if with_fit and vram_gb is None and (lack := disk_problem(plan)) is not None:
            found.append(loaded.placed(replace(lack, severity="warning", stops_training=True)))
    return Inspection(tuple(found), data, plan)


def inspect_prompts(loaded: Loaded, machine: Machine, path: str) -> tuple[Plan, Prompts, list[Problem]]:
    """Check config and prompts of an augmentation, without a dataset: the plan, the prompts, and the warnings."""
    draft = loaded.draft()
    inspection = inspect(draft, machine, with_data=False, with_fit=False).stricter(lambda problem: problem.stops_training)
    prompts = read_prompts(path, draft.values.get("columns"), draft.values.get("on_bad_rows") == "skip")
    found = [*inspection.problems, *prompts.problems]
    rank = inspection.plan.config.augment.get("rank") if inspection.plan else None
    if rank is None and not inspection.errors:
        fix = 'write for example "augment": {"rank": "shorter"}; docs/guides/augmentation.md lists all ranks'
        found.append(draft.placed(Problem("error", "rank-missing", '"augment" has no "rank"', fix, "augment")))
    if rank == "reference":
        found += without_reference(prompts, path)
    if inspection.plan is None or any(problem.severity == "error" for problem in found):
        raise InvalidInput(found)
    return inspection.plan, prompts, [problem for problem in found if problem.severity == "warning"]


def _read_data(
    loaded: Loaded, model: ModelSource | None, wrong: set[str | None], rendered_rows: int, keep_rows: bool
) -> tuple[Data | None, int, list[Problem]]:
    """The data of the config, the number of pairs in an epoch, and the problems of the data.

    Keys in `wrong` are already reported.
    """
    values = {key: value for key, value in loaded.values.items() if key not in wrong}
    given = {key: values[key] for key in names_where(lambda option: option.place == "data") if values.get(key)}
    skip, columns = values.get("on_bad_rows") == "skip", values.get("columns")
    is_sft = STRATEGIES[str(values.get("strategy", defaults()["strategy"]))].rows is DEMONSTRATIONS
    quality, overlap, balance = (
        Quality({**inner_defaults("quality"), **values.get("quality", {})}),
        findings.Overlap(),
        Balance(loaded.config),
    )
    lengths = Lengths(model.files.fast_tokenizer if model is not None else None)
    own = _tokenizer_of(model) if rendered_rows and model is not None else (None, None)
    sample, other_sample = Sample(*own, rendered_rows), Sample(*own, rendered_rows)
    observers: dict[str, list[Observer]] = {"dataset": [balance, lengths, sample]}
    observers["eval_dataset"] = [overlap.eval_side, other_sample]
    observers["dataset"] += [overlap] if "eval_dataset" in given else []
    observers["dataset"] += [quality] if not is_sft else []  # a demonstration has no second response to compare with
    found: list[Problem] = []
    sets: dict[str, Dataset] = {}
    for key, value in given.items():
        sets[key] = read(value, skip, key, columns, observers[key], is_sft, keep_rows)
        found += sets[key].problems
    if "dataset" not in sets:
        return None, 0, found
    said = {**({} if is_sft else quality.length_bias()), "length": lengths.to_json(values.get("max_seq_length", 0))}
    said["rendered"] = len(sample.rows)
    found += _length_problems(lengths, values.get("max_seq_length"), sets["dataset"].noun)
    unrendered = _why_unrendered(model) if model is not None else NO_TOKENIZER
    data = Data(sets["dataset"], sets.get("eval_dataset"), said, lengths.most_tokens, balance, unrendered)
    use_chat_template = values.get("use_chat_template", "auto")
    is_as_it_is = use_chat_template is False or not sample.is_chat  # then markers of a template are intended
    about_texts = () if is_sft else quality.problems(data.train)
    found += (problem for problem in about_texts if not (is_as_it_is and problem.code == findings.ChatMarkers.code))
    found += sample.problems(use_chat_template, skip) + other_sample.problems(use_chat_template, skip)
    found += overlap.problems(data.held_out.key) if data.held_out is not None else balance.problems()
    pairs = epoch_pairs(balance.train, data.train.sources)
    if balance.train and not pairs:
        message = f"with these weights none of the {balance.train.total()} {data.train.noun} is left to train on"
        found.append(Problem("error", "nothing-to-train", message, "increase the weights in dataset", "dataset"))
    return data, pairs, found


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


def _model_problems(plan: Plan) -> Iterator[Problem]:
    """Options of a config that the model does not support, by its shape."""
    config, model = plan.config, plan.model
    facts = model.facts
    if (stored := model.files.quantisation) is not None and not plan.merges:
        yield from stored.problems(plan.model_label, config.use_4bit, config.use_8bit, config.lora_r)
    if config.lora_r == 0 and model.files.is_mixture:
        message = "lora_r 0 also trains the routers of this mixture of experts, without the loss that balances its experts"
        fix = 'write "lora_r": 16: an adapter does not change the routers'
        yield Problem("hint", "router-unbalanced", message, fix, "lora_r")
    if facts is None:
        return
    context = facts.max_position_embeddings
    if context is not None and config.max_seq_length > context:
        message = f"{plan.model_label} supports {context} tokens, but max_seq_length is {config.max_seq_length}"
        stretches = config.provider == "unsloth"  # the positions: users of the adapter would load a different model
        fix = f'write "max_seq_length": {context}'
        yield Problem("warning", "beyond-context", message, fix, "max_seq_length", stops_training=stretches)


def _length_problems(lengths: Lengths, max_length: int | None, noun: str) -> Iterator[Problem]:
    if max_length and (share := lengths.share_over(max_length)) >= MUCH_TOO_LONG:
        message = (
            f"about {share:.0%} of the {noun} are longer than max_seq_length {max_length}: their prompts are cut at the start, "
            "and they are skipped if a response alone is longer"
        )
        yield Problem("warning", "pairs-too-long", message, "increase max_seq_length, or use shorter rows", "max_seq_length")


def step_problems(plan: Plan, pairs: int) -> Iterator[Problem]:
    """Problems of options for a step that the training, with this many pairs, never reaches."""
    config = plan.config
    steps = plan.steps_over(pairs)
    if not pairs or not plan.strategy.is_trained:
        return
    if config.eval_steps is not None and config.eval_steps > steps:
        message = f"eval_steps is {config.eval_steps}, but the training has {steps} steps: it is only evaluated at its end"
        yield Problem("warning", "never-evaluated", message, f'write "eval_steps": {max(1, steps // 4)}', "eval_steps")
    if plan.warmup_over(steps) >= steps:
        key = "warmup_steps" if config.warmup_steps else "warmup_ratio"
        value, fix = getattr(config, key), 'write "warmup_ratio": 0.1 instead'
        message = f"{key} is {value:g}, but the training has {steps} steps, so it never reaches its learning rate"
        if steps == 1:  # a warm-up starts at 0
            message = f"{key} is {value:g}, but the training has one step: its learning rate is 0, so nothing is trained"
            fix = f'write "{key}": 0, or train more steps'
        # transformers 5.17 divides the polynomial's decay by the number of steps after the warm-up.
        fails = config.lr_scheduler_type == "polynomial" and plan.warmup_over(steps) == steps
        yield Problem("error" if fails else "warning", "never-warm", message, fix, key)


class Balance:
    """Counts the pairs on both sides of the split; an observer of the pass over the dataset."""

    def __init__(self, config: Config | None) -> None:
        self.share, self.seed = (config.eval_split, config.split_seed or 0) if config else (0.0, 0)
        self.train: Counter[str] = Counter()  # by file
        self.held_out = 0
        self.held_out_prompts: set[int] = set()  # hashes

    def see(self, row: Row, prompt_key: str) -> None:
        if is_held_out_prompt(prompt_key, self.share, self.seed):
            self.held_out += 1
            self.held_out_prompts.add(hash(prompt_key))
        else:
            self.train[row.file] += 1

    def problems(self) -> Iterator[Problem]:
        if not self.share or not self.train.total() + self.held_out:
            return
        if not self.train:
            fix = "reduce eval_split, or add pairs with other prompts"
            yield Problem("error", "nothing-to-train", f"all {self.held_out} pairs are held out", fix, "eval_split")
        if not self.held_out:
            fix = "increase eval_split, or add pairs with other prompts"
            yield Problem("warning", "nothing-held-out", "no prompt is held out by this eval_split", fix, "eval_split")

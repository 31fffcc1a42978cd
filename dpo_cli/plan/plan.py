"""The plan: every value of a run with its source, the counts, and the estimated memory. No torch.

`plan.json` is written before the model is loaded, and again when the loaded model has decided how prompts are scored;
`dpo train plan.json` repeats the run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from dpo_cli.config.config import Source
from dpo_cli.config.division_rules import divides_weights
from dpo_cli.config.options import Config
from dpo_cli.config.rounds import FIRST
from dpo_cli.config.rules import compares_pairs
from dpo_cli.config.schema import names_where, options
from dpo_cli.config.stages import PLAN_VERSION, day_of
from dpo_cli.hardware import unsloth_support
from dpo_cli.hardware.machine import GIB
from dpo_cli.hardware.memory import Bill, EvaluationRoom, evaluation_room, freed_gb
from dpo_cli.hardware.memory_inputs import Longest, Settings, longest_sample
from dpo_cli.hardware.weights import block_bytes
from dpo_cli.models.source import CONTINUED, ModelSource
from dpo_cli.plan.cost import Cost, affordable_prompts, cost_of
from dpo_cli.strategies.strategies import STRATEGIES
from dpo_cli.strategies.strategy import Strategy


@dataclass(frozen=True)
class Counts:
    """Rows (pairs, or demonstrations) and tokens of a run, as measured with the model's own tokenizer."""

    train_pairs: int
    eval_pairs: int
    train_prompts: int
    eval_prompts: int
    cut: int  # pairs whose prompt was cut to max_seq_length
    too_long: int  # pairs skipped because a response alone exceeds it
    parted: int  # pairs whose prompt the template renders differently before a response
    bad_rows: int  # rows skipped because they are not pairs ("on_bad_rows": "skip")
    longest: int  # tokens of the longest sequence kept
    longest_at: str  # file:line of that pair
    longest_pair: int  # tokens of the longest pair kept, its prompt counted once
    longest_prompt: int  # tokens of the longest prompt to train on
    longest_responses: int  # maximum tokens of both responses of a pair together
    train_tokens: int  # of all sequences of an epoch, with prompts counted once per response
    shared_tokens: int  # the same, with each pair's prompt counted once
    digest: str  # of the token ids of all rows, in their order: "2-" (the way it is made) and a SHA-256
    writes_date: bool  # whether the chat template does


@dataclass(frozen=True)
class Scoring:
    """Whether each prompt goes through the model once for both responses, and the reason."""

    shared: bool
    why: str


@dataclass(frozen=True)
class Rounding:
    """The noise of a 16-bit run: log-ratios (policy against reference) that are rounding only. Root mean squares, nats."""

    response: float  # of a response
    pair: float  # of chosen minus rejected, the margin without beta

    def of_mean(self, pairs: int, beta: float) -> float:
        """The noise of the mean margin of this many pairs."""
        return beta * self.pair / math.sqrt(pairs)


@dataclass(frozen=True)
class Adapted:
    """The trained part of a model: the layers with an adapter, with their counts, and the number of weights."""

    layers: dict[str, int]
    trained: int  # number of trained weights
    weights: int  # number of weights of the model without the adapter
    notes: tuple[str, ...] = ()  # what is not trained, and the reason

    @property
    def words(self) -> str:
        by_count: dict[int, list[str]] = {}
        for name, count in self.layers.items():
            by_count.setdefault(count, []).append(name)
        kinds = [f"{', '.join(names)}: {count}{' each' if len(names) > 1 else ''}" for count, names in by_count.items()]
        share = f"{self.trained:,} weights, {self.trained / self.weights:.2%} of the model's"
        return "; ".join([*kinds, share]) if self.layers else f"every one of {self.weights:,} weights"

    def to_json(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != "notes"}


# The scoring by `prompt_sharing` before a model is loaded.
EXPECTED: dict[bool | str, Scoring] = {
    "auto": Scoring(True, "each prompt once, if the model supports it"),
    True: Scoring(True, "each prompt once"),
    False: Scoring(False, 'each prompt twice: "prompt_sharing" is false'),
}
ONE_RESPONSE = Scoring(False, "each row once: a prompt has one response")


def expected_scoring(config: Config) -> Scoring:
    """The scoring of a run, by its config."""
    if len(STRATEGIES[config.strategy].rows.responses) == 1:
        return ONE_RESPONSE
    if config.provider == "unsloth" and config.prompt_sharing is not False:
        return Scoring(False, f"each prompt twice: {unsloth_support.NO_SHARING}")
    return EXPECTED[config.prompt_sharing]


@dataclass(frozen=True)
class Plan:
    """A resolved run: device, precision, checkpointing and batch are decided.

    The loaded model decides how prompts are scored; until then `scoring` is the expected way.
    """

    config: Config
    model: ModelSource  # the model of model_name
    sources: dict[str, Source]
    counts: Counts | None
    memory: Bill | None
    scoring: Scoring
    notes: tuple[str, ...]
    day: date  # the day of the run, for a chat template; kept on --resume, and when the plan is repeated
    row_tokens: int = 0  # a row takes more pairs than a micro-batch names, up to this many tokens
    adapted: Adapted | None = None  # known from the model's architecture, before its weights are loaded
    rounding: Rounding | None = None  # measured before the first step; None in float32, and without a reference
    freed_gb: float | None = None  # what a step of the run frees, in an evaluation of it; its own bill may be another one

    def with_affordable_evaluation(self) -> Plan:
        """The plan with fewer held-out prompts to sample answers for, if the evaluations would take long."""
        if self.counts is None or not self.strategy.is_trained or not self.takes("kl_prompts"):
            return self
        prompts = affordable_prompts(self.config, self.counts, self.total_steps, self.strategy)
        config = self.config.replaced({"kl_prompts": prompts})
        sources: dict[str, Source] = (
            {**self.sources, "kl_prompts": "measured"} if prompts < self.config.kl_prompts else self.sources
        )
        return replace(self, config=config, sources=sources)

    @property
    def cost(self) -> Cost:
        assert self.counts is not None
        return cost_of(self.config, self.counts, self.total_steps, self.strategy)

    def with_adapted(self, adapted: Adapted | None) -> Plan:
        """The plan with the trained part of the model."""
        return replace(self, adapted=adapted, notes=(*self.notes, *(adapted.notes if adapted else ())))

    def with_rounding(self, rounding: Rounding | None) -> Plan:
        """The plan with the measured noise of its dtype."""
        if rounding is None:
            return self
        reward, margin = (self.config.beta * nats for nats in (rounding.response, rounding.pair))
        words = f"rounding: {self.dtype} moves the reward of a response by about {reward:.2g}, a margin by {margin:.2g}"
        return replace(self, rounding=rounding, notes=(*self.notes, words))

    @property
    def run_dir(self) -> Path:
        assert self.config.output_dir is not None  # resolve() sets it
        return Path(self.config.output_dir)

    @property
    def writes_date(self) -> bool:
        """Whether the chat template writes the date, so that the rows depend on the day."""
        return self.counts is not None and self.counts.writes_date

    @property
    def goes_on(self) -> bool:
        """Whether the adapter in model_name is trained further."""
        return self.config.reference in CONTINUED

    @property
    def starts_at_reference(self) -> bool:
        """Whether the policy is its reference before the first step; else the reference is the model with the adapter off."""
        return self.config.reference != FIRST

    @property
    def merges(self) -> bool:
        """Whether the adapter in model_name is merged into its base first."""
        return not self.goes_on and self.model.adapter is not None

    @property
    def noun(self) -> str:
        """The word for its rows."""
        return self.strategy.rows.noun

    @property
    def strategy(self) -> Strategy:
        return STRATEGIES[self.config.strategy]

    def takes(self, option: str) -> bool:
        """Whether the strategy uses an option of the config."""
        return self.config.strategy in options()[option].strategies

    @property
    def model_label(self) -> str:
        """The model's name without the folder of a local one."""
        return Path(self.config.model_name).name if Path(self.config.model_name).is_absolute() else self.config.model_name

    def row_budget(self, longest: int) -> int:
        """Tokens of a row at most, where `longest` are those of the longest pair: a micro-batch of such, or `row_tokens`."""
        return max(self.row_tokens, self.config.per_device_train_batch_size * longest)

    @property
    def fills_rows(self) -> bool:
        """Whether the pairs of a step are divided into rows by their tokens, and not by micro-batches."""
        return not compares_pairs(self.config)

    @property
    def processes(self) -> int:
        """Processes that share the rows of each step."""
        return int(self.config.num_processes)

    @property
    def is_divided(self) -> bool:
        """Whether the frozen weights are shards of several processes, or wait in the RAM (providers/sharding.py)."""
        return divides_weights(self.config.to_json())

    @property
    def held_words(self) -> str:
        """What each process holds."""
        return "a part of each block of the model" if self.is_divided else "the whole model"

    @property
    def moved_bytes(self) -> float | None:
        """Bytes of the blocks, which go to the device each time they run, if the weights are divided."""
        facts = self.model.facts
        return block_bytes(facts, Settings.of(self.config, facts, Longest())) if facts is not None else None

    @property
    def pairs_a_step(self) -> int:
        return self.config.per_device_train_batch_size * self.config.gradient_accumulation_steps

    @property
    def predicted_gb(self) -> float | None:
        """The estimated peak memory of torch: on a GPU without the context and the allocator's slack, on a CPU the whole
        process."""
        if self.memory is None:
            return None
        if self.config.device != "cuda":
            return round(self.memory.host_gb, 3)
        overhead = sum(self.memory.components.get(name, 0.0) for name in ("cuda_context", "allocator_slack"))
        return round(self.memory.total_gb - overhead / GIB, 3)

    def evaluation_room(self, bytes_per_value: int) -> EvaluationRoom | None:
        """The memory of an evaluation with so many bytes per value; None if the memory of this model is unknown.

        By the bill as plan.json has it, so that `dpo eval` draws answers in the batches of the training.
        """
        facts, config = self.model.facts, self.config
        if facts is None or self.memory is None:
            return None
        freed = self.freed_gb if self.freed_gb is not None else freed_gb(self.memory.to_json()["components"])
        own = 4 if self.dtype == "float32" else 2
        packs_head = config.device == "cpu" and self.dtype == "bfloat16"  # while answers are sampled
        is_quantised = config.use_4bit or config.use_8bit
        return evaluation_room(facts, freed * GIB, bytes_per_value, bytes_per_value > own or packs_head, is_quantised)

    @property
    def dtype(self) -> str:
        """The compute dtype by torch's name."""
        return "bfloat16" if self.config.bf16 else "float16" if self.config.fp16 else "float32"

    @property
    def longest_unit(self) -> int:
        """Tokens of the longest unit of training: of a pair or a demonstration, or of a prompt with the longest sample."""
        assert self.counts is not None
        if self.strategy.generates:
            return longest_sample(self.config, self.counts.longest_prompt)
        return self.counts.longest_pair if self.scoring.shared else self.strategy.sequences * self.counts.longest

    @property
    def prompts_a_step(self) -> int:
        """Prompts of a step that samples answers; the samples are as many as the pairs of another training's step."""
        return max(1, self.pairs_a_step // self.config.num_generations)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        assert self.counts is not None
        return self.steps_over(self.counts.train_prompts if self.strategy.generates else self.counts.train_pairs)

    def steps_over(self, units: int) -> int:
        """Optimizer steps for this many pairs, as Trainer counts: a last incomplete group of micro-batches is a step too.

        For a strategy that samples answers the units are prompts, and each batch of samples is used for `num_iterations` steps.
        """
        if self.config.max_steps is not None:
            return self.config.max_steps
        if self.strategy.generates:
            steps = math.ceil(units / self.prompts_a_step) * self.config.num_iterations
        else:
            batches = math.ceil(units / self.config.per_device_train_batch_size)
            steps = math.ceil(batches / self.config.gradient_accumulation_steps)
        return math.ceil(self.config.num_train_epochs * steps)

    def warmup_over(self, steps: int) -> int:
        """Warm-up steps among this many steps, as Trainer counts; the first of them has a rate of 0."""
        if self.config.lr_scheduler_type == "constant":
            return 0
        return self.config.warmup_steps or math.ceil(steps * self.config.warmup_ratio)

    @property
    def ends_in_warmup(self) -> bool:
        """Whether the training ends before the learning rate is reached."""
        return self.warmup_over(self.total_steps) >= self.total_steps

    def to_json(self) -> dict[str, object]:
        return {
            "plan_version": PLAN_VERSION,
            "config": self.config.to_json(),
            "sources": self.sources,
            "counts": vars(self.counts) if self.counts else None,
            "memory": self.memory.to_json() if self.memory else None,
            "scoring": vars(self.scoring),
            "row_tokens": self.row_tokens,
            "day": self.day.isoformat() if self.writes_date else None,
            "adapted": self.adapted.to_json() if self.adapted else None,
            "rounding": vars(self.rounding) if self.rounding else None,
            "notes": list(self.notes),
        }


# Options that the machine decides, not the user or a default.
MEASURED = frozenset(names_where(lambda option: option.is_decided))
ON_DEVICE = names_where(lambda option: option.is_decided and option.is_judging)  # the device and its precision


@dataclass(frozen=True)
class Decided:
    """The values that a run decided at its start, by its plan.json. It resumes and is evaluated with them."""

    values: Mapping[str, object]  # of the options that its config did not set
    scoring: Scoring
    row_tokens: int
    day: date | None  # if the chat template writes it
    rounding: Rounding | None = None
    freed_gb: float | None = None  # None for a model whose memory is unknown

    @classmethod
    def of(cls, plan: Mapping[str, Any]) -> Decided:
        """Those of a plan.json; `ValueError` for one that no run wrote."""
        try:
            config, sources = plan["config"], plan["sources"]
            values = {name: config[name] for name in MEASURED if sources.get(name) == "measured"}
            rounding = Rounding(**plan["rounding"]) if plan.get("rounding") else None  # older plans have none
            freed = freed_gb(plan["memory"]["components"]) if plan["memory"] else None
            return cls(values, Scoring(**plan["scoring"]), plan.get("row_tokens", 0), day_of(plan), rounding, freed)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"it is not a plan of a run: {error}") from error

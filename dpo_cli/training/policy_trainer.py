"""TRL's RLOOTrainer and GRPOTrainer as dpo uses them; the shared part of all trainers is in trainer.py.

A step of B samples: B / G prompts, G answers to each, their rewards, and one optimizer step on the samples, in rows:

    prompts -> sample (evaluation/generation.py) -> log-probs of policy and reference -> rewards -> advantages -> loss
               overridden                           overridden                          given      TRL           TRL

What is overridden, and why (tests/test_rlhf.py fails if TRL changes any of it):
- `_tokenize_prompts`: a prompt comes as its token ids, which are those of the pairs.
- `_generate_single_turn`: dpo's sampling, which is that of an evaluation and follows torch's random state only.
- `training_step`: TRL requires the number of items, which a probe of the longest batch does not have.
- `_get_per_token_logps_and_entropies`: TRL pads prompts on the left, which moves learned positions. Here a row is padded on
  the right, as in an evaluation. Without a gradient it goes in rows of a training step's size.
- `_prepare_inputs`: TRL counts its own micro-batches, which are rows here, and forgets the samples in a checkpoint. Here the
  step of the training decides when samples are drawn, and a checkpoint holds those that are used again.
- `_get_train_sampler`: TRL's sampler has a random generator of its own, whose state no checkpoint holds, and drops the last
  prompts of an epoch. This one takes its order from torch's state at the start of the epoch, and fills up the last step.
- `compute_loss`: TRL's RLOO loss is the mean over a micro-batch; here a row is its share of the step. Its figures are read.
- `log`: TRL's own averages are dropped: a resumed training would not have them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle, islice
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from dpo_cli.data.encoded import EncodedRows
from dpo_cli.data.rows import Question
from dpo_cli.evaluation.bootstrap import Array
from dpo_cli.evaluation.generation import Answer, Rank, Sampling, answers
from dpo_cli.plan.plan import Plan
from dpo_cli.plan.tokenized import SampledPrompt
from dpo_cli.scoring import forward
from dpo_cli.scoring.lm_head import ENTROPY, LOG_PROBS
from dpo_cli.scoring.packing import Batch, filled
from dpo_cli.scoring.shared_prompts import IGNORED
from dpo_cli.storage.log import Tell
from dpo_cli.storage.world import ALONE, World
from dpo_cli.strategies.figures import SAMPLE_FIGURES
from dpo_cli.training.trainer import (
    SIZE,
    CarefulTrainer,
    Evaluate,
    Totals,
    adapter_weights,
    common_arguments,
    of_process,
    ready,
)

FIGURES = ("loss", *SAMPLE_FIGURES)
# TRL's names in a batch of samples.
ADVANTAGES, ITEMS, OLD_SUMS, OLD_TOKENS = "advantages", "num_items_in_batch", "old_logps", "old_per_token_logps"
PROMPTS, ANSWERS = ("prompt_ids", "prompt_mask"), ("completion_ids", "completion_mask")
REFERENCE, REWARD, SPREAD, LENGTH, CORRELATION = "reference_sums", "rewards", "spreads", "lengths", "correlations"  # dpo's


class SampleRewards:
    """A reward function of TRL: the rewards of a batch of samples, with the `group` samples of each prompt together."""

    def __init__(self, rank: Rank, questions: Sequence[Question], group: int) -> None:
        self.rank, self.questions, self.group = rank, questions, group
        self.answers: list[Answer] = []  # the samples, set where they are drawn: TRL hands on only their texts
        self.rewards = np.zeros(0)

    def __call__(self, question: Sequence[int], **_: object) -> list[float]:
        """`question` are the places of the questions, one for each sample."""
        rewards: list[float] = []
        for start in range(0, len(self.answers), self.group):
            rewards += self.rank(self.questions[question[start]], self.answers[start : start + self.group])
        self.rewards = np.array(rewards)
        return rewards

    @property
    def lengths(self) -> Array:
        """Tokens of the samples without their end token, (B,)."""
        return np.array([float(answer.tokens) for answer in self.answers])

    @property
    def spreads(self) -> Array:
        """The standard deviation of the rewards in the group of each sample, (B,)."""
        spreads: Array = self.rewards.reshape(-1, self.group).std(axis=1).repeat(self.group)
        return spreads

    @property
    def correlation(self) -> float:
        """Pearson's correlation of rewards and lengths, each minus the mean of its group; 0 where one of them is constant."""
        one, other = (
            (values.reshape(-1, self.group) - values.reshape(-1, self.group).mean(axis=1, keepdims=True)).ravel()
            for values in (self.rewards, self.lengths)
        )
        size = float(np.sqrt((one**2).sum() * (other**2).sum()))
        return float((one * other).sum()) / size if size else 0.0


class GroupSampler(Sampler[int]):
    """The order of an epoch: each prompt `group` times, the prompts of a step `uses` times, and the last step filled up."""

    def __init__(self, prompts: int, a_step: int, group: int, uses: int) -> None:
        self.prompts, self.a_step, self.group, self.uses = prompts, a_step, group, uses

    def __len__(self) -> int:
        return -(-self.prompts // self.a_step) * self.a_step * self.group * self.uses

    def __iter__(self) -> Iterator[int]:
        seed = int(torch.empty((), dtype=torch.int64).random_().item())  # as torch's RandomSampler
        order = torch.randperm(self.prompts, generator=torch.Generator().manual_seed(seed)).tolist()
        for start in range(0, self.prompts, self.a_step):
            own = [order[place % self.prompts] for place in range(start, start + self.a_step)]
            for _ in range(self.uses):
                yield from (prompt for prompt in own for _ in range(self.group))


class SampledTrainer(CarefulTrainer):
    """dpo's part of both trainers."""

    SEQUENCES_PER_UNIT = 1
    OUTPUTS = (LOG_PROBS, ENTROPY)
    IS_MEAN: ClassVar[bool]  # whether TRL's loss is the mean over the samples of a row, not their sum over all tokens of a step

    state: Any
    processing_class: Any
    num_generations: int
    num_iterations: int
    _metrics: Any
    rewards: SampleRewards
    plan: Plan
    samples: Batch | None = None  # of the last step that drew them
    _scored: tuple[Tensor, Tensor]  # the last log-probs and entropies, both (rows, tokens)

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler[int]:
        return GroupSampler(
            len(dataset or self.train_dataset), self.plan.prompts_a_step, self.num_generations, self.num_iterations
        )

    def _tokenize_prompts(self, prompts: list[list[int]]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return prompts, None, {}

    def sample(self, prompt_ids: Sequence[Sequence[int]]) -> list[list[int]]:
        """An answer to each prompt, as token ids, drawn from the policy; kept for the rewards, which TRL asks for next."""
        plan, trains = self.plan, self.model.training
        sampling = Sampling(plan.config.max_new_tokens, self.temperature)
        dtype = getattr(torch, plan.dtype)
        room = plan.evaluation_room(dtype.itemsize)
        network, world = self.policy.network, self.world
        self.rewards.answers = answers(network, self.processing_class, prompt_ids, sampling, dtype, room, world=world)
        self.model.train(trains)
        return [list(answer.ids) for answer in self.rewards.answers]

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        *_: object,
        **__: object,
    ) -> tuple[Tensor, Tensor, None]:
        """Log-probs and entropies of the last `logits_to_keep` tokens of padded rows, both (rows, tokens), zero at padding."""
        is_answer = attention_mask.clone().bool()
        is_answer[:, :-logits_to_keep] = False
        order = attention_mask.argsort(dim=1, descending=True, stable=True)  # all padding to the right
        ids, mask, is_scored = (values.gather(1, order) for values in (input_ids, attention_mask, is_answer))
        labels = ids.masked_fill(~is_scored, IGNORED)
        trains, lengths = torch.is_grad_enabled(), mask.sum(dim=1).tolist()
        by_length = sorted(range(len(ids)), key=lambda row: -lengths[row])
        parts = [by_length] if trains else filled(by_length, lambda part: len(part) * lengths[part[0]] <= self.row_budget)
        kept = is_answer[:, -logits_to_keep:]
        wide = torch.promote_types(torch.float32, next(model.parameters()).dtype)
        scored = [torch.zeros(kept.shape, dtype=wide, device=ids.device) for _ in range(2)]
        for part in parts:
            width = lengths[part[0]]
            with self.accelerator.autocast():
                row = {"input_ids": ids[part, :width], "attention_mask": mask[part, :width], "labels": labels[part, :width]}
                output = model(**row, fused_lm_head=True)
            for whole, values in zip(scored, (output.log_probs, output.entropy), strict=True):
                placed = whole.new_zeros(kept[part].shape).masked_scatter(kept[part], values[output.label_mask].to(wide))
                whole[part] = placed
        self._scored = scored[0], scored[1]
        return scored[0], scored[1], None

    def _prepare_inputs(self, inputs: Any) -> Batch:
        """The samples of a step, drawn for the prompts `inputs`, or used again; a row of them as it is."""
        if isinstance(inputs, Mapping):
            return inputs
        if self.samples is None or self.state.global_step % self.num_iterations == 0:
            self.samples = self._drawn(inputs)
        return self.samples

    def _drawn(self, prompts: list[dict[str, Any]]) -> Batch:
        """Samples for these prompts as TRL makes them, with what the figures of a step need."""
        trainer: Any = self
        drawn: dict[str, Tensor] = trainer._generate_and_score_completions(prompts)
        rewards, like = self.rewards, drawn[ADVANTAGES]
        columns = {REWARD: rewards.rewards, SPREAD: rewards.spreads, LENGTH: rewards.lengths}
        columns[CORRELATION] = np.full(len(like), rewards.correlation)
        drawn |= {name: torch.from_numpy(column).to(like) for name, column in columns.items()}
        reference = self._scored[0].sum(dim=1)  # the last log-probs that TRL asks for are those of the reference
        assert len(reference) == len(like)
        return {**drawn, REFERENCE: reference}

    def samples_state(self) -> Batch | None:
        return self.samples if self.state.global_step % self.num_iterations else None

    def restore_samples(self, samples: Batch) -> None:
        self.samples = {name: column.to(self.args.device) for name, column in samples.items()}

    def step_size(self, batches: Sequence[Sequence[object]]) -> int:  # type: ignore[override]
        return sum(map(len, batches))

    def compute_loss(self, model: nn.Module, inputs: Batch, *args: object, num_items_in_batch: int | None = None) -> Tensor:
        """The share of these samples in the loss of a step of that size, or of these samples alone."""
        here = len(inputs[ADVANTAGES])
        step = num_items_in_batch or here
        loss: Tensor = super().compute_loss(model, inputs, *args)  # type: ignore[misc]
        loss = loss * (here / step) if self.IS_MEAN else loss
        log_probs, entropies = (values.detach() for values in self._scored)
        tokens = inputs["completion_mask"].sum(dim=1)
        figures = {
            "reward": inputs[REWARD],
            "reward_spread": inputs[SPREAD],
            "kl_sampled": self._drawn_log_probs(inputs, log_probs) - inputs[REFERENCE],
            "entropy": entropies.sum(dim=1) / tokens,
            "sample_tokens": inputs[LENGTH],
            "length_correlation": inputs[CORRELATION],
            "loss": (loss.detach() * step / here).expand(here),  # the mean over a step is its loss
        }
        columns = torch.stack([figures[name].cpu().double() for name in FIGURES], dim=1)
        self.totals.add(columns, int(inputs["prompt_mask"].sum() + tokens.sum()))
        return loss

    @staticmethod
    def _drawn_log_probs(samples: Batch, now: Tensor) -> Tensor:
        """Log-probs of samples under the policy that drew them, (rows,), which is not `now` where they are used again."""
        if OLD_SUMS in samples:
            return samples[OLD_SUMS]
        return samples.get(OLD_TOKENS, now).sum(dim=1)

    def training_step(self, model: nn.Module, inputs: Batch, *args: object, **kwargs: object) -> Tensor:
        return super().training_step(model, inputs, *(args or (None,)), **kwargs)  # TRL requires a number; a probe has none

    def _unit_sizes(self, batch: Batch) -> list[int]:
        return _lengths(batch)

    def _part(self, batch: Batch, units: Sequence[int]) -> Batch:
        return _taken(batch, units)

    def _rows(self, batch: Batch) -> list[Batch]:
        return rows_of(batch, self.row_budget)

    def _size(self, row: Batch) -> tuple[int, int]:
        lengths = _lengths(row)
        return len(lengths), len(lengths) * max(lengths)

    def _longest_batch(self) -> Batch:
        """The longest prompts with answers of the most tokens, of which none is better than another."""
        sizes = self.train_dataset[SIZE]
        longest = sorted(range(len(sizes)), key=lambda i: -sizes[i])[: self.plan.prompts_a_step]
        places = cycle(place for place in longest for _ in range(self.num_generations))  # few prompts come again in a step
        batch = islice(places, self.args.per_device_train_batch_size)
        prompts = [self.train_dataset[place]["prompt"] for place in batch]
        width, new, device = max(map(len, prompts)), self.plan.config.max_new_tokens, self.args.device
        pad = int(self.processing_class.pad_token_id)
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        answers_to_all = ids[:, -1:].expand(-1, new).contiguous()
        values = torch.zeros(len(prompts), device=device)
        tokens = torch.zeros(len(prompts), new, device=device)
        return {
            **dict(zip(PROMPTS, (ids, mask), strict=True)),
            **dict(zip(ANSWERS, (answers_to_all, torch.ones_like(answers_to_all)), strict=True)),
            **dict.fromkeys((ADVANTAGES, OLD_SUMS, REFERENCE, REWARD, SPREAD, LENGTH, CORRELATION), values),
            **dict.fromkeys((OLD_TOKENS, "ref_per_token_logps"), tokens),
            ITEMS: torch.tensor(float(len(prompts) * new), device=device),
        }

    def log(self, logs: dict[str, float], *args: object, **kwargs: object) -> None:
        for averages in self._metrics.values():
            averages.clear()
        super().log(logs, *args, **kwargs)


class RlooTrainer(SampledTrainer, RLOOTrainer):
    """REINFORCE leave-one-out (arXiv:2402.14740), with the clipping of PPO (arXiv:1707.06347, equation 7).

    For sample i of the G to a prompt: R_i = reward - beta * (log p - log p of the reference); A_i = R_i minus the mean of the
    others. With w = p / p when it was drawn, of a whole sample, the loss of a step of B samples is the sum of
    -min(w * A, clip(w, 1 - epsilon, 1 + epsilon) * A) / B; a row has the terms of its samples.
    """

    IS_MEAN = True

    def _generate_single_turn(self, prompt_ids: list[list[int]], *_: object) -> list[list[int]]:
        return self.sample(prompt_ids)


class GrpoTrainer(SampledTrainer, GRPOTrainer):
    """Group relative policy optimization (arXiv:2402.03300), over the tokens of a step (arXiv:2503.14476), TRL's default.

    A_i = (reward - mean of the group) / (standard deviation of the group + 1e-4). With w = p / p when it was drawn, of a token,
    and r = log p of the reference - log p, the loss of a step of T tokens is the sum over its tokens of
    (-min(w * A, clip(w, 1 - epsilon, 1 + epsilon) * A) + beta * (exp(r) - r - 1)) / T; a row has the terms of its tokens.
    """

    IS_MEAN = False

    def _generate_single_turn(self, prompt_ids: list[list[int]], *_: object) -> tuple[list[list[int]], None]:
        return self.sample(prompt_ids), None


TRAINERS: dict[str, tuple[type[SampledTrainer], type[RLOOConfig] | type[GRPOConfig]]] = {
    "rloo": (RlooTrainer, RLOOConfig),
    "grpo": (GrpoTrainer, GRPOConfig),
}


def build_trainer(
    model: PreTrainedModel | PeftModel,
    adapter: LoraConfig | None,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    train: EncodedRows,
    held_out: EncodedRows,
    run_evaluation: Evaluate,
    tell: Tell = print,
    frozen: PreTrainedModel | None = None,
    world: World = ALONE,
    *,
    prompts: Sequence[SampledPrompt],
    rank: Rank,
) -> SampledTrainer:
    """The trainer of a plan, as that of dpo_trainer.py; `rank` scores answers to `prompts`, which are those of `train`."""
    config, start = plan.config, adapter_weights(model)
    kind, arguments = TRAINERS[config.rl_algorithm]
    rewards = SampleRewards(rank, [prompt.question for prompt in prompts], config.num_generations)
    built: Any = kind(
        model=model,  # type: ignore[call-arg]
        reward_funcs=[rewards],
        args=of_process(trainer_arguments(plan, arguments), world),
        train_dataset=_rows([prompt.ids for prompt in prompts], config.max_new_tokens),
        eval_dataset=_rows([row.prompt_ids for row in held_out], config.max_new_tokens) if held_out else None,
        processing_class=tokenizer,
        peft_config=adapter,
    )
    trainer: SampledTrainer = built
    trainer.rewards, trainer.plan = rewards, plan
    for module in built.model.modules():  # a ratio of probabilities would be the noise of dropout
        if isinstance(module, LoraLayer):
            module.lora_dropout.update({name: nn.Identity() for name in module.lora_dropout})
    built.beta = config.beta
    if frozen is not None:  # with a beta, the constructor would load it from its files, without a check
        built.ref_model = built.accelerator.prepare_model(frozen, evaluation_mode=True)
    trainer.take_over(forward.plain_states, Totals(FIGURES), run_evaluation, tell, plan, world)
    ready(trainer, plan, start)
    return trainer


def trainer_arguments(plan: Plan, kind: type[RLOOConfig] | type[GRPOConfig]) -> RLOOConfig | GRPOConfig:
    """The plan as arguments of TRL."""
    config, common = plan.config, common_arguments(plan)
    del common["max_length"], common["train_sampling_strategy"]
    return kind(
        **common,
        beta=0.0 if not config.lora_r else config.beta,
        num_generations=config.num_generations,
        num_iterations=config.num_iterations,
        steps_per_generation=common["gradient_accumulation_steps"],
        max_completion_length=config.max_new_tokens,
        temperature=config.temperature,
        epsilon=config.epsilon,
        disable_dropout=False,  # as in dpo_trainer.py
    )


def rows_of(samples: Batch, budget: int) -> list[Batch]:
    """The samples of a step in rows of at most `budget` tokens with padding, the longest first."""
    lengths = _lengths(samples)
    by_length = sorted(range(len(lengths)), key=lambda sample: -lengths[sample])
    return [_taken(samples, row) for row in filled(by_length, lambda row: len(row) * lengths[row[0]] <= budget)]


def _lengths(samples: Batch) -> list[int]:
    return (samples["prompt_mask"].sum(dim=1) + samples["completion_mask"].sum(dim=1)).tolist()


def _taken(samples: Batch, places: Sequence[int]) -> Batch:
    """These samples, without the padding that only others need."""
    prompt, answer = (int(samples[name][places].sum(dim=1).max()) for name in ("prompt_mask", "completion_mask"))
    taken: dict[str, Tensor] = {}
    for name, column in samples.items():
        if not column.ndim:  # of the whole step
            taken[name] = column
        elif name in PROMPTS:
            taken[name] = column[places, column.shape[1] - prompt :]
        else:
            taken[name] = column[places, :answer] if column.ndim > 1 else column[places]
    return taken


def _rows(prompts: Sequence[list[int]], new: int) -> Dataset:
    sizes = [len(ids) + new for ids in prompts]
    return Dataset.from_dict({"prompt": prompts, "question": range(len(prompts)), SIZE: sizes})

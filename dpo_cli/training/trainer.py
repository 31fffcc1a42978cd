"""What all trainers add to TRL's: the rows of a step, a probe of the longest rows, and evaluations with dpo's figures.

Longer than other modules: everything that touches the inside of transformers' Trainer is in one place.

With the module of each trainer the only one that overrides methods of TRL (tests/test_dpo.py, tests/test_sft.py,
tests/test_reward.py and tests/test_rlhf.py fail if TRL changes any of them):
- `training_step`: Trainer gets all pairs of a step as one micro-batch; they run in rows (scoring/packing.py), and a row that
  does not fit is divided (scoring/oom.py). Of several processes each runs a part of the pairs, and gradients are added up.
  Trainer and accelerate know of one process only: their wrapper exchanges gradients within the backward pass, so that all
  processes would need as many rows, and none could be repeated.
- `get_batch_samples`: the rows of a step are counted, so that the loss of a micro-batch is its share of the step's.
- `evaluate`: the figures of evaluation/metrics.py, so that a number means the same in training and in `dpo eval`.
- `log`: a training line includes dpo's figures.
- `_save`, `_load_from_checkpoint`: a checkpoint holds only the adapter in training, and loading is verified;
  Trainer ignores the adapter if a frozen one is next to it.
- `_save_checkpoint`: it is written where it may fail. Trainer would pickle all but weights (runs/state_io.py).
- `_move_model_to_device`: not a model whose weights are shards.
- the forward of the model: dpo's head replaces TRL's, which is a Triton kernel (scoring/forward.py).
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import pyarrow as pa
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, load_model, save_model
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback, TrainerControl, TrainerState
from trl.trainer.utils import FusedCausalLMOutput

from dpo_cli.config.rules import fuses_adapter
from dpo_cli.data.encoded import EncodedRows
from dpo_cli.hardware.memory import MOMENTS
from dpo_cli.models.tensor_files import SINGLE
from dpo_cli.plan.plan import Plan
from dpo_cli.providers.loaded_tensors import refuse
from dpo_cli.providers.out_of_memory import is_out_of_memory
from dpo_cli.providers.policy import FROZEN, TRAINED, Policy
from dpo_cli.providers.sharding import is_sharded, place_adapters
from dpo_cli.runs.state_io import load_state, random_state, random_state_kept, save_state, set_random_state
from dpo_cli.scoring import forward, oom
from dpo_cli.scoring.lora_linear import fuse
from dpo_cli.scoring.packing import Batch, packed, row_tokens, shared_out, taken, unit_tokens, units_in
from dpo_cli.scoring.reference import KeptReference, digest_of_ids
from dpo_cli.storage.checkpoints import PART
from dpo_cli.storage.log import Tell
from dpo_cli.storage.run_directory import CHECKPOINTS, TENSORBOARD, WEIGHTS
from dpo_cli.storage.world import ALONE, Steps, World

Arguments = TypeVar("Arguments", bound=TrainingArguments)
Evaluate = Callable[[Policy], dict[str, float]]

OPTIMIZER, SCHEDULE, SCALER, RANDOM = "optimizer", "schedule", "scaler", "random"  # files of a checkpoint
TRL_TOKENS = "_total_train_tokens"  # TRL's own count
RESTART = "start the run again with --overwrite"
SIZE = "tokens_of_unit"  # column: the size of a unit in memory


class Stopped(KeyboardInterrupt):
    """Ends an evaluation, because the training stops."""


class TotalsState(TypedDict):
    """`Totals` as a checkpoint holds them."""

    tokens: int
    step_begins: int
    figures: list[list[list[float]]]  # of each micro-batch, row by row
    weights: list[list[float]] | list[list[list[float]]]


Counted = tuple[list[Tensor], list[Tensor], int]  # figures and weights of rows, and their tokens


@dataclass(frozen=True)
class StepShare:
    """What one process has done of a step, without its gradients."""

    loss: float
    counted: Counted
    known: Any  # what later steps use again
    row_budget: int
    has_gradient: list[bool]  # of each trained weight


class Totals:
    """The figures of the rows that were trained on, and the tokens, since they were last taken."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self._figures: list[Tensor] = []
        self._weights: list[Tensor] = []
        self._step_begins = 0  # the place of the first row that `of_step` has not returned
        self.tokens = 0  # of all sequences since the start; a shared prompt counts twice in both layouts

    @property
    def written(self) -> Sequence[str]:
        """The figures of a training line."""
        return self.names

    def add(self, figures: Tensor, tokens: int, weights: Tensor | None = None) -> None:
        """`figures` are (n, names) of n rows, weighted by `weights` (n,), by those of each figure (n, names), or equally."""
        self._figures.append(figures.cpu())
        self._weights.append(torch.ones(len(figures)) if weights is None else weights.cpu())
        self.tokens += tokens

    def take(self) -> dict[str, float]:
        """The means over the rows added since the last call; none of a figure without a weight."""
        means = self._means(0)
        self.back_to((0, self.tokens))
        self._step_begins = 0
        return means

    def of_step(self) -> dict[str, float]:
        """The means over the rows added since the last call of this function, or of `take`."""
        means = self._means(self._step_begins)
        self._step_begins = len(self._figures)
        return means

    def _means(self, begin: int) -> dict[str, float]:
        figures, weights = torch.cat(self._figures[begin:]).double(), torch.cat(self._weights[begin:]).double()
        weights = weights if weights.ndim == 2 else weights[:, None].expand_as(figures)
        sums, totals = (figures * weights).sum(dim=0), weights.sum(dim=0)
        known = zip(self.names, (sums / totals).tolist(), totals.tolist(), strict=True)
        return {name: mean for name, mean, total in known if total}

    def mark(self) -> tuple[int, int]:
        """A mark for `back_to`."""
        return len(self._figures), self.tokens

    def since(self, mark: tuple[int, int]) -> Counted:
        """What was added since the mark."""
        count, tokens = mark
        return self._figures[count:], self._weights[count:], self.tokens - tokens

    def add_counted(self, counted: Counted) -> None:
        """Add what `since` returned in another process."""
        figures, weights, tokens = counted
        self._figures += figures
        self._weights += weights
        self.tokens += tokens

    def back_to(self, mark: tuple[int, int]) -> None:
        """Remove what was added since the mark, by a try that failed."""
        count, self.tokens = mark
        del self._figures[count:], self._weights[count:]

    def state(self) -> TotalsState:
        """The state for a checkpoint, as JSON values."""
        figures, weights = ([part.tolist() for part in parts] for parts in (self._figures, self._weights))
        return {"tokens": self.tokens, "step_begins": self._step_begins, "figures": figures, "weights": weights}

    def restore(self, state: TotalsState) -> None:
        self.tokens, self._step_begins = state["tokens"], state["step_begins"]
        self._figures = [torch.tensor(part, dtype=torch.float64) for part in state["figures"]]
        self._weights = [torch.tensor(part, dtype=torch.float64) for part in state["weights"]]


class CarefulTrainer:
    """dpo's part of a trainer; the base class before one of TRL's trainers."""

    SEQUENCES_PER_UNIT: int  # of a micro-batch, that belong together: 2 of a pair, 1 of a demonstration
    OUTPUTS: tuple[str, ...]  # of the head: what the loss and the figures read
    IS_WHOLE = False  # whether the loss compares units, so that halves have a different loss
    temperature = 1.0  # of the log-probs

    args: Any
    model: Any
    accelerator: Any
    train_dataset: Any
    data_collator: Any
    control: TrainerControl
    missed_evaluation = False  # the training was stopped during an evaluation, or when one was due
    optimizer: Any
    lr_scheduler: Any
    reference: KeptReference | None = None  # of a loss that compares with one
    # Calls the function that makes Trainer write a checkpoint into its output_dir; without it there are none.
    write_checkpoint: Callable[[Callable[[], None]], None] | None = None

    world: World = ALONE
    steps: Steps | None = None  # of a model that is divided over processes
    row_budget: int  # tokens of a row at most, where it has several units; lower once the memory was too small
    is_shared: bool  # whether a row has each prompt once

    def take_over(
        self, states: forward.States, totals: Totals, run_evaluation: Evaluate, tell: Tell, plan: Plan, world: World
    ) -> None:
        """Put dpo's head on the models that TRL's constructor prepared, and keep what is called later."""
        if plan.goes_on and not plan.starts_at_reference:  # the reference is the model with the adapter off
            self.model.delete_adapter(FROZEN)  # the copy of TRL's constructor, or of the provider
        self.is_shared = states is forward.shared_states
        unit = max(self.train_dataset[SIZE]) * (1 if self.is_shared else self.SEQUENCES_PER_UNIT)
        self.row_budget = plan.row_budget(unit)
        self.policy, self.world = Policy(self.model, getattr(self, "ref_model", None), world), world
        self.totals, self._run_evaluation, self._tell = totals, run_evaluation, tell
        self.steps = world.steps
        if is_sharded(self.model):
            place_adapters(self.model, self.args.device)
            self.accelerator.device_placement = False
        self.calls: list[FusedCausalLMOutput] = []  # of the head, since the start of compute_loss
        # The losses take the size of the step, whatever the model's own forward takes; then Trainer does not divide them again.
        self.model_accepts_loss_kwargs = True
        for model in filter(None, (self.policy.network, self.policy.frozen)):
            self.attach(model, states)
        for model in filter(None, (self.policy.model, self.policy.frozen)):
            model.register_forward_hook(self._keep_call)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Shards are where they belong: in the RAM, or on the device."""
        if not is_sharded(model):
            super()._move_model_to_device(model, device)  # type: ignore[misc]

    def attach(self, model: PreTrainedModel, states: forward.States) -> None:
        """Put dpo's head on a model."""
        forward.attach(model, states, self.temperature, self.OUTPUTS)

    def _keep_call(self, model: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, FusedCausalLMOutput):
            self.calls.append(output)

    def digests(self, rows: EncodedRows) -> list[bytes]:
        """The digests of the units that the reference knows, which are those of the training set."""
        return [digest_of_ids(*rows.ids(place)) for place in range(len(rows))]

    def known_of(self, batch: Batch, units: Sequence[int]) -> Any:
        """What this process has computed for these units, and later steps use again."""
        return None

    def learn(self, known: Any) -> None:
        """Keep what `known_of` returned in another process."""

    def get_batch_samples(self, *args: object) -> tuple[list[Batch], object]:
        """The micro-batches of the next optimizer step, and its size, which Trainer hands to `compute_loss` as it is."""
        batches, _ = super().get_batch_samples(*args)  # type: ignore[misc]
        return batches, self.step_size(batches)

    def step_size(self, batches: Sequence[Batch]) -> object:
        """What the loss of a step is divided by."""
        raise NotImplementedError

    def training_step(self, model: nn.Module, inputs: Batch, *args: object, **kwargs: object) -> Tensor:
        def run(batch: Batch) -> Tensor:
            rows = self._rows(batch)
            return oom.run_in_parts(lambda row: self.run_row(model, row, *args, **kwargs), rows, trained, self._smaller)

        if self.IS_WHOLE:
            return self.run_row(model, inputs, *args, **kwargs)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        batch = self._prepare_inputs(inputs)  # type: ignore[attr-defined]
        return run(batch) if self.world.size == 1 else self._run_share(batch, run, trained)

    def _run_share(self, batch: Batch, run: Callable[[Batch], Tensor], trained: Sequence[nn.Parameter]) -> Tensor:
        """Run the part of this process of a step, and add up losses, figures and gradients of all.

        Every process has the whole step, so they agree on the parts without asking. Random draws (dropout) differ between them,
        and leave no trace: the next epoch has the same order in all.
        """
        world, mark = self.world, self.totals.mark()
        units = shared_out(self._unit_sizes(batch), world.size)[world.rank]

        def own() -> StepShare:
            loss = 0.0
            with random_state_kept():
                torch.manual_seed(self._seed_of_step())
                if units:
                    loss = float(run(self._part(batch, units)))
            has_gradient = [parameter.grad is not None for parameter in trained]
            return StepShare(loss, self.totals.since(mark), self.known_of(batch, units), self.row_budget, has_gradient)

        shares = world.each(own)
        self.totals.back_to(mark)
        for share in shares:
            self.totals.add_counted(share.counted)
            self.learn(share.known)
        self.row_budget = min(share.row_budget for share in shares)
        used = [any(share.has_gradient[place] for share in shares) for place in range(len(trained))]
        gradients = []
        for parameter in (one for one, is_used in zip(trained, used, strict=True) if is_used):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        world.summed(gradients)
        return torch.tensor(sum(share.loss for share in shares), device=self.args.device)

    def _seed_of_step(self) -> int:
        """Of the dropout of this process in this step: a resumed training draws the same."""
        trainer: Any = self
        return hash((int(self.args.seed), int(trainer.state.global_step), self.world.rank)) % 2**63

    def run_row(self, model: nn.Module, row: Batch, *args: object, **kwargs: object) -> Tensor:
        """Forward and backward of a row; nothing is counted of one that fails."""
        mark = self.totals.mark()
        try:
            loss: Tensor = super().training_step(model, dict(row), *args, **kwargs)  # type: ignore[misc]
        except RuntimeError as error:
            self.totals.back_to(mark)
            self.calls.clear()  # they hold the graph of a row that was out of memory
            if self.steps is not None and self.steps.is_open and is_out_of_memory(error):
                raise self.steps.failure(error) from error  # it cannot be repeated
            raise
        return loss

    def _unit_sizes(self, batch: Batch) -> list[int]:
        return unit_tokens(batch, self.SEQUENCES_PER_UNIT, self.is_shared)

    def _part(self, batch: Batch, units: Sequence[int]) -> Batch:
        return taken(batch, units, self.SEQUENCES_PER_UNIT)

    def _rows(self, batch: Batch) -> list[Batch]:
        return packed(batch, self.row_budget, self.SEQUENCES_PER_UNIT, self.is_shared)

    def _size(self, row: Batch) -> tuple[int, int]:
        """The units of a row, and its tokens with padding."""
        return units_in(row, self.SEQUENCES_PER_UNIT), row_tokens(row, self.SEQUENCES_PER_UNIT, self.is_shared)

    def _smaller(self, row: Batch) -> list[Batch]:
        """A row that is out of memory, in rows of half its tokens, as those of all later steps; none for a single unit."""
        units, tokens = self._size(row)
        if units == 1:
            return []
        self.row_budget = min(self.row_budget, tokens // 2)  # rows that wait may be larger than this one
        self._tell(f"out of memory with {tokens} tokens in a row: later rows have at most {self.row_budget}")
        return self._rows(row)

    def probe_longest(self) -> None:
        """Run a row of the longest units forward and backward once, without a trace: what does not fit fails at once.

        Memory is reserved for what only later steps hold: gradients and the moments of the optimizer.
        """
        trainer: Any = self  # attributes that Trainer sets on itself
        batch = self._longest_batch()
        if not self.IS_WHOLE:  # in each process the same row, which may be the longest of its steps
            batch = self._rows(batch)[0]
        trainer.current_gradient_accumulation_steps = self.args.gradient_accumulation_steps
        mark = self.totals.mark()
        seen: int = getattr(self, TRL_TOKENS)
        trained = sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)
        has_moments = self.optimizer is not None and self.optimizer.state  # as a resumed training
        copies = 1.0 if has_moments else 1 + MOMENTS.get(str(trainer.args.optim.value), 8.0) / 4
        later = torch.empty(int(copies * trained), dtype=torch.uint8, device=self.args.device)
        reference = self.reference.state() if self.reference is not None else None
        world, self.world = self.world, ALONE
        with random_state_kept():
            world.together(lambda: self.training_step(trainer.model_wrapped, batch))
        self.world = world
        if self.reference is not None and reference is not None:  # the rows of the probe are not those of a first visit
            self.reference.restore(reference)
        del later
        self.totals.back_to(mark)
        setattr(self, TRL_TOKENS, seen)
        trainer._metrics["train"].clear()
        self.model.zero_grad(set_to_none=True)

    def _longest_batch(self) -> Batch:
        """A micro-batch of the longest units."""
        sizes = self.train_dataset[SIZE]
        longest = sorted(range(len(sizes)), key=lambda i: -sizes[i])[: self.args.per_device_train_batch_size]
        collate: Callable[[list[Any]], Batch] = self.data_collator
        return collate([self.train_dataset[i] for i in longest])

    def samples_state(self) -> Batch | None:
        """The samples that the next step uses again, for a checkpoint; None if it draws its own."""
        return None

    def restore_samples(self, samples: Batch) -> None:
        """Use these samples in the next step."""
        raise NotImplementedError

    def _save(self, output_dir: str | None = None, state_dict: object = None) -> None:
        place = Path(str(output_dir))
        if isinstance(self.model, PeftModel):
            save_trained(self.model, place)
        else:  # under the names in memory: `save_pretrained` splits experts, which could not be loaded again
            place.mkdir(parents=True, exist_ok=True)
            save_model(self.model, str(place / SINGLE), metadata={"format": "pt"})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: object = None) -> None:
        if not isinstance(self.model, PeftModel):
            missing, unexpected = load_model(self.model, Path(resume_from_checkpoint) / SINGLE, strict=False)
            refuse(resume_from_checkpoint, missing, unexpected, (), RESTART, "output_dir")
            return
        written = load_file(Path(resume_from_checkpoint) / WEIGHTS)
        set_peft_model_state_dict(self.model, dict(written), adapter_name=TRAINED)
        loaded = get_peft_model_state_dict(self.model, adapter_name=TRAINED, save_embedding_layers=False)
        other = [name for name in loaded.keys() & written.keys() if not torch.equal(loaded[name].cpu(), written[name])]
        missing, unexpected = loaded.keys() - written.keys(), written.keys() - loaded.keys()
        refuse(resume_from_checkpoint, sorted(missing), sorted(unexpected), other, RESTART, "output_dir")

    def create_model_card(self, *_: object, **__: object) -> None:
        """Nothing: a run writes its own card, and a checkpoint needs none."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        save_state(Path(output_dir) / OPTIMIZER, self.optimizer.state_dict())
        save_state(Path(output_dir) / SCHEDULE, self.lr_scheduler.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state = load_state(Path(checkpoint) / OPTIMIZER)
        self.optimizer.load_state_dict(state)
        # torch gives each state the dtype of its weight; Adafactor keeps float32 states for bf16 weights.
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        for i, kept in state["state"].items():
            for name, value in kept.items():
                now = self.optimizer.state[weights[i]].get(name)
                if isinstance(value, Tensor) and isinstance(now, Tensor) and now.dtype != value.dtype:
                    self.optimizer.state[weights[i]][name] = value.to(now.device)
        schedule = self.lr_scheduler
        schedule.load_state_dict(load_state(Path(checkpoint) / SCHEDULE))
        # For the current number of steps: the saved rate belongs to the run as it was configured then.
        rates = [base * rate(schedule.last_epoch) for base, rate in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
        schedule._last_lr = rates
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def _save_scaler(self, output_dir: str) -> None:
        if self.accelerator.scaler is not None:  # of fp16
            save_state(Path(output_dir) / SCALER, self.accelerator.scaler.state_dict())

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(load_state(Path(checkpoint) / SCALER))

    def _save_rng_state(self, output_dir: str) -> None:
        save_state(Path(output_dir) / RANDOM, random_state())

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            set_random_state(load_state(Path(checkpoint) / RANDOM))

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        if self.write_checkpoint is not None:
            self.write_checkpoint(lambda: super(CarefulTrainer, self)._save_checkpoint(model, trial))  # type: ignore[misc]

    def log(self, logs: dict[str, float], *args: object, **kwargs: object) -> None:
        """dpo's figures join the line here, so that they also reach the trackers of `report_to`."""
        if "loss" in logs:
            logs.update({**self.totals.take(), "loss": logs["loss"]})  # this loss is of all processes
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def evaluate(self, *_: object, metric_key_prefix: str = "eval", **__: object) -> dict[str, float]:
        self.model.eval()  # TRL's log() asks the model which of its own averages to add
        before = random_state()
        try:
            figures = self._run_evaluation(self.policy)
        except Stopped:  # the checkpoint that is written now is of the step before the evaluation
            set_random_state(before)
            self.missed_evaluation = True
            self.control.should_training_stop = self.control.should_save = True
            self.control.should_evaluate = False
            return {}
        except Exception:  # the steps before it are kept for any error: a resumed run starts with this evaluation
            set_random_state(before)
            self.missed_evaluation = True
            if self.optimizer is not None:  # else nothing was trained since the checkpoint it resumed from
                self._save_checkpoint(self.model, None)
            raise
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        trainer: Any = self
        trainer.log(dict(metrics))
        self.model.train()
        self.control = trainer.callback_handler.on_evaluate(self.args, trainer.state, self.control, metrics)
        return metrics


class ProbeFirst(TrainerCallback):
    """Probes the longest rows after the trainer has moved the model to its device, and before the first step."""

    def __init__(self, trainer: CarefulTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if args.device.type == "cuda":  # the peak that metrics.json holds is that of the training, not of what came before
            torch.cuda.reset_peak_memory_stats()
        self.trainer.probe_longest()


def token_column(ids: array[int] | memoryview, ends: array[int] | memoryview) -> pa.LargeListArray:
    """Lists of token ids as a column of Arrow: the ids one after another (int32), and where each ends (int64, after a 0).

    It reads from these buffers, and copies nothing.
    """
    held = (pa.int64(), ends), (pa.int32(), ids)
    starts, values = (pa.Array.from_buffers(kind, len(buffer), [None, pa.py_buffer(buffer)]) for kind, buffer in held)
    return pa.LargeListArray.from_arrays(starts, values)


Weights = dict[str, Tensor]


def adapter_weights(model: PeftModel | PreTrainedModel) -> Weights:
    """The weights of the adapter that a model comes with, by name; none for a fresh adapter."""
    if not isinstance(model, PeftModel):
        return {}
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if TRAINED in name.split(".")}


def ready(trainer: Any, plan: Plan, start: Weights) -> None:
    """Set the training dtypes of a trainer's weights, fuse its adapter, and add the callbacks of every training.

    `start` are the weights of the adapter that training continues, before TRL changes the model.
    """
    _set_dtypes(trainer.model, plan, start)
    if plan.merges and plan.config.lora_r:  # the base of this adapter is model_name, not the model below that
        trainer.model.peft_config[TRAINED].base_model_name_or_path = plan.config.model_name
    for module in trainer.model.modules():  # the frozen copy inherits the dropout of the adapter, and must be exact
        if isinstance(module, LoraLayer) and FROZEN in module.lora_dropout:
            module.lora_dropout[FROZEN] = torch.nn.Identity()
    if fuses_adapter(plan.config.provider):
        fuse(trainer.model)
    trainer.add_callback(ProbeFirst(trainer))
    trainer.add_callback(Schedule(plan, evaluates=trainer.eval_dataset is not None))
    trainer.remove_callback(PrinterCallback)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            callback.logging_dir = str(plan.run_dir / TENSORBOARD)


def save_trained(model: PeftModel | PreTrainedModel, place: Path) -> None:
    """Write what is trained: the adapter without its frozen copy, or the whole model."""
    if isinstance(model, PeftModel):
        model.create_or_update_model_card = lambda _: None  # a run writes its own card
        trained = model.peft_config[TRAINED]
        if isinstance(trained.target_modules, set):  # a process has its own order of a set, and the file must not
            trained.target_modules = sorted(trained.target_modules)
        # PEFT would add the base's table of an embedding that has an adapter.
        model.save_pretrained(str(place), selected_adapters=[TRAINED], save_embedding_layers=False)
    else:
        model.save_pretrained(str(place))


def _set_dtypes(model: PeftModel | PreTrainedModel, plan: Plan, start: Weights) -> None:
    """TRL makes the adapter of a quantised model bf16, as QLoRA has it (arXiv:2305.14314, section 3).

    That is right if the model computes in bf16. fp16's gradient scaler cannot unscale bf16, and float32 would lose precision.
    An adapter that training continues gets the weights of its file back, which bf16 rounded. The frozen copy has the same
    weights in the same dtype, or the policy would differ from it at step 0: TRL 1.15 makes it before it rounds the other, and
    does not copy an adapter on an embedding, which has parameters and no modules.
    """
    parameters = dict(model.named_parameters())
    for parameter in parameters.values() if plan.dtype != "bfloat16" else ():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for name, weight in start.items():
        trained = parameters[name]
        trained.data.copy_(weight)
        copy = ".".join(FROZEN if part == TRAINED else part for part in name.split("."))
        if copy in parameters:
            parameters[copy].data = trained.data.clone()


def of_process(arguments: Arguments, world: World) -> Arguments:
    """Those of this process, which uses one device, and reports to trackers if it is the first one.

    transformers takes each visible GPU: a batch of 2 becomes 4 and is spread over copies of the model that all use the forward
    of the first. Several GPUs are for several processes.
    """
    arguments._n_gpu = min(1, arguments.n_gpu)
    if not world.is_main:
        arguments.report_to = []
    return arguments


def common_arguments(plan: Plan) -> dict[str, Any]:
    """The arguments of every trainer, in TRL's names."""
    config = plan.config
    batch, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    offloads = config.activation_offloading and config.device == "cuda"
    return {
        **({"activation_offloading": True} if offloads else {}),  # TRL's trainers of rlhf have no such argument
        "output_dir": str(plan.run_dir / CHECKPOINTS / PART),
        "num_train_epochs": config.num_train_epochs,
        "max_steps": config.max_steps or -1,
        "per_device_train_batch_size": batch * accumulation if plan.fills_rows else batch,
        "gradient_accumulation_steps": 1 if plan.fills_rows else accumulation,
        "per_device_eval_batch_size": config.per_device_eval_batch_size,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.lr_scheduler_type,
        # transformers 5.17 has no warmup_ratio: a fraction of warmup_steps is a share of all steps.
        "warmup_steps": config.warmup_steps or config.warmup_ratio,
        "optim": config.optim,
        "train_sampling_strategy": "group_by_length" if config.group_by_length else "random",
        "remove_unused_columns": False,  # the sampler reads the lengths; the collator takes what it knows
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "bf16": config.bf16,
        "fp16": config.fp16,
        "gradient_checkpointing": config.gradient_checkpointing,
        "max_length": None,  # rows already fit max_seq_length
        "router_aux_loss_coef": 0.0,  # dpo's head gives no router logits; if a router is trained, the plan notes it
        # `Schedule` says when.
        "eval_strategy": "no",
        "logging_strategy": "no",
        "save_strategy": "no",
        "logging_nan_inf_filter": False,  # a NaN must be visible, not replaced by the last average
        "report_to": config.report_to,
        # With the time, because trackio continues a run of the same name.
        "run_name": f"{plan.run_dir.name} {datetime.now():%Y-%m-%d %H:%M:%S}",
        "seed": config.seed,
        "use_cpu": config.device == "cpu",
        "dataloader_pin_memory": config.device == "cuda",
        "disable_tqdm": True,
    }


BETWEEN_SECONDS = 600.0  # between checkpoints, if save_steps is not set


class Schedule(TrainerCallback):
    """Tells Trainer what is due. At each step its order is: log, evaluate, save."""

    def __init__(self, plan: Plan, evaluates: bool) -> None:
        self.config, self.evaluates = plan.config, evaluates
        self._saved = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        step, is_last = state.global_step, state.global_step >= state.max_steps
        control.should_log = is_last or step % self.config.logging_steps == 0
        control.should_evaluate = self.evaluates and (is_last or self._is_judged(step, state.epoch))
        control.should_save = is_last or self._is_saved(step)

    def _is_judged(self, step: int, epoch: float) -> bool:
        return step % self.config.eval_steps == 0 if self.config.eval_steps else epoch == int(epoch)

    def _is_saved(self, step: int) -> bool:
        if self.config.save_steps:
            return step % self.config.save_steps == 0
        return time.monotonic() - self._saved >= BETWEEN_SECONDS

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self._saved = time.monotonic()

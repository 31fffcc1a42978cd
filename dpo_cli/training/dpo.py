"""TRL's DPOTrainer as this program uses it. The only module that overrides anything of TRL's.

What is overridden, and why (tests/test_dpo.py fails when TRL moves any of it):
- `_prepare_dataset`: TRL 1.15 tokenises rows itself and takes no ready token ids. Ours are made once, for plan, training
  and evaluation alike, and are the same ids (tests/test_tokens.py).
- `compute_loss`: the response log-probs are read off the two model calls TRL makes for a micro-batch, policy first and
  reference second, because its own averages count ties as losses.
- `training_step`: a micro-batch that does not fit is run in halves (training/parts.py).
- `evaluate`: the figures of evaluation/metrics.py, so that a number means the same in training and in `dpo eval`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback, TrainerCallback, TrainerControl
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import FusedCausalLMOutput

from dpo_cli.data.tokens import EncodedPair
from dpo_cli.plan import Plan
from dpo_cli.training import parts, scoring

Evaluate = Callable[[PeftModel], dict[str, float]]
Tell = Callable[[str], None]


def reward_figures(policy: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Per-pair figures from summed response log-probs, both (2B,) with the B chosen first: (B, 6).

    Columns: accuracy, margin, reward_chosen, reward_rejected, logp_chosen, logp_rejected. The reward is
    beta * (log pi - log ref) (Rafailov et al., arXiv:2305.18290, equation 5 without its constant); a tie counts one half.
    """
    pi_chosen, pi_rejected = policy.double().chunk(2)
    reward_chosen, reward_rejected = (beta * (policy.double() - reference.double())).chunk(2)
    margin = reward_chosen - reward_rejected
    accuracy = (margin > 0).double() + 0.5 * (margin == 0).double()
    return torch.stack([accuracy, margin, reward_chosen, reward_rejected, pi_chosen, pi_rejected], dim=1)


TRL_TOKENS = "_total_train_tokens"  # TRL's own count
SIZE = "tokens_in_a_batch"  # column: what decides how much memory a pair takes
FIGURES = ("accuracy", "margin", "reward_chosen", "reward_rejected", "logp_chosen", "logp_rejected")


class PairTotals:
    """Sums of the pair figures and the tokens since they were last taken."""

    def __init__(self) -> None:
        self._figures: list[Tensor] = []
        self.tokens = 0  # of both sequences of each pair since the start, so a shared prompt counts twice on either path

    def add(self, figures: Tensor, tokens: int) -> None:
        self._figures.append(figures.cpu())
        self.tokens += tokens

    def take(self) -> dict[str, float]:
        """The means over the pairs added since the last call."""
        means = torch.cat(self._figures).mean(dim=0).tolist()
        self._figures.clear()
        return dict(zip(FIGURES, means, strict=True))

    def mark(self) -> tuple[int, int]:
        """A place to go back to."""
        return len(self._figures), self.tokens

    def back_to(self, mark: tuple[int, int]) -> None:
        """Forget what was added since the mark, in a try that failed."""
        count, self.tokens = mark
        del self._figures[count:]


class PairTrainer(DPOTrainer):
    """DPOTrainer on encoded pairs, scoring with our head."""

    control: TrainerControl

    def __init__(self, *args: Any, states: scoring.States, run_evaluation: Evaluate | None, tell: Tell, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        scoring.attach(self.model.get_base_model(), states)
        self.totals = PairTotals()
        self._run_evaluation, self._tell = run_evaluation, tell
        self._calls: list[Tensor] = []
        self.model.register_forward_hook(self._keep_log_probs)

    def _keep_log_probs(self, model: Any, inputs: Any, output: Any) -> None:
        if isinstance(output, FusedCausalLMOutput):
            self._calls.append(output.log_probs.detach().sum(dim=1))

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self._calls.clear()
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        policy, reference = self._calls
        self.totals.add(reward_figures(policy, reference, self.beta), int(inputs["attention_mask"].sum()))
        return loss

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        step, trained = super().training_step, [parameter for parameter in model.parameters() if parameter.requires_grad]
        if self.accelerator.num_processes > 1:  # whose processes add up gradients while they come, and must all do the same
            return step(model, inputs, *args, **kwargs)

        def attempt(batch: parts.Batch) -> Tensor:
            mark = self.totals.mark()
            try:
                loss: Tensor = step(model, dict(batch), *args, **kwargs)
            except RuntimeError:
                self.totals.back_to(mark)
                raise
            return loss

        return parts.run_in_parts(attempt, self._prepare_inputs(inputs), trained, self._tell)

    def probe_longest(self) -> None:
        """Run the pairs with most tokens forward and backward once and leave no trace: what does not fit fails at once.

        The room of what only later steps hold, gradients and two moments of each, is kept free of it.
        """
        sizes = self.train_dataset[SIZE]
        rows = sorted(range(len(sizes)), key=lambda i: -sizes[i])[: self.args.per_device_train_batch_size]
        batch = self.data_collator([self.train_dataset[i] for i in rows])
        self.current_gradient_accumulation_steps = self.args.gradient_accumulation_steps
        mark, device = self.totals.mark(), self.args.device
        seen: Any = getattr(self, TRL_TOKENS)
        trained = sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)
        later = torch.empty(3 * trained, dtype=torch.uint8, device=device)
        on_gpu = [device] if device.type != "cpu" else []
        with torch.random.fork_rng(on_gpu, device_type=device.type if on_gpu else "cuda"):
            self.training_step(self.model_wrapped, batch)
        del later
        self.totals.back_to(mark)
        setattr(self, TRL_TOKENS, seen)
        self._metrics["train"].clear()
        self.model.zero_grad(set_to_none=True)

    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        assert self._run_evaluation is not None
        self.model.eval()  # TRL's log() asks the model which of its own averages to add
        figures = self._run_evaluation(self.model)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        self.log(dict(metrics))
        self.model.train()
        control: TrainerControl = self.control
        self.control = self.callback_handler.on_evaluate(self.args, self.state, control, metrics)
        return metrics


class ProbeFirst(TrainerCallback):
    """Probes the longest pairs once the trainer has put the model where it trains it, and before the first step."""

    def __init__(self, trainer: PairTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.probe_longest()


def build_trainer(
    model: PreTrainedModel,
    adapter: LoraConfig,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    train: Sequence[EncodedPair],
    held_out: Sequence[EncodedPair],
    run_evaluation: Evaluate,
    tell: Tell = print,
) -> PairTrainer:
    """The trainer of a plan, with a fresh adapter on `model`; its figures leave through callbacks.

    The adapter is left to TRL, which then knows that the reference is the model with the adapter off.
    """
    trainer = PairTrainer(
        model=model,
        args=trainer_arguments(plan, evaluates=bool(held_out)),
        train_dataset=_rows(train, plan.scoring.shared),
        eval_dataset=_rows(held_out, plan.scoring.shared) if held_out else None,
        processing_class=tokenizer,
        peft_config=adapter,
        states=scoring.states_of(plan.scoring),
        run_evaluation=run_evaluation,
        tell=tell,
    )
    if plan.config.fp16:  # TRL makes a 4-bit model's adapter bf16, which fp16's gradient scaler cannot unscale
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    trainer.add_callback(ProbeFirst(trainer))
    trainer.remove_callback(PrinterCallback)
    return trainer


def trainer_arguments(plan: Plan, evaluates: bool) -> DPOConfig:
    """The plan in TRL's words."""
    config = plan.config
    return DPOConfig(
        output_dir=str(plan.run_dir),
        num_train_epochs=config.num_train_epochs,
        max_steps=config.max_steps or -1,
        per_device_train_batch_size=config.per_device_train_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        per_device_eval_batch_size=config.per_device_eval_batch_size,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        # transformers 5.17 has no warmup_ratio: a fraction of warmup_steps is a share of all steps.
        warmup_steps=config.warmup_steps or config.warmup_ratio,
        optim=config.optim,
        train_sampling_strategy="group_by_length" if config.group_by_length else "random",
        remove_unused_columns=False,  # the sampler reads the lengths; the collator takes what it knows
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        beta=config.beta,
        bf16=config.bf16,
        fp16=config.fp16,
        gradient_checkpointing=config.gradient_checkpointing,
        max_length=None,  # pairs are fitted to max_seq_length before they come here
        disable_dropout=False,  # the provider stops the base model's; stopping the adapter's would undo lora_dropout
        router_aux_loss_coef=0.0,  # mixture-of-experts routers are frozen, so there is no load to balance
        eval_strategy="no" if not evaluates else "epoch" if config.eval_steps is None else "steps",
        eval_steps=config.eval_steps,
        logging_steps=config.logging_steps,
        logging_nan_inf_filter=False,  # a NaN is to be seen, not replaced by the last average
        save_strategy="no",
        report_to="none",
        seed=config.seed,
        use_cpu=config.device == "cpu",
        dataloader_pin_memory=config.device == "cuda",
        disable_tqdm=True,
    )


def _rows(pairs: Sequence[EncodedPair], shared: bool) -> Dataset:
    columns = {name: [getattr(pair, name) for pair in pairs] for name in (*scoring.ID_COLUMNS, "length")}
    return Dataset.from_dict({**columns, SIZE: [pair.shared_length if shared else pair.length for pair in pairs]})

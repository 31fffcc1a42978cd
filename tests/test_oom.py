"""A row that is out of memory, divided; and the probe of the longest pairs, which leaves no trace."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import made_row
from test_dpo import make_trainer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from dpo_cli.data.rows import to_pair
from dpo_cli.data.tokens import encode
from dpo_cli.scoring import forward
from dpo_cli.scoring.oom import list_halves, run_in_parts
from dpo_cli.scoring.packing import row_tokens, taken
from dpo_cli.training.callbacks.metrics_log import Record
from dpo_cli.training.trainer import ProbeFirst


def test_gradients_by_hand() -> None:
    """Each pair has a third of the loss, w * x / 3, so dw = (1 + 2 + 6) / 3 = 3, on top of a gradient of 10 that was there.

    With three parts at once, and then with two, memory is out, after the gradient has been added.
    """
    weight = torch.nn.Parameter(torch.tensor(1.0))
    weight.grad = torch.tensor(10.0)
    tried = []

    def step(values: list[float]) -> Tensor:
        loss = (weight * torch.tensor(values) / 3).sum()
        loss.backward()
        tried.append(len(values))
        if len(values) > 1:
            raise torch.OutOfMemoryError("none left")
        return loss.detach()

    assert run_in_parts(step, [[1.0, 2.0, 6.0]], [weight], list_halves).item() == pytest.approx(3)
    assert weight.grad.item() == pytest.approx(13)
    assert tried == [3, 1, 2, 1, 1]


def test_one_pair_alone_that_does_not_fit_is_an_error() -> None:
    def step(batch: Any) -> Tensor:
        raise torch.OutOfMemoryError("none left")

    with pytest.raises(torch.OutOfMemoryError):
        run_in_parts(step, [[0.0]], [], list_halves)


def trained(
    place: Path, tokenizer: PreTrainedTokenizerFast, faults: Iterator[bool], probes: bool = True, **options: Any
) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """An adapter trained for three steps of four pairs in two rows or more; memory is out where `faults` says so."""
    place.mkdir()
    trainer, _ = make_trainer(
        place, tokenizer, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=3, **options
    )
    if not probes:
        trainer.remove_callback(ProbeFirst)
    lines: list[dict[str, Any]] = []
    trainer.add_callback(Record(trainer.totals, [lambda line: lines.append(line.figures)]))
    weights = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]

    def fail(gradient: Tensor) -> None:
        if next(faults, False):
            raise torch.OutOfMemoryError("none left")

    weights[len(weights) // 2].register_hook(fail)  # halfway through the backward pass
    trainer.train()
    assert next(faults, None) is None  # all of them came
    return [weight.detach() for weight in weights], lines


@pytest.mark.parametrize("faults", [[True], [False, True], [False, False, True]])
def test_a_run_that_is_out_of_memory_continues_to_the_same_adapter(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, faults: list[bool]
) -> None:
    """Out in the probe, in the first row of a step, and in the second one, whose step has a gradient already."""
    whole, lines = trained(tmp_path / "whole", tokenizer, iter([]))
    parted, others = trained(tmp_path / "parted", tokenizer, iter(faults))
    for one, other in zip(whole, parted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    for line, other_line in zip(lines, others, strict=True):
        assert line["tokens"] == other_line["tokens"]
        for figure in ("loss", "margin", "accuracy", "logp_chosen", "grad_norm"):
            assert line[figure] == pytest.approx(other_line[figure], rel=1e-4, abs=1e-6), figure


def test_rows_only_become_smaller(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Out of memory in a small row, and then in a larger one that has waited: the limit stays that of the small one."""
    trainer, _ = make_trainer(tmp_path, tokenizer)
    all_pairs = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    small = taken(all_pairs, [0, 1], 2)
    trainer._smaller(small)
    limit = trainer.row_budget
    assert limit == row_tokens(small, 2, shared=True) // 2
    trainer._smaller(all_pairs)
    assert trainer.row_budget == limit


def test_the_probe_leaves_no_trace(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """With dropout, so that a number drawn by the probe would show: the same bits as without it."""
    probed, lines = trained(tmp_path / "probed", tokenizer, iter([]), dropout=0.2)
    plain, others = trained(tmp_path / "plain", tokenizer, iter([]), probes=False, dropout=0.2)
    assert all(torch.equal(one, other) for one, other in zip(probed, plain, strict=True))
    assert [line["loss"] for line in lines] == [line["loss"] for line in others]


@pytest.mark.parametrize("shared", [True, False])
def test_the_probe_takes_the_pairs_with_most_tokens(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, shared: bool) -> None:
    """One pair has the longest sequence, another, of two long responses, has more tokens once its prompt counts once."""
    long_prompt = {"prompt": "the cat sat " * 12, "chosen": "yes", "rejected": "no"}
    long_answers = {"prompt": "q", "chosen": "the mat is " * 10, "rejected": "the answer " * 10}
    pairs = encode([to_pair(row, 1) for row in (long_prompt, long_answers, made_row(0))], tokenizer)
    assert pairs[0].length > pairs[1].length and pairs[0].shared_length < pairs[1].shared_length
    states = forward.shared_states if shared else forward.plain_states
    trainer, _ = make_trainer(tmp_path, tokenizer, states=states, pairs=pairs, per_device_train_batch_size=1, max_steps=1)
    seen: list[int] = []
    step = trainer.compute_loss

    def compute_loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(int(inputs["attention_mask"].sum()))
        return step(model, inputs, *args, **kwargs)

    trainer.compute_loss = compute_loss
    trainer.train()
    probed = pairs[1] if shared else pairs[0]
    assert len(seen) > 1 and seen[0] == probed.shared_length + len(probed.prompt_ids)

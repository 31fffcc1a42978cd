"""A model whose frozen weights are divided over processes, or wait in the RAM: the same numbers, in less memory."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from fork_server import dpo
from process_runs import (
    MAIN,
    SIGNAL_IN_AN_EVALUATION,
    Config,
    apart,
    assert_same,
    document,
    in_processes,
    in_two_with,
    leaves,
    resumed_as_alone,
    trained,
)
from safetensors.torch import load_file
from torch.distributed.tensor.experimental._context_parallel import _attention

sys.path.insert(0, str(ROOT / "benchmarks"))
import divided_weights
from baseline import BASELINES, Baseline, Table, compare

from dpo_cli.errors import Exit
from dpo_cli.storage.run_directory import ADAPTER, EVALUATION, LINES, PLAN, SUMMARY, WEIGHTS

REINFORCED = {
    "strategy": "rlhf",
    "reward_functions": [{"rank": "regex", "pattern": "[a-e]"}],
    "num_generations": 2,
    "num_iterations": 2,
    "max_new_tokens": 2,
}
DIVIDED: dict[str, dict[str, Any]] = {
    "dpo": {},
    "checkpointed": {"gradient_checkpointing": True},
    "plain rows": {"prompt_sharing": False},
    "4 bits": {"use_4bit": True},
    "sft": {"strategy": "sft"},
    "reward": {"strategy": "reward"},
    "rlhf": REINFORCED,
}


QUICK = ("dpo", "4 bits")


@pytest.mark.parametrize(
    "options", [pytest.param(DIVIDED[name], id=name, marks=[] if name in QUICK else pytest.mark.long) for name in DIVIDED]
)
def test_weights_that_are_divided_train_as_whole_ones(config: Config, options: dict[str, Any]) -> None:
    one = trained(config("one", **options))
    several = trained(config("divided", fsdp=True, **options), processes=2)
    assert "gathered" in document(several, PLAN)["memory"]["components"]
    assert_same(one, several)
    assert apart(one, several) < 1e-4


@pytest.mark.long
def test_divided_weights_of_16_bits_are_scored_and_evaluated_in_float32(config: Config) -> None:
    """Both checks take each layer to float32 while it runs, also one that is whole only then."""
    one, several = (
        trained(config(name, bf16=True, fsdp=name == "divided"), processes=1 + (name == "divided"))
        for name in ("one", "divided")
    )
    assert document(several, PLAN)["scoring"]["shared"] is True
    for line, other in zip(document(one, LINES), document(several, LINES), strict=True):
        assert other["loss"] == pytest.approx(line["loss"], abs=0.02)


@pytest.mark.parametrize("options", [{}, pytest.param({"bf16": True}, marks=pytest.mark.long)], ids=["float32", "bf16"])
def test_weights_in_the_ram_train_to_the_same_bits(config: Config, options: dict[str, Any]) -> None:
    one, other = (trained(config(name, cpu_offload=name == "in-ram", **options)) for name in ("one", "in-ram"))
    assert_same(one, other)
    assert (other / ADAPTER / WEIGHTS).read_bytes() == (one / ADAPTER / WEIGHTS).read_bytes()


def test_a_divided_run_resumes_to_the_same_bits_and_in_one_process(config: Config) -> None:
    alone, stopped, changed = (config(name, fsdp=True) for name in ("alone", "stopped", "changed"))
    whole = trained(alone, processes=2)
    for path in (stopped, changed):
        run = trained(path, processes=2)
        shutil.rmtree(run / "checkpoints" / "step-6")  # as if it was killed after step 4
        (run / SUMMARY).unlink()
    resumed_as_alone(stopped, whole)
    done = dpo("train", changed, "--resume")
    assert done.returncode == 0, done.stderr
    assert apart(whole, changed.with_suffix("")) < 1e-4


@pytest.mark.long
@pytest.mark.parametrize("option", ["fsdp", "cpu_offload"])
def test_a_divided_run_is_evaluated_exported_and_trained_further(config: Config, tmp_path: Path, option: str) -> None:
    processes = 2 if option == "fsdp" else 1
    run = trained(config("first", **{option: True}), processes=processes)
    kept = document(run, EVALUATION)
    (run / EVALUATION).unlink()  # else it is read, and nothing is computed
    done = dpo("eval", run, "--json")
    assert done.returncode == 0, done.stderr
    figures = dict(leaves(json.loads(done.stdout)["policy"]))
    assert figures == {place: pytest.approx(value, rel=1e-5, abs=1e-6) for place, value in leaves(kept["policy"])}
    done = dpo("export", run, "--out", tmp_path / "merged")
    assert done.returncode == 0, done.stderr
    for reference in ("adapter", "base"):  # the adapter goes on, or is merged first
        below = {"model_name": str(run), "reference": reference, "max_steps": 2}
        one = trained(config(f"one-{reference}", **below))
        further = trained(config(f"further-{reference}", **below, **{option: True}), processes=processes)
        assert_same(one, further)
        assert apart_of(one, further) < 1e-5


def apart_of(one: Path, other: Path) -> float:
    """The largest relative difference of a weight of two adapters."""
    mine, theirs = (load_file(run / ADAPTER / WEIGHTS) for run in (one, other))
    return max(float((mine[name] - theirs[name]).norm() / mine[name].norm()) for name in mine)


@pytest.mark.long
def test_a_signal_in_an_evaluation_of_a_divided_model_waits_for_its_end(config: Config) -> None:
    codes, said = in_two_with(SIGNAL_IN_AN_EVALUATION, stopped := config("stopped", ddp_timeout=20, fsdp=True))
    assert codes == [Exit.SIGINT, Exit.SIGINT], said
    assert "interrupted after step" in said[0] and "error" not in said[1]
    resumed_as_alone(stopped, trained(config("alone", fsdp=True), processes=2))


def full_memory(rank: int, condition: str) -> str:
    """Code by which the head of a model finds the memory full, within a run of the model."""
    return f"""
import os, torch
from dpo_cli.scoring import forward
of, seen = forward.Head.of, []
def full(*arguments):
    if torch.is_grad_enabled():
        seen.append(1)
    if torch.is_grad_enabled() and {condition} and os.environ["RANK_OF_TEST"] == "{rank}":
        raise torch.OutOfMemoryError("CUDA out of memory (test)")
    return of(*arguments)
forward.Head.of = full
"""


@pytest.mark.parametrize(
    ("rank", "step"), [pytest.param(0, 4, marks=pytest.mark.long), pytest.param(1, 1, marks=pytest.mark.long), (1, 4)]
)
def test_a_full_memory_within_a_row_ends_all(config: Config, rank: int, step: int) -> None:
    """In the probe and in a later step. The others wait in a run of the model: they end with the connection, at once."""
    codes, said = in_two_with(full_memory(rank, f"len(seen) >= {step}"), config("full", ddp_timeout=300, fsdp=True))
    assert codes[rank] == Exit.UNFIT and codes[1 - rank] == Exit.FAILED, said
    assert "divided over 2 processes, so it cannot be repeated" in said[rank]
    assert "another of the 2 processes has ended" in said[0] or rank == 0
    assert not any(word in said[0] + said[1] for word in ("Traceback", "later rows have", "alone does not fit", "RuntimeError"))


def test_a_full_memory_of_a_process_alone_is_repeated_in_parts(config: Config) -> None:
    """And blocks are shards again afterwards: what was left whole would stay on the card."""
    code = (
        full_memory(0, "len(seen) == 3")
        + """
from torch.distributed.fsdp import FSDPModule
from dpo_cli.training.trainer import Schedule
end = Schedule.on_step_end
def counted(self, args, state, control, model, **named):
    groups = [part._get_fsdp_state()._fsdp_param_group for part in model.modules() if isinstance(part, FSDPModule)]
    print("whole:", sum(group.is_unsharded for group in groups), "of", len(groups))
    return end(self, args, state, control, model=model, **named)
Schedule.on_step_end = counted
"""
    )
    (done,) = in_processes(code + MAIN, 1, "train", str(config("full", cpu_offload=True)))
    assert done.returncode == 0 and "later rows have at most" in done.stdout, done.stdout
    assert done.stdout.count("whole: 0 of 3") == 6, done.stdout
    assert apart(trained(config("one")), config("full").with_suffix("")) < 1e-4


@pytest.mark.long
def test_two_stages_divide_one_after_the_other(config: Config) -> None:
    """The second stage has whole weights: nothing is left of the first one's, which would keep its memory."""
    stages = [{"strategy": "sft", "fsdp": True}, {"strategy": "dpo", "fsdp": False}]
    code = """
import dpo_cli.commands.train as train
build = train._built
def seen(job, *given):
    print("runs of the stage before:", job.world.steps)
    return build(job, *given)
train._built = seen
"""
    codes, said = in_two_with(code, path := config("two", stages=stages))
    assert codes == [0, 0] and said[0].count("runs of the stage before: None") == 2, said
    alone = trained(config("alone", stages=stages))
    for stage in ("1-sft", "2-dpo"):
        assert_same(alone / stage, path.with_suffix("") / stage)


@pytest.mark.long
def test_processes_agree_on_a_model_that_one_of_them_scores_otherwise(config: Config) -> None:
    code = """
import os
from dataclasses import replace
from dpo_cli.scoring import forward
import dpo_cli.commands.train as train
choose, seen = train.choose, []
def other(*arguments):
    seen.append(1)
    scoring = choose(*arguments)
    return replace(scoring, shared=False) if len(seen) == 1 and os.environ["RANK_OF_TEST"] == "1" else scoring
train.choose = other
"""
    codes, said = in_two_with(code, config("apart", ddp_timeout=20, fsdp=True, max_steps=2))
    assert codes == [0, 0], said


@pytest.mark.long
def test_a_model_that_fails_with_shared_prompts_is_divided_with_padded_rows(config: Config) -> None:
    """The failure is within a run, in all processes, and none ends with it."""
    code = """
from dpo_cli.scoring import forward
laid_out = forward._laid_out_states
def broken(model, *arguments):
    model.base_model(input_ids=None)
    return laid_out(model, *arguments)
forward._laid_out_states = broken
"""
    codes, said = in_two_with(code, config("padded", fsdp=True, max_steps=2))
    assert codes == [0, 0] and "cannot run shared prompts" in said[0], said


@pytest.mark.long
def test_what_a_launcher_starts_is_checked_with_its_processes(config: Config) -> None:
    options = {"fsdp": True, "activation_offloading": True, "gradient_checkpointing": False}
    codes, said = in_two_with("", config("launched", **options))
    assert codes == [Exit.INVALID, Exit.INVALID] and "offloaded-weights" in said[0], said


@pytest.mark.long
@pytest.mark.parametrize("processes", [1, 2])
def test_a_process_holds_its_shards_and_few_whole_blocks(processes: int) -> None:
    """The bytes in memory are those of the bill; the forward pass of two tokens takes nothing else worth a name."""
    for whole, billed, held, gathered, peak in divided_weights.in_processes(processes):
        assert held == pytest.approx(billed, rel=0.001)
        assert held < whole if processes > 1 else held == whole  # on a CPU the RAM is the device
        assert peak == pytest.approx(gathered, rel=0.07)


def test_the_bills_in_the_docs_are_those_of_today() -> None:
    """An 8B model in 4 bits takes less than 4 GB of a card, if its weights wait in the RAM."""
    kept, made = Baseline.read(BASELINES / "divided-weights.json").table, Table(divided_weights.COLUMNS)
    kept.rows = [row for row in kept.rows if row[0] in divided_weights.MODELS]  # without the counted ones
    divided_weights.predict(made)
    assert compare(kept, made) == []
    (small,) = (row for row in made.rows if row[:4] == ["8B", "4-bit", 1, "in the RAM"])
    assert small[9] < 4


def test_torch_divides_no_sequence_that_has_a_mask() -> None:
    """The reason why `context_parallel_size` is refused; accelerate 1.15 leaves masks out, and pairs would see each other."""
    states = [torch.zeros(1, 1, 2, 8)] * 3
    with pytest.raises(NotImplementedError, match="attn_bias is not supported"):
        _attention._scaled_dot_product_ring_efficient_attention(None, *states, attn_bias=torch.zeros(2, 2))

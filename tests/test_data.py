"""Reading, checking and splitting pairs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from bad_rows import BAD_ROWS
from conftest import ROOT, made_row
from hypothesis import given
from hypothesis import strategies as st

from dpo_cli.config.config import load
from dpo_cli.data.formats import Pair
from dpo_cli.data.reader import read
from dpo_cli.data.split import is_held_out_prompt
from dpo_cli.hardware.probe import probe
from dpo_cli.inspection import inspect

BAD_LINES = {row: code for code, row in BAD_ROWS.items()}
GOOD = b'{"prompt": "a", "chosen": "b", "rejected": "c"}'


def test_every_bad_row_is_named_by_its_physical_line(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\n".join([GOOD, b"", *BAD_LINES, GOOD]) + b"\n")
    data = read(str(path))
    found = {}
    for problem in data.problems:
        for line in problem.lines or [problem.line]:
            found[line] = problem.code
    assert found == {line: code for line, code in enumerate(BAD_LINES.values(), start=3)}
    assert (data.rows, [pair.line for pair in data.load()]) == (len(BAD_LINES) + 2, [1, len(BAD_LINES) + 3])
    assert {problem.severity for problem in read(str(path), skip=True).problems} == {"warning"}


def test_a_json_list_has_lines_too(tmp_path: Path) -> None:
    path = tmp_path / "pairs.json"
    path.write_text('[\n{"prompt": "a", "chosen": "b", "rejected": "c"},\n\n{"prompt": "a"}\n]', encoding="utf-8")
    data = read(str(path))
    assert [pair.line for pair in data.load()] == [2]
    assert (data.problems[0].code, data.problems[0].line) == ("row-missing-key", 4)


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("missing.jsonl", None, "dataset-missing"),
        ("data.txt", b"", "dataset-format"),
        ("empty.jsonl", b"\n\n", "dataset-empty"),
        ("wide.jsonl", GOOD.decode().encode("utf-16"), "dataset-utf16"),
        ("object.json", b"{}", "dataset-not-list"),
        ("broken.json", b"[{]", "row-not-json"),
    ],
)
def test_an_unusable_file_is_one_problem(tmp_path: Path, name: str, content: bytes | None, code: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    assert [problem.code for problem in read(str(path)).problems] == [code]


def test_shipped_samples_are_clean() -> None:
    for path in (ROOT / "data-samples").glob("*.jsonl"):
        assert read(str(path)).problems == (), path
    sample = read(str(ROOT / "data-samples" / "assistant-preferences.jsonl"))
    assert sample.pairs >= 240
    assert sample.prompts >= 150
    lengths = [(len(str(pair.chosen).split()), len(str(pair.rejected).split())) for pair in sample.load()]
    assert 0.3 < sum(rejected >= chosen for chosen, rejected in lengths) / len(lengths) < 0.7
    assert sum(max(both) > 80 for both in lengths) < 0.1 * len(lengths)


def pairs(count: int) -> list[Pair]:
    return [Pair(f"prompt {i // 2}", "a", "b", i) for i in range(count)]


def split(rows: list[Pair], share: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    held_out = [pair for pair in rows if is_held_out_prompt(pair.prompt_key, share, seed)]
    return [pair for pair in rows if pair not in held_out], held_out


@given(share=st.floats(0, 0.99), seed=st.integers(0, 100), more=st.integers(0, 50))
def test_split_keeps_prompts_whole_and_is_stable_when_rows_are_appended(share: float, seed: int, more: int) -> None:
    train, held_out = split(pairs(60), share, seed)
    assert not {pair.prompt for pair in train} & {pair.prompt for pair in held_out}
    assert sorted([*train, *held_out], key=lambda pair: pair.line) == pairs(60)
    train_later, held_out_later = split(pairs(60 + more), share, seed)
    assert train_later[: len(train)] == train and held_out_later[: len(held_out)] == held_out
    assert share > 0 or not held_out


def test_split_holds_out_the_share_and_follows_the_seed() -> None:
    held_out = [split(pairs(4000), 0.2, seed)[1] for seed in (1, 2)]
    assert all(0.17 < len(side) / 4000 < 0.23 for side in held_out)
    assert held_out[0] != held_out[1]


@pytest.mark.parametrize("weight", [0.25, 0.5, 1, 2.5, 4])
def test_weights_act_on_what_is_trained_on_alone(tmp_path: Path, weight: float) -> None:
    """The same pairs are held out, each once; of those to train on there are as many as the weight says, in validate too."""
    rows = "".join(json.dumps({"prompt": f"q{i}", "chosen": "a", "rejected": "b"}) + "\n" for i in range(200))
    (tmp_path / "a.jsonl").write_text(rows, encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(rows.replace("q", "other "), encoding="utf-8")
    a, b, config = str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"), tmp_path / "config.json"
    sides = []
    for used in (1, weight):
        values = {"model_name": "m", "dataset": [{"path": a, "weight": used}, b], "eval_split": 0.2, "device": "cpu"}
        values |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "num_train_epochs": 1, "bf16": False}
        config.write_text(json.dumps({**values, "warmup_steps": 10**6}), encoding="utf-8")
        found = inspect(load(str(config)), probe(), with_fit=False)
        data, plan = found.require()
        sides.append(data.sides(plan.config))
        (never,) = [problem.message for problem in found.problems if problem.code == "never-warm"]
        assert f"the training has {len(sides[-1][0])} steps" in never
    (train, held_out), (weighed, held_out_too) = sides
    assert held_out == held_out_too and len({row.prompt_key for row in held_out}) == len(held_out) > 50
    per_file = [Counter(Path(row.file).name for row in rows) for rows in (train, weighed)]
    assert per_file[1] == {"a.jsonl": int(per_file[0]["a.jsonl"] * weight), "b.jsonl": per_file[0]["b.jsonl"]}


def test_the_split_has_a_seed_of_its_own(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps({"prompt": f"q{i}", "chosen": "a", "rejected": "b"}) + "\n" for i in range(40)), encoding="utf-8"
    )

    def held_out(*changes: str) -> list[str]:
        values = {"model_name": "m", "dataset": str(tmp_path / "p.jsonl"), "eval_split": 0.3, "bf16": False, "device": "cpu"}
        config.write_text(json.dumps(values), encoding="utf-8")
        data, plan = inspect(load(str(config), changes), probe(), with_fit=False).require()
        (tmp_path / "plan.json").write_text(json.dumps(plan.to_json()), encoding="utf-8")
        _, repeated = inspect(load(str(tmp_path / "plan.json"), ["seed=9"]), probe(), with_fit=False).require()
        assert repeated.config.split_seed == (plan.config.split_seed if any("split_seed" in word for word in changes) else 9)
        return [row.prompt_key for row in data.sides(plan.config)[1]]

    assert held_out("seed=1") != held_out("seed=2")  # as ever
    assert held_out("seed=1", "split_seed=2") == held_out("seed=2") == held_out("seed=3", "split_seed=2")


@pytest.mark.skipif(not (ROOT.parent / "shared" / "data").is_dir(), reason="../shared/data is not there")
def test_real_sets_are_read() -> None:
    folder = ROOT.parent / "shared" / "data"
    assert read(str(folder / "truthfulqa.train.jsonl")).pairs == 2848
    flipped = read(str(folder / "ultrafeedback_1k.label_flip_20.jsonl"))
    lines = sorted(line for problem in flipped.problems for line in problem.lines or [problem.line])
    assert lines == [34, 307, 479, 656, 834, 911, 998]  # 34 is a zero-width space


def test_rows_of_messages(pairs_file: Callable[..., Path]) -> None:
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    row = {key: [{"role": roles[key], "content": str(value)}] for key, value in made_row(0).items()}
    (pair,) = read(str(pairs_file([row]))).load()
    assert (pair.prompt, pair.chosen, pair.rejected) == (row["prompt"], row["chosen"], row["rejected"])

"""`dpo lint --write`: what is removed and why, what is kept as it was, and that the written file is clean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fork_server import dpo

from dpo_cli.data.cleaning import DOUBTFUL
from dpo_cli.data.dataset import read
from dpo_cli.data.lint import FINDINGS
from dpo_cli.errors import Exit
from dpo_cli.strategies.row_kinds import RATINGS

GOOD = {
    "prompt": "Name a river",
    "chosen": "The Nile is a long river in Africa.",
    "rejected": "Dunno",
    "id": 7,
    "category": "geo",
}
OTHER = {"prompt": "Name a hill", "chosen": "Mount Everest", "rejected": "A small lake"}
TEXT = "\n".join(
    [
        json.dumps(GOOD),
        json.dumps({**GOOD, "chosen": "The  nile is a long river in Africa."}),  # 2: a copy
        json.dumps({"prompt": "b", "chosen": "x", "rejected": "x"}),  # 3: identical
        "not json",  # 4
        json.dumps(OTHER),  # 5 and 6: both orders
        json.dumps({**OTHER, "chosen": OTHER["rejected"], "rejected": OTHER["chosen"]}),
        json.dumps(
            {"prompt": "Describe a sunset", "chosen": "The sunset was beautiful.", "rejected": "The sunset was pretty."}
        ),
        json.dumps({"prompt": "What is 7 times 8?", "chosen": "It is 56.", "rejected": "Nobody knows that."}),
    ]
)
REMOVED = {
    2: ["repeated-pairs"],
    3: ["row-identical"],
    4: ["row-not-json"],
    5: ["reversed-preference"],
    6: ["reversed-preference"],
    7: ["too-similar"],
}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_bad_and_doubtful_rows_are_removed_and_named(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(TEXT, encoding="utf-8")
    done = dpo("lint", "d.jsonl", "--write", "clean.jsonl", "--json", cwd=tmp_path)
    told = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    assert lines(tmp_path / "clean.jsonl") == [GOOD, json.loads(TEXT.splitlines()[-1])]
    removed = lines(tmp_path / "clean.removed.jsonl")
    assert {row["line"]: [reason["code"] for reason in row["reasons"]] for row in removed} == REMOVED
    assert [row["row"] for row in removed if row["line"] == 4] == [None]
    assert told["written"]["rows"] == 2 and told["written"]["removed"] == 6
    assert told["written"]["reasons"]["reversed-preference"] == 2
    card = (tmp_path / "clean.md").read_text(encoding="utf-8")
    assert "2 pairs of 2 different prompts, cleaned from 8 rows of `d.jsonl`" in card
    assert "- 2 rows: `reversed-preference`" in card and "| `id` | not read |" in card and "categories | geo 1" in card
    again = dpo("lint", "clean.jsonl", "--json", cwd=tmp_path)
    found = {problem["code"] for problem in json.loads(again.stdout)["problems"]}
    assert again.returncode == 0 and not found & DOUBTFUL and not any(code.startswith("row-") for code in found)


def test_without_write_it_only_looks(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(TEXT, encoding="utf-8")
    done = dpo("lint", "d.jsonl", "--json", cwd=tmp_path)
    told = json.loads(done.stdout)
    assert (done.returncode, told["ok"], told["written"]) == (Exit.INVALID, False, None)
    assert [path.name for path in tmp_path.iterdir()] == ["d.jsonl"]


def test_ratings_of_a_table(tmp_path: Path) -> None:
    """Of a Parquet file, whose rows have numbers: what is written has its columns, and reads as ratings."""
    rows = [{"prompt": f"question {i}", "completion": f"answer {i}", "thumbs_up": i % 2 == 0} for i in range(6)]
    rows += [{**rows[0], "thumbs_up": False}, {**rows[1]}]  # the first one contradicts itself, the second is a copy
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    (tmp_path / "c.json").write_text(json.dumps({"strategy": "kto", "dataset": "d.parquet", "eval_split": 0}), encoding="utf-8")
    done = dpo("lint", "c.json", "--write", "clean.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert lines(tmp_path / "clean.jsonl") == rows[1:6]
    assert read(str(tmp_path / "clean.jsonl"), kind=RATINGS).pairs == 5
    assert {row["line"] for row in lines(tmp_path / "clean.removed.jsonl")} == {1, 7, 8}
    assert "rated good, bad | 2, 3" in (tmp_path / "clean.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["d.jsonl", "--write", "there.jsonl"], 2, "already exists"),
        (["d.jsonl", "--write", "new.csv"], 2, "does not end in .jsonl"),
        (["d.jsonl", "--write", "no/new.jsonl"], 2, "does not exist"),
        (["nowhere.jsonl", "--write", "new.jsonl"], 3, "file not found"),
        (["bad.jsonl", "--write", "new.jsonl"], 3, "all 1 rows are bad or doubtful"),
        (["d.jsonl", "strategy=dpoo", "--write", "new.jsonl"], 3, "dpoo"),
    ],
)
def test_what_cannot_be_done_is_said(words: list[str], code: int, said: str, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(TEXT, encoding="utf-8")
    (tmp_path / "bad.jsonl").write_text("not json\n", encoding="utf-8")
    (tmp_path / "there.md").write_text("", encoding="utf-8")
    done = dpo("lint", *words, cwd=tmp_path)
    assert done.returncode == code and said in " ".join((done.stdout + done.stderr).split()), done.stderr
    assert not (tmp_path / "new.jsonl").exists()


def test_every_doubtful_code_is_one_of_a_finding() -> None:
    found = {finding.code for groups in FINDINGS.values() for group in groups for finding in group}
    assert DOUBTFUL - found == {
        *("reversed-preference", "contradicting-ratings"),  # made by another finding
        *("scores-contradict", "scores-tie", "label-unwanted", "prompt-in-both"),
    }

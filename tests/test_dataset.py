"""Reading, checking and splitting pairs."""

from __future__ import annotations

import codecs
import gzip
import json
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bad_rows import BAD_ROWS
from conftest import ROOT, made_row
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpo_cli.config.config import load
from dpo_cli.config.schema import inner_defaults
from dpo_cli.data import columns as names
from dpo_cli.data import dataset
from dpo_cli.data.annotation_exports import HELD
from dpo_cli.data.column_guess import guessed_columns
from dpo_cli.data.columns import Columns
from dpo_cli.data.comparisons import LABELS, LISTS
from dpo_cli.data.dataset import is_held_out_prompt, read
from dpo_cli.data.lint import Quality
from dpo_cli.data.prompts import read_prompts
from dpo_cli.data.rows import Pair
from dpo_cli.errors import InvalidInput
from dpo_cli.hardware.machine import probe
from dpo_cli.plan.preflight import inspect
from dpo_cli.strategies.row_kinds import DEMONSTRATIONS, PAIRS, RATINGS, Rows

BAD_LINES = {row: code for code, row in BAD_ROWS.items()}
GOOD = b'{"prompt": "a", "chosen": "b", "rejected": "c"}'


@pytest.mark.parametrize(
    ("row", "guess"),
    [
        ({"question": "a b", "good": "c d", "bad": "e f"}, ("question", "good", "bad")),
        ({"ask": "a b", "Good Answer": "c d", "Bad Answer": "e f", "id": "7"}, ("ask", "Good Answer", "Bad Answer")),
        ({"topic": "x y", "user_prompt": "a b", "winner": "c d", "loser": "e f"}, ("user_prompt", "winner", "loser")),
        ({"ask": "a b", "preferred": "c d", "dispreferred": "e f"}, ("ask", "preferred", "dispreferred")),
        ({"ask": "a b", "positive": "c d", "negative": "e f", "winner": "one"}, ("ask", "positive", "negative")),
        ({"ask": "a b", "topic": "x y", "good": "c d", "bad": "e f"}, None),  # which is the prompt
        ({"ask": "a b", "good": "c d", "better": "d d", "bad": "e f"}, None),
        ({"ask": "a b", "one": "c d", "two": "e f"}, None),
    ],
)
def test_the_columns_of_a_file_are_guessed_by_their_names(
    row: dict[str, str], guess: tuple[str, str, str] | None, tmp_path: Path
) -> None:
    """The fix of a file without a usable row is the line of a config, with which all its rows are usable."""
    path = tmp_path / "own.jsonl"
    path.write_text(f"{json.dumps(row)}\n" * 2, encoding="utf-8")
    columns = dict(zip(("prompt", "chosen", "rejected"), guess, strict=True)) if guess else None
    assert guessed_columns(str(path)) == columns
    (problem,) = read(str(path)).problems
    if columns is None:
        line = '"columns": {"prompt": "...", "chosen": "...", "rejected": "..."}'
        assert problem.fix == f"write {line}, with the names of your columns, into the config"
    else:
        assert problem.fix == f'write "columns": {json.dumps(columns)} into the config'
        assert read(str(path), columns=columns).pairs == 2


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


ROW_KEYS = [
    *{*names.SYSTEMS, *names.PROMPTS, *names.JOINED, *names.COMPLETIONS, *sum(names.RESPONSES, ()), *LABELS, *LISTS},
    *("tools", "history", "category", "text", "rejected_messages", "preferred_output", "non_preferred_output", "images"),
    *("response_1", "response_2", "score_1", "score_2", "scores", "score_chosen", "score_rejected", "is_good", "contexts"),
    *("fields", "suggestions", "data", "annotations", "completions", "predictions", "better.responses", "better.suggestion"),
]
MESSAGE_KEYS = [
    *("role", "from", "content", "value", "type", "tool_calls", "function_call", "function", "name", "arguments", "parameters"),
    *("messages", "values", "status", "question_name", "result", "from_name", "to_name", "rank", "post", *HELD),
]
LEAVES = (
    st.sampled_from(["", "q", "a b", "user", "assistant", "tool", "system", "gpt", "response_1", "1", "1e999", "response_1,q"])
    | st.sampled_from(["[]", "{'role': 'user', 'content': {[1]: 2}}", '{"selected": "left"}', '{"selected"', "[{'from': 1}]"])
    | st.sampled_from(["\n\nHuman: a\n\nAssistant: b", "q a b", "\0", "\ud800", 10**400, -(10**4000), 2**63, 0, 1, -1, 1.5])
    | st.sampled_from([float("nan"), float("inf"), True, False, None, [], {}])
    | st.text(max_size=4)
)


def _nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(MESSAGE_KEYS), inner, max_size=4)


def _within(value: Any, depth: int) -> Any:
    for _ in range(depth):
        value = [value]
    return value


VALUES = st.recursive(LEAVES, _nested, max_leaves=12) | st.builds(_within, LEAVES, st.sampled_from([90, 150, 900]))
VALUES |= VALUES.map(json.dumps) | VALUES.map(str)
STATED: list[dict[str, Any]] = [{}, {"responses": "q"}, {"responses": ["prompt", "text"], "preferred": "label"}]


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    rows=st.lists(st.dictionaries(st.sampled_from(ROW_KEYS), VALUES, max_size=6), min_size=1, max_size=3),
    stated=st.sampled_from(STATED),
    kind=st.sampled_from([PAIRS, DEMONSTRATIONS, RATINGS]),
)
def test_nothing_but_problems_comes_of_any_row(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], stated: dict[str, Any], kind: Rows
) -> None:
    path = tmp_path_factory.mktemp("any") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    quality = Quality(inner_defaults("quality"))
    data = read(str(path), columns=stated, kind=kind, observers=[quality] if kind is PAIRS else [])
    bad = {line for problem in data.problems if problem.severity == "error" for line in problem.lines or [problem.line]}
    assert data.rows == len(rows) and (data.pairs > 0 or bad or {problem.code for problem in data.problems} >= {"row-tie"})


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(rows=st.lists(st.dictionaries(st.sampled_from(ROW_KEYS), VALUES, max_size=6), min_size=1, max_size=3))
def test_nothing_but_problems_comes_of_any_prompt(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> None:
    path = tmp_path_factory.mktemp("any") / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    prompts = read_prompts(str(path))
    assert len(prompts.questions) + prompts.repeated + prompts.bad_rows == len(rows)
    assert prompts.questions or prompts.problems


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "{'role': 'user', 'content': {[1]: 2}}"},
        {"prompt": None, "chosen": [{"role": ["user"], "content": "a"}], "rejected": [{"role": "user", "content": "a"}]},
        {"score_chosen": 10**400, "score_rejected": 1},
        {"fields": {"q": "a"}, "suggestions": "x"},
        {"fields": {"q": "a"}, "responses": [{"values": [1]}]},
        {"data": {"q": "a"}, "annotations": [{"result": 5}], "predictions": 5},
        {"data": {"q": "a"}, "annotations": [{"result": [{"value": {}, "to_name": [["q"], ["q"]]}]}]},
        {"tools": "[" * 900 + "]" * 900},
        {"system": _within("s", 900)},
        {"prompt": [{"role": "tool", "content": _within("s", 900)}]},
    ],
)
def test_a_row_of_odd_types_is_a_bad_row(pairs_file: Callable[..., Path], row: dict[str, Any]) -> None:
    """An export is a row without chosen and rejected."""
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    odd = row if row.keys() & {"fields", "data"} else {**good, **row}
    data = read(str(pairs_file([good, odd, good])))
    assert (data.rows, data.pairs) == (3, 2) and [problem.line for problem in data.problems if problem.severity == "error"] == [
        2
    ]


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
        *(
            (f"{name}.jsonl", GOOD.decode().encode(name), "dataset-utf16")
            for name in ("utf-16", "utf-16-le", "utf-16-be", "utf-32-le")
        ),
        ("packed.jsonl.gz", gzip.compress(GOOD.decode().encode("utf-16-le"), mtime=0), "dataset-utf16"),
        ("table.csv", "prompt,chosen,rejected\na,b,c".encode("utf-16-be"), "dataset-utf16"),
        ("nul.jsonl", bytes(100), "row-not-json"),
        ("first.jsonl", b"\0" + GOOD, "row-not-json"),
        ("object.json", b"{}", "dataset-not-list"),
        ("broken.json", b"[{]", "row-not-json"),
    ],
)
def test_an_unusable_file_is_one_problem(tmp_path: Path, name: str, content: bytes | None, code: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    assert [problem.code for problem in read(str(path)).problems] == [code]


NAMED: Columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}


@pytest.mark.parametrize(
    ("file", "content", "columns", "words"),
    [
        ("a.csv", "prompt,chosen,rejected\n", None, ("the file has only a header", "add pairs")),
        ("a.jsonl", "", None, ("the file is empty", "add pairs")),
        ("a.xlsx", "PK", None, ("is not a .jsonl", "save it as CSV")),
        ("a.csv", "What is X?,It is.,No idea.\nWhat is Y?,It is fine.,Nope\n", None, ("is missing", "a header line before it")),
        (
            "a.csv",
            "What is X?,It is.,No.\nWhy?,So.,No\n",
            NAMED,
            ("question (columns.prompt)", "for example question,good,bad"),
        ),
        ("a.csv", "ask,good,bad\nWhy not,So it is,No\n", NAMED, ("question (columns.prompt)", "has ask, good, bad")),
        ("a.jsonl", b'{"prompt": "\xff"}\n', None, ("not valid UTF-8", "save the file as UTF-8")),
    ],
)
def test_a_file_without_a_usable_row_is_answered_with_what_to_do(
    tmp_path: Path, file: str, content: str | bytes, columns: Columns | None, words: tuple[str, str]
) -> None:
    path = tmp_path / file
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    (problem,) = read(str(path), columns=columns).problems
    assert words[0] in problem.message and words[1] in str(problem.fix)


ROWS = [{"prompt": f"p{i}", "chosen": "yes", "rejected": "no"} for i in range(2)]
COLUMNS = {name: [row[name] for row in ROWS] for name in ROWS[0]}


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"data": ROWS, "version": 1}, "lists of rows: data"),
        ({"test": ROWS[:1], "train": ROWS}, "lists of rows: test, train"),
        (COLUMNS, "a list for each column"),
        ({name: dict(enumerate(values)) for name, values in COLUMNS.items()}, "by columns"),
        (dict(enumerate(ROWS)), "rows by number"),
        ({"columns": [*ROWS[0]], "index": [0, 1], "data": [[*row.values()] for row in ROWS]}, "a pandas table (split)"),
    ],
)
def test_an_object_of_rows_is_named_and_its_fix_makes_a_list(
    tmp_path: Path, value: Any, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "all.json"
    path.write_text(json.dumps(value))
    (problem,) = read(str(path)).problems
    assert problem.code == "dataset-not-list" and says in problem.message and problem.fix is not None
    name = follow(problem.fix, monkeypatch)
    assert [pair.prompt for pair in read(name).load()] == ["p0", "p1"]
    with pytest.raises(FileExistsError):
        follow(problem.fix, monkeypatch)
    assert [pair.prompt for pair in read(name).load()] == ["p0", "p1"]


def follow(fix: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The file that a fix names, after its code was run in this process with the arguments that a shell would pass."""
    command, name = re.fullmatch(r"`(.+)` converts it: name (.+)", fix).groups()  # type: ignore[union-attr]
    _, option, code, *arguments = shlex.split(command)
    monkeypatch.setattr(sys, "argv", [option, *arguments])
    exec(code, {})
    return name


@pytest.mark.parametrize("name", ["it's.json", "$HOME `id`.json", 'a "b" \\ c.json', "packed it's.json.gz", "packed $x.json"])
def test_the_command_of_a_fix_stands_any_name_of_a_file(tmp_path: Path, name: str) -> None:
    """In a shell. A file that is packed may not be called so."""
    path = tmp_path / name
    text = codecs.BOM_UTF8 + json.dumps({"train split": ROWS}).encode()
    path.write_bytes(gzip.compress(text, mtime=0) if name.startswith("packed") else text)
    (problem,) = read(str(path)).problems
    command, target = re.fullmatch(r"`(.+)` converts it: name (.+)", problem.fix or "").groups()  # type: ignore[union-attr]
    command = command.replace("python", shlex.quote(sys.executable), 1)
    assert subprocess.run(command, shell=True, capture_output=True, timeout=60).stderr == b""
    assert read(target).pairs == len(ROWS)


def test_bad_prompts_have_the_fix_that_bad_rows_have(tmp_path: Path) -> None:
    """An object of rows, one of none, and a file that is cut off."""
    files = [tmp_path / name for name in ("rows.json", "none.json", "cut.jsonl.gz")]
    files[0].write_text(json.dumps({"train": ROWS}))
    files[1].write_text("7")
    files[2].write_bytes(gzip.compress(GOOD, mtime=0)[:-9])
    for path in files:
        fixes = [{problem.code: problem.fix for problem in of.problems} for of in (read_prompts(str(path)), read(str(path)))]
        code = "row-not-gzip" if path == files[2] else "dataset-not-list"
        assert fixes[0][code] == fixes[1][code] and "skip" not in (fixes[0][code] or "skip"), path


@pytest.mark.parametrize("row", [ROWS[0], {name: [{"role": "user", "content": "q"}] for name in ROWS[0]}])
def test_one_row_is_no_object_of_rows(tmp_path: Path, row: Any) -> None:
    (tmp_path / "one.json").write_text(json.dumps(row))
    (problem,) = read(str(tmp_path / "one.json")).problems
    assert problem.fix is not None and problem.fix.startswith("write the rows between [ and ]")


def test_a_null_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "null.jsonl").write_text('{"prompt": "a", "chosen": null, "rejected": "b"}')
    (problem,) = read(str(tmp_path / "null.jsonl")).problems
    assert problem.message == "chosen is null (line 1, it has chosen (null), prompt, rejected)"


def test_shipped_samples_are_clean() -> None:
    for path in (ROOT / "data-samples").glob("*.jsonl"):
        assert read(str(path), kind=RATINGS if "ratings" in path.name else PAIRS).problems == (), path
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
        sides.append([[row for held, row in data.rows(plan.config) if held is side] for side in (False, True)])
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
        return [row.prompt_key for is_held_out, row in data.rows(plan.config) if is_held_out]

    assert held_out("seed=1") != held_out("seed=2")  # as ever
    assert held_out("seed=1", "split_seed=2") == held_out("seed=2") == held_out("seed=3", "split_seed=2")


@pytest.mark.skipif(not (ROOT.parent / "shared" / "data").is_dir(), reason="../shared/data is not there")
def test_real_sets_are_read() -> None:
    folder = ROOT.parent / "shared" / "data"
    assert read(str(folder / "truthfulqa.train.jsonl")).pairs == 2848
    flipped = read(str(folder / "ultrafeedback_1k.label_flip_20.jsonl"))
    lines = sorted(line for problem in flipped.problems for line in problem.lines or [problem.line])
    assert lines == [34, 307, 479, 656, 834, 911, 998]  # 34 is a zero-width space


def test_near_duplicates_are_read_again_as_they_were_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a file with rows of several shapes, where the first row decides what a label counts from."""
    long = "the quick brown fox jumps over the lazy dog while the sun goes down behind the old red barn "

    def labelled(i: int) -> dict[str, object]:
        return {"prompt": f"{long} {i} times", "responses": [f"{long} yes", f"{long} no, never"], "label": 1 + i % 2}

    rows = [labelled(1), {"prompt": "p", "chosen": "a", "rejected": "b"}, *map(labelled, range(2, 8))]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = []
    for small in (0, 1 << 20):  # read again, and in memory
        monkeypatch.setattr(dataset, "SMALL_BYTES", small)
        quality = Quality(inner_defaults("quality"))
        data = read(str(path), observers=[quality])
        assert (data.kept is None) == (small == 0) and data.pairs == 8
        found.append(quality.problems(data))
    assert found[0] == found[1] and "near-duplicates" in {problem.code for problem in found[0]}


def test_rows_of_messages(pairs_file: Callable[..., Path]) -> None:
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    row = {key: [{"role": roles[key], "content": str(value)}] for key, value in made_row(0).items()}
    (pair,) = read(str(pairs_file([row]))).load()
    assert (pair.prompt, pair.chosen, pair.rejected) == (row["prompt"], row["chosen"], row["rejected"])


def test_a_file_that_changes_after_it_was_read_stops_the_training(tmp_path: Path) -> None:
    """Else a run would hold the hash of rows that it was not trained on."""
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n', encoding="utf-8")
    data = read(str(path))
    data.require_unchanged()
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "d!"}\n', encoding="utf-8")
    with pytest.raises(InvalidInput, match=r"pairs\.jsonl changed while"):
        data.require_unchanged()
    path.unlink()
    with pytest.raises(InvalidInput, match=r"pairs\.jsonl changed while"):
        data.require_unchanged()

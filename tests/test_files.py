"""The files that rows stand in: the same rows from each kind of file, which files of a folder are read, what cannot be read."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from builders import tiny_tokenizer
from test_rows import ROWS, lint, write

from dpo_cli.data import files
from dpo_cli.data.dataset import Bad, read, sources_of, stream
from dpo_cli.data.prompts import read_prompts
from dpo_cli.data.text_features import plain, visible
from dpo_cli.data.tokens import encode
from dpo_cli.errors import Problem

BOM = b"\xef\xbb\xbf"
TEMPLATE = """\
{%- if tools %}{{ tools | tojson }}{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}:{{ message.content }}
{%- for call in message.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|im_end|>
{%- endfor %}{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"""


def row(number: int) -> dict[str, Any]:
    """Messages: every second row answers with a call of a tool, and their tools and arguments differ."""
    user = [{"role": "user", "content": f'Question {number}: "é", or\nnot, 🌊?'}]
    told = {"prompt": user, "rejected": [{"role": "assistant", "content": f"No {number}."}]}
    if number % 2:
        return told | {"chosen": [{"role": "assistant", "content": f"Yes, {number}."}], "tools": []}
    name = "city" if number % 4 else "river"
    call = {"type": "function", "function": {"name": "look_up", "arguments": {name: f"Oslo {number}"}}}
    properties = {name: {"type": "string"}}
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": properties}}}
    return told | {"chosen": [{"role": "assistant", "content": "", "tool_calls": [call]}], "tools": [tool]}


def as_cells(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value if isinstance(value, str) else json.dumps(value) for key, value in one.items()} for one in rows]


def minified(place: Path, rows: list[dict[str, Any]]) -> Path:
    path = place / "one-line.json"
    path.write_text(json.dumps(rows, separators=(",", ":")), encoding="utf-8")
    return path


def zipped(path: Path, name: str) -> Path:
    """The file packed with gzip, under this name next to it."""
    packed = path.with_name(name)
    packed.write_bytes(gzip.compress(path.read_bytes(), mtime=0))
    return packed


def folder(place: Path, rows: list[dict[str, Any]]) -> Path:
    (place / "folder").mkdir()
    write(place / "folder" / "a.jsonl", rows[:20])
    write(place / "folder" / "b.json", rows[20:])
    return place / "folder"


FORMS: dict[str, Callable[[Path, list[dict[str, Any]]], Path]] = {
    "JSON list": lambda place, rows: write(place / "pairs.json", rows),
    "JSON list on one line": minified,
    "CSV": lambda place, rows: write(place / "pairs.csv", as_cells(rows)),
    "TSV": lambda place, rows: write(place / "pairs.tsv", as_cells(rows)),
    "Parquet": lambda place, rows: write(place / "pairs.parquet", rows),
    "gzip": lambda place, rows: zipped(write(place / "pairs.jsonl", rows), "packed.jsonl.gz"),
    "gzip without its suffix": lambda place, rows: zipped(write(place / "pairs.jsonl", rows), "packed.jsonl"),
    "gzip of a JSON list": lambda place, rows: zipped(write(place / "pairs.json", rows), "packed.JSON.gz"),
    "gzip of CSV": lambda place, rows: zipped(write(place / "pairs.csv", as_cells(rows)), "packed.csv.gz"),
    "folder": folder,
}


@pytest.mark.parametrize("form", FORMS)
def test_the_same_rows_have_the_same_tokens_in_every_kind_of_file(tmp_path: Path, form: str) -> None:
    rows, tokenizer = [row(number) for number in range(40)], tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE

    def ids(path: Path) -> list[tuple[list[int], ...]]:
        data = read(str(path))
        assert [problem.message for problem in data.problems if problem.severity != "hint"] == []
        return [(each.prompt_ids, *each.responses) for each in encode(data.load(), tokenizer)]

    expected = ids(write(tmp_path / "expected.jsonl", rows))
    assert len(expected) == 40 and "arguments" in tokenizer.decode(expected[0][1])
    assert ids(FORMS[form](tmp_path, rows)) == expected


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv"])
@pytest.mark.parametrize("is_packed", [False, True])
def test_byte_order_marks_are_no_part_of_rows(tmp_path: Path, suffix: str, is_packed: bool) -> None:
    path = write(tmp_path / f"pairs{suffix}", ROWS)
    path.write_bytes(BOM + path.read_bytes())
    data = read(str(zipped(path, f"packed{suffix}.gz") if is_packed else path))
    assert data.problems == () and [pair.prompt for pair in data.load()] == [each["prompt"] for each in ROWS]


def test_joined_files_have_marks_in_the_middle(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", ROWS)
    path.write_bytes((BOM + path.read_bytes()) * 2)
    assert read(str(path)).pairs == 10


def test_prompts_are_read_packed_and_without_marks(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(BOM + "one\n\nzwei ü\n".encode())
    for file in (path, zipped(path, "packed.txt.gz"), zipped(path, "packed.txt")):
        found = read_prompts(str(file))
        assert ([question.prompt for question in found.questions], found.problems) == (["one", "zwei ü"], ())
        assert [question.line for question in found.questions] == [1, 3]


def bad(path: Path) -> list[tuple[int, str]]:
    return [(each.line, each.code) for each in stream(sources_of(str(path))) if isinstance(each, Bad)]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
@pytest.mark.parametrize("kept", [3, 11, 0.5, -4])
def test_a_cut_gzip_file_is_a_bad_row(tmp_path: Path, suffix: str, kept: float) -> None:
    """Cut in its header, behind it, within its content, and in its check sum."""
    rows = [{"prompt": f"{os.urandom(2000).hex()} {number}", "chosen": "yes", "rejected": "no"} for number in range(99)]
    path = zipped(write(tmp_path / f"pairs{suffix}", rows), f"cut{suffix}.gz")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept) if kept == 0.5 else int(kept)])
    data = read(str(path), skip=True)
    assert [code for _, code in bad(path)] == ["row-not-gzip"]
    assert data.pairs == (0 if suffix == ".json" or kept in (3, 11) else 99 if kept == -4 else pytest.approx(49, abs=3))


def test_a_changed_gzip_file_is_a_bad_row(tmp_path: Path) -> None:
    path = zipped(write(tmp_path / "pairs.jsonl", ROWS), "changed.jsonl.gz")
    for at in (12, 30, -5):
        content = bytearray(path.read_bytes())
        content[at] ^= 0xFF
        changed = tmp_path / "changed.jsonl"
        changed.write_bytes(content)
        assert {code for _, code in bad(changed)} & {"row-not-gzip", "row-not-json", "row-not-utf8"}


def test_what_a_packed_file_unpacks_to_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line, a JSON list and a line of a table; the good rows behind lines are read."""
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 1 << 16)
    monkeypatch.setattr(files, "MAX_LIST_BYTES", 1 << 20)
    long = {"prompt": "a" * (1 << 21), "chosen": "yes", "rejected": "no"}
    for suffix, place, code in ((".jsonl", 1, "row-too-long"), (".json", 1, "row-too-long"), (".csv", 2, "row-not-csv")):
        path = zipped(write(tmp_path / f"p{suffix}", [long, ROWS[0]]), f"p{suffix}.gz")
        assert bad(path) == [(place, code)]
        assert read(str(path), skip=True).pairs == (suffix != ".json")


@pytest.mark.parametrize(
    ("text", "places", "unit"),
    [
        ('[{"a": 1}, {"b": 2}, {"c": 3}]', [1, 2, 3], "row"),
        ('[\n{"a": 1},\n{"b": 2}, {"c": 3}]', [1, 2, 3], "row"),
        ('[{"a": 1\n}, {"b": 2\n}, {"c": 3}]', [1, 2, 3], "line"),
        ('\n\n[\n{"a": 1},\n\n{"b": 2}]', [4, 6], "line"),
        ('[\n{"a": 1}, {"b": 2}, {"c"', [1, 2, 3], "row"),
        ('[\n{"a": 1},\n{"b": 2} {"c"', [1, 2, 3], "row"),
        ("[1, 2]", [1, 2], "row"),
        ("[\n1]\n[\n2]\n", [2, 3], "line"),
    ],
)
def test_a_json_list_counts_lines_or_else_rows(tmp_path: Path, text: str, places: list[int], unit: str) -> None:
    path = tmp_path / "pairs.json"
    path.write_text(text, encoding="utf-8")
    assert [place for place, _ in bad(path)] == places
    assert files.unit(str(path)) == unit


def test_messages_call_places_what_they_are(tmp_path: Path) -> None:
    rows = [ROWS[0], {**ROWS[1], "rejected": ""}, ROWS[2], {**ROWS[3], "rejected": ""}, {**ROWS[4], "rejected": 3}]
    packed = zipped(minified(tmp_path, rows), "packed.json.gz")
    for path, several, one in (
        (packed, "2 rows (2, 4): rejected is empty", "row 5: rejected is int, not a string or a list of messages"),
        (write(tmp_path / "p.jsonl", rows), "2 rows (lines 2, 4): rejected is empty", "rejected is int, not a string"),
    ):
        problems = {problem.code: problem for problem in read(str(path)).problems}
        assert problems["row-empty"].message == several and problems["row-empty"].lines == (2, 4)
        assert problems["row-wrong-type"].message.startswith(one) and problems["row-wrong-type"].line == 5
    (lacking,) = read(str(write(tmp_path / "p.parquet", [{"prompt": "q"}]))).problems
    assert lacking.message.startswith("row 1: chosen is missing") and "(row 1, it has prompt" in lacking.message


@pytest.mark.parametrize(
    ("names", "read_names"),
    [
        ("train_prefs-00000-of-00001 test_prefs-00000-of-00001", "train_prefs-00000-of-00001"),
        ("train-00000-of-00002 train-00001-of-00002 validation", "train-00000-of-00002 train-00001-of-00002"),
        ("train/0000 train/0001 test/0000", "train/0000 train/0001"),
        ("data/train-0 data/test-0", "data/train-0"),
        ("Train Test", "Train"),
        ("pairs test", "pairs"),
        ("pairs latest devices constraints", "constraints devices latest pairs"),
        ("part-1 part-2 others", "others part-1 part-2"),
        ("test eval", "eval test"),
    ],
)
def test_a_folder_is_split_by_the_names_of_its_files(tmp_path: Path, names: str, read_names: str) -> None:
    for name in names.split():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / f"{name}.jsonl", ROWS)
    (tmp_path / "README.md").write_text("notes", encoding="utf-8")
    expected = [f"{name}.jsonl" for name in read_names.split()]
    assert [str(Path(source.path).relative_to(tmp_path)) for source in sources_of(str(tmp_path))] == expected
    (said,) = [problem for problem in read(str(tmp_path)).problems if problem.code == "folder-files"]
    chosen, _, rest = said.message.partition("; not read: ")
    assert all(Path(name).name in chosen for name in expected) and "README.md" in rest
    assert all(f"{name}.jsonl" in rest for name in set(names.split()) - set(read_names.split()))


@pytest.mark.parametrize(
    ("names", "read_name"),
    [
        (["train.jsonl", "train.csv"], "train.jsonl"),
        (["train.jsonl", "train.jsonl.gz"], "train.jsonl"),
        (["train.csv.gz", "train.json.gz", "test.csv"], "train.json.gz"),
        (["train-00000-of-00001.parquet", "train.jsonl"], "train-00000-of-00001.parquet"),
        (["pairs.tsv", "pairs.csv"], "pairs.csv"),
        (["train.jsonl", "train_stats.json", "train-metadata.json"], "train.jsonl"),
    ],
)
def test_the_same_rows_in_several_files_are_read_once(tmp_path: Path, names: list[str], read_name: str) -> None:
    for name in names:
        path = write(tmp_path / name.removesuffix(".gz"), ROWS) if not (tmp_path / name.removesuffix(".gz")).exists() else None
        if name.endswith(".gz"):
            packed = gzip.compress((tmp_path / name.removesuffix(".gz")).read_bytes())
            (tmp_path / name).write_bytes(packed)
            if path is not None:
                path.unlink()
    data = read(str(tmp_path))
    assert (data.pairs, [Path(source.path).name for source in data.sources]) == (len(ROWS), [read_name])
    (hint,) = data.problems
    assert "not read: " in hint.message and all(name in hint.message for name in names)


def test_a_split_of_a_folder_can_be_named(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for count, name in enumerate(("train_prefs-0", "train_sft-0", "test_prefs-0"), 1):
        write(folder / f"{name}.parquet", ROWS[:count])
    (several,) = read(str(folder)).problems
    assert several.code == "dataset-split" and "train_prefs, train_sft" in several.message
    assert read(f"{folder}:train_sft").pairs == 2 and read([{"path": f"{folder}:test_prefs", "weight": 2}]).pairs == 3
    (none,) = read(f"{folder}:valid").problems
    assert none.code == "dataset-split" and "test_prefs, train_prefs, train_sft" in (none.fix or "")


def fault(path: Path) -> Problem:
    (problem,) = read(str(path)).problems
    return problem


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.parquet", "pairs.json", "pairs.csv.gz", "pairs.arrow", "pairs.bin"])
def test_a_pointer_of_git_lfs_is_named_whatever_its_suffix(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", encoding="utf-8")
    problem = fault(tmp_path / name)
    assert problem.code == "dataset-pointer" and "git lfs pull" in (problem.fix or "")


@pytest.mark.parametrize(
    ("form", "name", "tool"),
    [
        (".jsonl", "pairs.jsonl.xz", "xz"),
        (".csv", "pairs.csv", "xz"),
        (".parquet", "pairs.parquet.gz", "gunzip"),
        (".parquet", "pairs.parquet", "gunzip"),
    ],
)
def test_the_command_that_is_named_unpacks(tmp_path: Path, form: str, name: str, tool: str) -> None:
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    content = write(tmp_path / f"plain{form}", ROWS).read_bytes()
    (tmp_path / name).write_bytes((lzma if tool == "xz" else gzip).compress(content))
    problem = fault(tmp_path / name)
    assert problem.code == "dataset-packed"
    _, command, name_it = (problem.fix or "").split("`")
    subprocess.run(command, shell=True, check=True)
    assert read(name_it.rpartition(" name ")[2]).pairs == 5


@pytest.mark.parametrize(
    ("name", "start", "fix"),
    [
        ("pairs.zip", b"PK\x03\x04", "unzip"),
        ("pairs.jsonl.zst", b"\x28\xb5\x2f\xfd", "zstd -d <"),
        ("pairs.jsonl.bz2", b"BZh91AY", "bunzip2 <"),
        ("pairs.tar.gz", gzip.compress(b"x", mtime=0), "tar -xf"),
        ("pairs.gz", gzip.compress(b"x", mtime=0), "pairs.jsonl.gz"),
    ],
)
def test_packed_files_are_named(tmp_path: Path, name: str, start: bytes, fix: str) -> None:
    (tmp_path / name).write_bytes(start)
    problem = fault(tmp_path / name)
    assert problem.code == "dataset-packed" and fix in (problem.fix or "")


def test_a_spreadsheet_is_no_packed_dataset(tmp_path: Path) -> None:
    (tmp_path / "pairs.xlsx").write_bytes(b"PK\x03\x04")
    assert fault(tmp_path / "pairs.xlsx").code == "dataset-format"


def test_what_save_to_disk_wrote_is_named_with_what_converts_it(tmp_path: Path) -> None:
    """Of a dataset, of a dictionary of them, of a folder of Arrow files and of one such file; the advice is followed."""
    import datasets

    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(tmp_path / "it's $one")
    datasets.DatasetDict({"test": whole.select([0]), "train": whole}).save_to_disk(tmp_path / "both")
    (tmp_path / "arrows").mkdir()
    shutil.copy(tmp_path / "it's $one" / "data-00000-of-00001.arrow", tmp_path / "arrows")
    for path in (
        tmp_path / "it's $one",
        tmp_path / "both",
        tmp_path / "arrows",
        tmp_path / "arrows" / "data-00000-of-00001.arrow",
    ):
        problem = fault(path)
        assert (problem.code, problem.severity) == ("dataset-arrow", "error")
        command, _, name = (problem.fix or "").partition("` converts it: name ")
        done = [sys.executable, *shlex.split(command.removeprefix("`"))[1:]]
        is_there = Path(name).exists()  # of the folder with this file, and not overwritten
        errors = subprocess.run(done, capture_output=True, text=True).stderr
        assert is_there == ("FileExistsError" in errors) == (path.suffix == ".arrow"), errors
        assert read(name).pairs == 5


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("plain", "plain"),
        ("\u200b\u200c\u200d\u2060\ufeff\u00ad\u200e\u202a", ""),
        ("a\u00adb\u200bc", "abc"),
        ("👨\u200d👩\u200d👧 ❤\ufe0f", "👨👩👧 ❤"),
        ("می\u200cخواهم", "میخواهم"),
        ("\U0001f3f4\U000e0067\U000e0062\U000e007f", "\U0001f3f4\U000e0067\U000e0062\U000e007f"),  # a flag
        ("x\U000e0067\U000e0062", "x"),
        ("\u3164\u2800", "  "),
        ("é ü 漢字", "é ü 漢字"),
    ],
)
def test_what_can_be_seen(text: str, seen: str) -> None:
    assert visible(text) == seen


def test_pairs_that_differ_in_unseen_characters_are_repeated_and_trained_as_written(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "chosen": chosen, "rejected": "no"} for chosen in ("yes", "y\u00ades\u200b")]
    data, problems = lint(write(tmp_path / "p.jsonl", rows))
    assert [problem.line for problem in problems if problem.code == "repeated-pairs"] == [2]
    assert data.load()[1].responses[0] == "y\u00ades\u200b"


def test_texts_that_look_alike_are_plainly_the_same() -> None:
    assert plain("Yes,\u00a0it\u200b is.") == plain("yes, it is.") and plain("\u2800 \u200b") == ""

"""Large data is examined and tokenised once: the next start reads the same from the cache, nothing stale or damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Run, made_row
from transformers import PreTrainedTokenizerFast

from dpo_cli.config.config import load
from dpo_cli.data import encoded, tokens
from dpo_cli.errors import InvalidInput
from dpo_cli.hardware.machine import probe
from dpo_cli.plan import examination
from dpo_cli.plan.preflight import inspect
from dpo_cli.plan.tokenized import Prepared, prepare
from dpo_cli.storage import processes
from dpo_cli.storage import user_cache as cache
from dpo_cli.storage.digests import sha256_of_all

Start = Callable[..., Prepared]


@pytest.fixture(autouse=True)
def all_data_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examination, "LARGE_BYTES", 0)


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def start(
    tmp_path: Path,
    tiny_model_dir: Path,
    pairs_file: Callable[..., Path],
    tokenizer: PreTrainedTokenizerFast,
    told: list[str],
) -> Start:
    """The rows of a config with these values, after an inspection."""
    pairs_file()

    def prepared(**options: object) -> Prepared:
        config = tmp_path / "config.json"
        values = {"model_name": str(tiny_model_dir), "dataset": str(tmp_path / "pairs.jsonl"), "device": "cpu", "bf16": False}
        config.write_text(json.dumps({**values, "eval_split": 0.25, **options}), encoding="utf-8")
        data, plan = inspect(load(str(config)), probe(), with_fit=False).require()
        return prepare(data, tokenizer, plan, None, told.append)

    return prepared


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets a number for each time that rows are tokenised."""
    times: list[int] = []
    before = tokens.encoded_into

    def counted(*arguments: Any) -> tokens.Encodings:
        times.append(1)
        return before(*arguments)

    monkeypatch.setattr("dpo_cli.plan.tokenized.encoded_into", counted)
    return times


def same(one: Prepared, other: Prepared) -> bool:
    rows = list(one.train) == list(other.train) and list(one.held_out) == list(other.held_out)
    return rows and (one.counts, one.problems) == (other.counts, other.problems)


def test_the_second_start_reads(start: Start, made: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = start(), start()
    assert len(made) == 1 and same(first, second) and len(first.train) + len(first.held_out) == 24
    monkeypatch.setattr(examination, "LARGE_BYTES", 1 << 30)
    assert same(first, start()) and len(made) == 2  # in memory


def test_in_processes_they_are_the_same(start: Start, monkeypatch: pytest.MonkeyPatch, user_cache: Path) -> None:
    here = start()
    shutil.rmtree(user_cache / "tokens")
    for name, value in (("AT_ONCE", 5), ("FEW", 0)):
        monkeypatch.setattr(tokens, name, value)
    monkeypatch.setattr(processes, "cores", lambda: 2)
    counts: list[int] = []
    before = processes.ProcessPoolExecutor

    def counted(count: int, *arguments: Any) -> Any:
        counts.append(count)
        return before(count, *arguments)

    monkeypatch.setattr(processes, "ProcessPoolExecutor", counted)
    assert same(here, start()) and counts == [2] * processes.CAN_FORK


def rewrite(place: Path, **changes: object) -> None:
    rows = [{**made_row(i), **changes} for i in range(24)]
    (place / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.parametrize(
    "options",
    [{"max_seq_length": 30}, {"eval_split": 0.5}, {"split_seed": 3}, {"columns": {"prompt": "chosen", "chosen": "prompt"}}],
)
def test_other_options_are_other_tokens(options: dict[str, object], start: Start, made: list[int]) -> None:
    first = start()
    second = start(**options)
    assert len(made) == 2 and not same(first, second) and same(second, start(**options)) and same(first, start())
    assert len(made) == 2


def test_other_rows_are_other_tokens(start: Start, made: list[int], tmp_path: Path) -> None:
    first = start()
    rewrite(tmp_path, chosen="a better one")
    second = start()
    assert len(made) == 2 and second.counts.digest != first.counts.digest and second.train[0].row.responses[0] == "a better one"
    rewrite(tmp_path)
    assert same(first, start()) and len(made) == 2


def test_another_template_is_other_tokens(
    start: Start, made: list[int], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = start()
    monkeypatch.setattr(tokenizer, "chat_template", str(tokenizer.chat_template) + "{# #}x")
    assert not same(first, start()) and len(made) == 2


def spoil(file: Path) -> None:
    """In a new file: the rows of an earlier start still read the old one."""
    (spoilt := file.with_name("spoilt")).write_bytes(b"{" + file.read_bytes()[1:-1])
    spoilt.replace(file)


@pytest.mark.parametrize("name", ["parts.json", "0/0.ids", "0/rows", "1/2.ends", "1/marks"])
@pytest.mark.parametrize("damage", [spoil, Path.unlink])
def test_what_is_damaged_is_made_again(
    name: str, damage: Callable[[Path], object], start: Start, made: list[int], user_cache: Path
) -> None:
    first = start()
    (folder,) = (user_cache / "tokens").iterdir()
    damage(folder / name)
    assert same(first, start()) and len(made) == 2
    assert same(first, start()) and len(made) == 2


def test_damage_that_cannot_be_removed_is_not_read(
    start: Start, made: list[int], user_cache: Path, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = start()
    (folder,) = (user_cache / "tokens").iterdir()
    spoil(folder / "0" / "0.ids")
    monkeypatch.setattr("dpo_cli.data.token_cache.shutil.rmtree", lambda *_, **__: None)
    assert same(first, start()) and len(made) == 2
    assert "are damaged" in told[0] and "cannot be removed" in told[1]


def test_a_disk_that_fills_at_the_last_byte(start: Start, told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A file writes what it still holds when it is closed."""

    def full(self: object) -> memoryview:
        if getattr(self, "_folder") is not None:  # noqa: B009 - of a column on the disk
            raise OSError(28, "No space left on device")
        return before(self)

    before: Any = encoded._Column.view
    monkeypatch.setattr(encoded._Column, "view", full)
    assert len(start().train) > 0 and "No space left on device" in told[0]


def test_damaged_findings_are_made_again(start: Start, user_cache: Path) -> None:
    first = start()
    (file,) = (user_cache / "findings").glob("*/found.json")
    file.write_text("{}")
    assert same(first, start())


def test_findings_of_a_file_that_changed_meanwhile_are_not_kept(
    start: Start, tmp_path: Path, user_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are of other rows than the hash, which was computed before."""
    before = examination.digests_of

    def meanwhile(given: Any) -> Any:
        digests = before(given)
        rewrite(tmp_path, chosen="of another length")
        return digests

    monkeypatch.setattr(examination, "digests_of", meanwhile)
    start()
    assert not (user_cache / "findings").exists()


def test_a_name_that_is_not_utf8(start: Start, tmp_path: Path, user_cache: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "pairs.jsonl").rename(tmp_path / "data" / "d\udce9part.jsonl")
    assert same(start(dataset=str(tmp_path / "data")), start(dataset=str(tmp_path / "data")))
    assert [entry.name.count("part.jsonl") for entry in cache.entries() if entry.kind != "gguf"] == [1, 1]


def test_an_error_of_the_rows_is_not_one_of_the_cache(start: Start, told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise OSError("the disk of the dataset")

    monkeypatch.setattr("dpo_cli.plan.tokenized.encoded_into", fails)
    with pytest.raises(OSError, match="the disk of the dataset"):
        start()
    assert told == []


def test_without_room_the_tokens_stay_in_memory(start: Start, user_cache: Path, told: list[str]) -> None:
    first = start()
    for kind in ("tokens", "findings"):
        shutil.rmtree(user_cache / kind)
        (user_cache / kind).write_text("")  # not a folder
    assert same(first, start())
    (note,) = told
    assert note.startswith(f"note: the tokens are not kept in {user_cache / 'tokens'} for later starts: ")


def test_findings_are_those_of_the_first_time(tmp_path: Path, pairs_file: Callable[..., Path], tiny_model_dir: Path) -> None:
    rows = [made_row(i) for i in range(24)] + [made_row(3), {**made_row(5), "chosen": "<|im_start|>x", "notes": "unread"}]
    values = {"model_name": str(tiny_model_dir), "dataset": str(pairs_file(rows)), "device": "cpu", "bf16": False}
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    first, second = (inspect(load(str(tmp_path / "config.json")), probe(), rendered_rows=8) for _ in range(2))
    assert first.problems == second.problems and len(first.problems) > 3
    assert first.data is not None and second.data is not None
    assert first.data.to_json() == second.data.to_json() and first.data.held_out_words == second.data.held_out_words
    assert first.data.train.kept is not None and second.data.train.kept is None  # of an earlier start


def test_a_file_that_changes_while_it_is_read_stops(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tokens.encoded_into

    def meanwhile(*arguments: Any) -> tokens.Encodings:
        made = before(*arguments)
        rewrite(tmp_path, chosen="changed")
        return made

    monkeypatch.setattr("dpo_cli.plan.tokenized.encoded_into", meanwhile)
    with pytest.raises(InvalidInput, match="changed while it was read"):
        start()


def test_a_run_has_the_same_bits_with_the_cache_and_without(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = []
    for large in (0, 0, 1 << 30):  # made, read, in memory
        monkeypatch.setattr(examination, "LARGE_BYTES", large)
        _, place = run(eval_split=0.25)
        adapters.append((sha256_of_all(place / "adapter"), (place / "metrics.jsonl").exists()))
    assert len(set(adapters)) == 1


def test_the_cache_lists_and_prunes_them(start: Start, user_cache: Path) -> None:
    start()
    (user_cache / "gguf").unlink()  # the models of the real cache
    kinds = {entry.kind: entry.name for entry in cache.entries()}
    assert kinds.keys() == {"tokens", "findings"} and all("pairs.jsonl" in name for name in kinds.values())
    assert {entry.kind for entry in cache.prune(float("inf"))} == {"tokens", "findings"} and cache.entries() == []

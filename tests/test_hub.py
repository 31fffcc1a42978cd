"""Datasets of the hub, as far as can be seen without one: what is cached is read, what is not is told."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants
from test_rows import ROWS, write
from tokenizers import Tokenizer

from dpo_cli.data import hub_datasets
from dpo_cli.data.dataset import hub_ids, read, sources_of
from dpo_cli.data.lengths import Lengths
from dpo_cli.errors import RunFailed
from dpo_cli.models.model_files import ModelFiles
from dpo_cli.models.source import ModelSource
from dpo_cli.providers.huggingface import HuggingFace
from dpo_cli.strategies.row_kinds import DEMONSTRATIONS

COMMIT = "0" * 40
FILE = {"type": "file", "path": "train.jsonl", "size": 2, "oid": "0" * 40}
ABOUT = {"id": "owner/any", "sha": COMMIT, "siblings": [{"rfilename": "train.jsonl"}]}


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub on this machine, with owner/any as a model and a dataset of one file."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            is_file = "/resolve/" in self.path
            content = json.dumps({} if is_file else [FILE] if "/tree/" in self.path else ABOUT).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            for name, value in {"X-Repo-Commit": COMMIT, "ETag": '"1"'}.items() if is_file else ():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_GET = do_HEAD = answer  # noqa: N815 - the names that http.server looks for

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"])
def test_a_cache_that_cannot_be_used_is_named(
    online: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """A file where its folder should be; that of HF_HOME is asked for a token, too."""
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv(variable, str(tmp_path / "file"))
    home = str(tmp_path if variable == "HF_HUB_CACHE" else tmp_path / "file")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", f"{home}/token")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file"))
    for use in (lambda: HuggingFace(ModelSource.of("owner/any")).tokenizer(), lambda: hub_datasets.fetch("owner/any")):
        with pytest.raises(RunFailed) as caught:
            use()
        assert f"in {variable}" in caught.value.message and str(tmp_path / "file") in caught.value.message
        assert "set HF_HOME" in str(caught.value.fix)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local cache as huggingface_hub lays it out, with owner/pairs fetched; the folder one stands in has no owner/."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    repository = tmp_path / "hub" / "datasets--owner--pairs"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    folder = repository / "snapshots" / COMMIT / "data"
    folder.mkdir(parents=True)
    write(folder / "train-00000.parquet", ROWS)
    write(folder / "test-00000.parquet", ROWS[:1])
    (folder.parent / "dataset_info.json").write_text("{}", encoding="utf-8")
    return folder


def test_a_cached_dataset_is_its_training_files(cache: Path) -> None:
    assert [Path(source.path).name for source in sources_of("owner/pairs")] == ["train-00000.parquet"]
    assert read("owner/pairs").pairs == 5
    hub_datasets.fetch("owner/pairs")  # the hub does not answer, and what is there serves


def test_the_split_is_said_and_can_be_named(cache: Path) -> None:
    (said,) = [problem.message for problem in read("owner/pairs").problems if problem.code == "hub-split"]
    assert said == "split train of owner/pairs is read: 1 .parquet files"
    assert [Path(source.path).name for source in sources_of("owner/pairs:test")] == ["test-00000.parquet"]
    assert read("owner/pairs:test").pairs == 1
    (wrong,) = read("owner/pairs:valid").problems
    assert (wrong.code, wrong.severity) == ("dataset-split", "error") and "train" in (wrong.fix or "")
    (cache / "train-00000.parquet").rename(cache / "train_prefs-00000-of-00001.parquet")
    write(cache / "train_sft-00000-of-00001.parquet", ROWS)
    (several,) = read("owner/pairs").problems
    assert several.code == "dataset-split" and "train_prefs, train_sft" in (several.fix or "")
    assert read(["owner/pairs:train_prefs"]).pairs == 5
    hub_datasets.fetch("owner/pairs:train_prefs")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["train.jsonl", "test.jsonl"], ["test", "train"]),
        (["train/0000.jsonl", "train/0001.jsonl", "test/0000.jsonl"], ["test", "train"]),
        (["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"], ["train"]),
        (["train/part-1.jsonl", "train/part-2.jsonl"], ["train"]),
        (["train.jsonl.gz", "test.jsonl.gz"], ["test", "train"]),
        (["pairs.jsonl"], ["pairs"]),
    ],
)
def test_a_file_belongs_to_the_split_its_name_or_folder_says(cache: Path, files: list[str], expected: list[str]) -> None:
    for file in cache.iterdir():
        file.unlink()
    for name in files:
        (cache.parent / name).parent.mkdir(exist_ok=True)
        write(cache.parent / name, ROWS[:1])
    (cache.parent / "dataset_info.json").unlink()
    assert sorted(hub_datasets.splits("owner/pairs")) == expected
    assert len(sources_of("owner/pairs")) == sum("train" in name or name == "pairs.jsonl" for name in files)


def test_what_is_not_cached_is_a_warning_until_it_is_fetched(cache: Path) -> None:
    (problem,) = read("owner/others").problems
    assert (problem.severity, problem.code) == ("warning", "dataset-on-hub")
    assert hub_ids({"dataset": ["owner/others", "owner/pairs"], "eval_dataset": None}) == ["owner/others", "owner/pairs"]
    with pytest.raises(RunFailed, match="not in the local cache") as caught:
        hub_datasets.fetch("owner/others")
    assert "hf download" in (caught.value.fix or "")


@pytest.mark.parametrize(
    "name", ["data/pairs.jsonl", "pairs", "./owner/pairs", "/owner/pairs", "owner/pairs.jsonl", "a/b/c", "../pairs"]
)
def test_paths_are_no_hub_ids(name: str) -> None:
    assert not hub_datasets.is_hub_id(name)


def test_lengths_are_tokens_where_the_tokenizer_is_local(tmp_path: Path, tiny_model_dir: Path) -> None:
    rows = [{"prompt": "q", "chosen": "the cat " * count, "rejected": "no"} for count in (1, 2, 60)]
    path = write(tmp_path / "p.jsonl", rows)
    for model, unit in ((tiny_model_dir, "tokens"), (Path("owner/model"), None)):
        lengths = Lengths(ModelFiles(model).fast_tokenizer)
        read(str(path), observers=[lengths])
        said = lengths.to_json(50)
        assert said["longest"] == {"file": str(path), "line": 3}
        assert said["characters"] == {"median": 17, "most": 481}
        assert (said["tokens"] is None) == (unit is None)
    late = Lengths(
        ModelFiles(tiny_model_dir).fast_tokenizer
    )  # 2,000 short pairs before 2,000 of other text: a sample of the first would be wrong
    both = [{"prompt": "q", "chosen": text * 5, "rejected": "n"} for text in ("the cat ", "zq9") for _ in range(2_000)]
    read(str(write(tmp_path / "late.jsonl", both)), observers=[late])
    tokenizer = Tokenizer.from_file(str(tiny_model_dir / "tokenizer.json"))
    counted = [len(tokenizer.encode(row["prompt"]).ids) + len(tokenizer.encode(row["chosen"]).ids) for row in both[::2_000]]
    sizes = [1 + len(row["chosen"]) for row in both[::2_000]]
    assert late.to_json(50)["tokens"]["most"] == pytest.approx(max(sizes) * sum(counted) / sum(sizes), rel=0.02)
    said = Lengths(ModelFiles(tiny_model_dir).fast_tokenizer)
    read(str(path), observers=[said])
    assert said.to_json(50)["tokens"]["share_over"] == pytest.approx(1 / 3, abs=1e-3)
    assert json.dumps(said.to_json(50))


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, None),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, None),
        ({"prompt": "q", "completion": "a"}, None),
        ({"text": "a whole text"}, None),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, None),
        ({"prompt": "q"}, "row-missing-key"),
        ({"messages": [{"role": "user", "content": "q"}]}, "row-role"),
        ({"text": " "}, "row-empty"),
        ({"prompt": "q", "completion": ""}, "row-empty"),
    ],
)
def test_demonstrations(tmp_path: Path, row: dict[str, object], code: str | None) -> None:
    data = read(str(write(tmp_path / "d.jsonl", [row, {"text": "good"}])), kind=DEMONSTRATIONS)
    assert [(problem.code, problem.line) for problem in data.problems] == ([(code, 1)] if code else [])
    assert data.pairs == (1 if code else 2)

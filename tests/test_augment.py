"""`dpo augment`: pairs that train, from a file that goes on after every kind of stop to the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from click.testing import Result
from conftest import ROOT, tiny_model
from test_ranking import Endpoint, endpoint, longer_is_better  # noqa: F401 - a fixture
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import dpo_cli
from dpo_cli.app import app
from dpo_cli.commands import augment
from dpo_cli.config.config import load
from dpo_cli.data.dataset import read
from dpo_cli.evaluation.generation import Answer, generate
from dpo_cli.storage.digests import sha256

PROMPTS = [f"question {i}" for i in range(14)]
BATCHES = 5  # of three prompts, the last of two


@pytest.fixture(scope="module")
def talker_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny model that ends some of its answers within a few tokens."""
    place = tmp_path_factory.mktemp("talker")
    model = tiny_model("llama", torch.float32)
    with torch.no_grad():
        model.lm_head.weight[2] *= 3
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


@pytest.fixture
def place(tmp_path: Path, talker_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with prompts, and with a config that names the file of pairs that is to be written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("\n\n".join(PROMPTS) + "\n", encoding="utf-8")
    rule = {"rank": "shorter", "pairs_per_prompt": 2, "max_new_tokens": 24, "temperature": 1.5, "prompts_per_batch": 3}
    values = {"model_name": str(talker_dir), "dataset": "pairs.jsonl", "augment": rule, "learning_rate": 1e-3, "lora_r": 4}
    values |= {"device": "cpu", "bf16": False, "fp16": False, "eval_split": 0.3, "max_steps": 2}
    values |= {"kl_prompts": 2, "max_new_tokens": 4}
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return tmp_path


def run(*words: str, prompts: str = "prompts.txt", out: str = "pairs.jsonl") -> Result:
    return CliRunner().invoke(app, ["augment", prompts, "config.json", *words, "--out", out])


def rule(**parts: object) -> str:
    values = json.loads(Path("config.json").read_text(encoding="utf-8"))["augment"]
    return f"augment={json.dumps({**values, **parts})}"


def rows(name: str = "pairs.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(name).read_text(encoding="utf-8").split("\n") if line]


def test_pairs_have_their_provenance_and_train(place: Path, talker_dir: Path) -> None:
    done = run("--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    made = rows()
    assert told["pairs"] == len(made) > 10 and told["prompts"] == 14 and told["responses"] == 56
    assert told["unfinished"] > 0 and told["resumed"] is False
    model = {"name": talker_dir.name, "sha256": sha256(talker_dir / "model.safetensors")}
    sampling = {"responses": 4, "max_new_tokens": 24, "temperature": 1.5, "top_p": 1.0}
    for row in made:
        own = row["provenance"]
        assert (own["model"], own["sampling"], own["seed"], own["dpo"]) == (model, sampling, 42, dpo_cli.__version__)
        assert own["rule"] == {"rank": "shorter", "min_tokens": 1, "min_distance": 0}
        chosen, rejected = own["tokens"]
        assert own["scores"] == [-chosen, -rejected] and chosen < rejected
        assert own["rejected_finished"] == (rejected < 24)
        file, _, line = own["source"].partition(":")
        assert file == "prompts.txt" and (place / file).read_text(encoding="utf-8").splitlines()[int(line) - 1] == row["prompt"]
    assert {row["provenance"]["rejected_finished"] for row in made} == {True, False}
    assert not (place / "pairs.jsonl.progress").exists()
    data = read("pairs.jsonl")
    assert (data.pairs, data.problems) == (len(made), ())
    trained = CliRunner().invoke(app, ["train", "config.json", "--json"])
    assert trained.exit_code == 0, trained.output
    assert json.loads(trained.stdout)["steps"] == 2


def test_an_adapter_answers_for_itself(place: Path) -> None:
    """Drawn with the same seed, its answers are not the base's; and the rows name it."""
    assert run().exit_code == 0
    options = ["learning_rate=1e-2", "max_steps=4"]
    assert CliRunner().invoke(app, ["train", "config.json", "output_dir=tuned", *options]).exit_code == 0
    done = run("model_name=tuned", out="again.jsonl")
    assert done.exit_code == 0, done.output
    weights = sha256(place / "tuned" / "adapter" / "adapter_model.safetensors")
    assert {row["provenance"]["model"]["sha256"] for row in rows("again.jsonl")} == {weights}
    assert {row["chosen"] for row in rows("again.jsonl")} != {row["chosen"] for row in rows()}


@pytest.mark.long
def test_a_killed_file_goes_on_to_the_same_bytes(place: Path) -> None:
    """One process is killed while it writes; another, with the same arguments, continues the file."""
    slow = rule(max_new_tokens=40, prompts_per_batch=1)  # so that it is alive when it is killed
    assert run(slow, out="whole.jsonl").exit_code == 0
    words = [sys.executable, "-m", "dpo_cli", "augment", "prompts.txt", "config.json", slow, "--out", "pairs.jsonl"]
    process = subprocess.Popen(
        words, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    marks = place / "pairs.jsonl.progress"
    deadline = time.monotonic() + 60
    while not marks.exists() or marks.read_bytes().count(b"\n") < 2:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.001)
    process.kill()
    process.communicate()
    before = marks.read_bytes().count(b"\n") - 1
    assert 1 <= before < len(PROMPTS)
    done = run(slow, "--json")
    assert done.exit_code == 0, done.output
    assert f"continuing after {before} of 14 prompts" in done.stderr
    assert json.loads(done.stdout)["resumed"] is True
    assert Path("pairs.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()


def test_ctrl_c_at_any_batch_and_torn_lines_lose_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in every batch but the first in turn, with half a row and half a mark left behind each time."""
    assert json.loads(run("--json", out="whole.jsonl").stdout)["resumed"] is False
    calls = []

    def interrupted(*arguments: Any, **options: Any) -> list[list[Answer]]:
        calls.append(arguments)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return generate(*arguments, **options)

    monkeypatch.setattr(augment, "generate", interrupted)
    for stop in range(1, BATCHES):
        calls.clear()
        done = run()
        assert done.exit_code == 130 and "run the same command again" in done.stdout, done.output
        assert Path("pairs.jsonl.progress").read_bytes().count(b"\n") == 1 + stop
        for name in ("pairs.jsonl", "pairs.jsonl.progress"):
            with Path(name).open("ab") as file:
                file.write(b'{"prompt": "torn')
    done = run("--json")
    assert done.exit_code == 0, done.output
    assert Path("pairs.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()


def stopped_after_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def once(*arguments: Any, **options: Any) -> list[list[Answer]]:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(*arguments, **options)

    with monkeypatch.context() as broken:
        broken.setattr(augment, "generate", once)
        assert run().exit_code == 130


def test_a_file_has_one_day(place: Path, talker_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A template that writes the date writes the day on which the file was started, also after midnight."""
    shutil.copytree(talker_dir, place / "dated")
    settings = json.loads((place / "dated" / "tokenizer_config.json").read_text(encoding="utf-8"))
    template = settings.pop("chat_template", None) or (place / "dated" / "chat_template.jinja").read_text(encoding="utf-8")
    dated = "{{ strftime_now('%d') }}" + template
    (place / "dated" / "chat_template.jinja").write_text(dated, encoding="utf-8")
    (place / "dated" / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    config = (place / "config.json").read_text(encoding="utf-8")
    (place / "config.json").write_text(config.replace(str(talker_dir), str(place / "dated")), encoding="utf-8")
    assert run(out="whole.jsonl").exit_code == 0
    stopped_after_a_batch(monkeypatch)
    with monkeypatch.context() as tomorrow:
        tomorrow.setattr("dpo_cli.plan.decisions.datetime", Tomorrow)
        assert run(out="later.jsonl").exit_code == 0
        assert run().exit_code == 0
    assert Path("pairs.jsonl").read_bytes() == Path("whole.jsonl").read_bytes() != Path("later.jsonl").read_bytes()


def test_a_file_has_one_precision(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the measurement at its start; a file that is continued does not measure."""
    values = json.loads(Path("config.json").read_text(encoding="utf-8"))
    Path("config.json").write_text(json.dumps({key: values[key] for key in values if key not in ("bf16", "fp16")}))
    speed = "dpo_cli.providers.precision.bf16_speed"
    monkeypatch.setattr(speed, lambda *widths: 3.0)
    assert run(out="whole.jsonl").exit_code == 0
    stopped_after_a_batch(monkeypatch)
    monkeypatch.setattr(speed, lambda *widths: 0.5)
    assert run(out="later.jsonl").exit_code == 0
    assert run().exit_code == 0
    assert Path("pairs.jsonl").read_bytes() == Path("whole.jsonl").read_bytes() != Path("later.jsonl").read_bytes()


class Tomorrow(datetime):
    @classmethod
    def now(cls, tz: tzinfo | None = None) -> Self:
        return super().now(tz) + timedelta(days=1)


def test_other_settings_are_refused_and_named(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped_after_a_batch(monkeypatch)
    kept = Path("pairs.jsonl").read_bytes()
    done = run("seed=7", rule(temperature=1.25))
    assert done.exit_code == 3
    assert "augment.temperature was 1.5 and is now 1.25; seed was 42 and is now 7" in " ".join(done.stderr.split())
    (place / "prompts.txt").write_text("\n".join(PROMPTS[1:]), encoding="utf-8")
    assert "prompts was" in run().stderr
    (place / "prompts.txt").write_text("\n\n".join(PROMPTS) + "\n", encoding="utf-8")
    assert Path("pairs.jsonl").read_bytes() == kept
    Path("pairs.jsonl").write_bytes(kept.replace(b"question", b"Question"))
    done = run()
    assert done.exit_code == 3 and "changed since" in done.stderr
    Path("pairs.jsonl").write_bytes(kept)
    assert run().exit_code == 0
    assert run().exit_code == 2  # it is finished now


def test_two_processes_do_not_write_one_file(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = []

    def twice(*arguments: Any, **options: Any) -> list[list[Answer]]:
        if not inner:
            inner.append(None)
            inner[0] = run()
        return generate(*arguments, **options)

    monkeypatch.setattr(augment, "generate", twice)
    assert run().exit_code == 0
    assert inner[0].exit_code == 2 and "another process is writing" in inner[0].stderr


def test_rows_of_every_kind_are_prompts(place: Path) -> None:
    """A pair's prompt, messages with tools, and a repeated prompt; the pairs keep messages and tools."""
    tool = {"type": "function", "function": {"name": "f"}}
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the cat"}]
    given: list[dict[str, object]] = [
        {"prompt": "question 1", "chosen": "the cat sat", "rejected": "no"},
        {"prompt": "question 1", "chosen": "the mat", "rejected": "no"},
        {"prompt": talk},
        {"prompt": "question 2", "system": "Be kind.", "other": 1},
    ]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given), encoding="utf-8")
    done = run("--json", rule(rank="longer", responses=24), prompts="rows.jsonl")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert (told["prompts"], told["repeated"], told["pairs"]) == (3, 1, 6)
    made = rows()
    assert [row["provenance"]["source"] for row in made[::2]] == ["rows.jsonl:1", "rows.jsonl:3", "rows.jsonl:4"]
    assert made[2]["prompt"] == talk and made[2]["chosen"][0]["role"] == "assistant"
    assert made[4]["prompt"] == [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "question 2"}]
    assert all(row["provenance"]["tokens"][0] > row["provenance"]["tokens"][1] for row in made)
    assert all(row["provenance"]["rejected_finished"] for row in made)
    Path("tools.jsonl").write_text(json.dumps({"prompt": "a", "tools": [tool]}) + "\n", encoding="utf-8")
    refused = run(prompts="tools.jsonl", out="tools-out.jsonl")
    assert refused.exit_code == 3 and "does not support tools" in refused.stderr
    assert read("pairs.jsonl").problems == ()


def test_a_reference_ranks_and_must_be_there(place: Path) -> None:
    given = [
        {"prompt": "q 1", "reference": "the cat sat"},
        {"prompt": "q 2"},
        {"prompt": "q 3", "chosen": "a", "rejected": "b"},
    ]
    Path("rows.json").write_text(json.dumps(given, indent=1), encoding="utf-8")
    done = run(rule(rank="reference"), prompts="rows.json")
    assert done.exit_code == 3 and "rows.json:6: no reference" in done.stderr
    del given[1]
    Path("rows.json").write_text(json.dumps(given), encoding="utf-8")
    assert run(rule(rank="reference", responses=48), prompts="rows.json").exit_code == 0
    assert len(rows()) == 4 and all(row["provenance"]["scores"][0] > row["provenance"]["scores"][1] for row in rows())


def test_a_judge_ranks_and_its_key_is_nowhere(place: Path, endpoint: Endpoint) -> None:  # noqa: F811 - the fixture
    endpoint.reply = longer_is_better
    asked = rule(rank="judge", judge_url=endpoint.url, judge_model="judge-1", criterion="longer", responses=3)
    done = run(asked, "--json")
    assert done.exit_code == 0, done.output
    made = rows()
    assert made and all(len(row["chosen"]) > len(row["rejected"]) for row in made)
    wanted = {"judge_url": endpoint.url, "judge_model": "judge-1", "criterion": "longer"}
    assert made[0]["provenance"]["rule"] == {"rank": "judge", **wanted, "min_tokens": 1, "min_distance": 0}
    assert all(authorization == "Bearer secret-key" for _, authorization, _ in endpoint.requests)
    written = "".join(path.read_text(encoding="utf-8") for path in place.rglob("*") if path.is_file())
    assert "secret-key" not in written + done.output
    endpoint.reply = lambda _: (401, "")
    failed = run(asked, out="failed.jsonl")
    assert failed.exit_code == 1 and "OPENAI_API_KEY" in failed.stderr
    assert Path("failed.jsonl.progress").exists()  # so that the same command continues with a valid key


def served(endpoint: Endpoint, **parts: object) -> str:  # noqa: F811 - the fixture
    return rule(answers_url=endpoint.url, answers_model="my-model", responses=3, **parts)


def many_words(body: dict[str, Any]) -> str:
    """An answer of one to nine words that its seed decides; the last request of a prompt is cut."""
    return " ".join(["word"] * (1 + body["seed"] % 9)) + f" {body['seed']}"


@pytest.fixture
def server(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> Endpoint:  # noqa: F811 - the fixture
    """It has one model, and answers by the seed."""

    def reply(_: str) -> tuple[int, str]:
        body = endpoint.requests[-1][2]
        return 200, many_words(body) if "seed" in body else "H"

    endpoint.reply = reply
    monkeypatch.setattr("dpo_cli.preferences.served_answers.AT_ONCE", 1)  # so that the last request is the one to answer
    return endpoint


def test_a_server_answers(place: Path, server: Endpoint) -> None:
    server.finish = lambda body, text: "length" if len(text.split()) > 6 else "stop"
    done = run(served(server), "--json")
    assert done.exit_code == 0, done.output
    told, made = json.loads(done.stdout), rows()
    assert told["responses"] == 42 and told["unfinished"] > 0 and told["pairs"] == len(made) > 5
    probe, *asked = [body for _, _, body in server.requests]
    assert probe["max_tokens"] == 1 and len(asked) == 42 and len({body["seed"] for body in asked}) == 42
    assert {(body["model"], body["temperature"], body["top_p"], body["max_tokens"]) for body in asked} == {
        ("my-model", 1.5, 1, 24)
    }
    assert [body["messages"] for body in asked[::3]] == [[{"role": "user", "content": text}] for text in PROMPTS]
    for row in made:
        own = row["provenance"]
        assert own["model"] == {"name": "my-model", "served_as": "served/one", "url": server.url}
        assert own["tokens"] == [len(row["chosen"].split()), len(row["rejected"].split())]
        assert len(row["chosen"].split()) <= 6  # a cut answer is never chosen
    assert all(authorization == "Bearer secret-key" for _, authorization, _ in server.requests)
    assert "secret-key" not in Path("pairs.jsonl").read_text(encoding="utf-8") + done.output


def test_no_model_is_loaded_for_a_server(place: Path, server: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("dpo_cli.providers.huggingface.HuggingFace.base_model")
    assert run(served(server)).exit_code == 0 and run(out="own.jsonl").exit_code != 0


def test_a_server_that_stops_is_continued_to_the_same_bytes(place: Path, server: Endpoint) -> None:
    assert run(served(server), out="whole.jsonl").exit_code == 0
    works, count = server.reply, iter(range(1000))
    server.reply = lambda asked: works(asked) if next(count) < 20 else (500, "")
    failed = run(served(server))
    assert failed.exit_code == 1 and "the server cannot be reached" in failed.stderr
    server.reply = works
    assert run(served(server)).exit_code == 0
    assert Path("pairs.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()


def test_another_model_of_the_server_is_told(place: Path, server: Endpoint) -> None:
    works, count = server.reply, iter(range(1000))

    def changed(asked: str) -> tuple[int, str]:
        server.model = "served/one" if next(count) < 20 else "served/two"
        return works(asked)

    server.reply = changed
    failed = run(served(server))
    assert failed.exit_code == 1 and "answered as served/two, and before as served/one" in failed.stderr
    failed = run(served(server))  # from the start with the other one
    assert failed.exit_code == 3 and "served/two" in failed.stderr and "[out-other-settings]" in failed.stderr


@pytest.mark.parametrize(
    ("status", "text", "says"),
    [
        (401, "", "OPENAI_API_KEY"),
        (404, "", '"answers_url" (it often ends in /v1) and "answers_model"'),
        (200, "no JSON", 'check "answers_url"'),
    ],
)
def test_a_server_that_cannot_be_used_is_told_first(place: Path, server: Endpoint, status: int, text: str, says: str) -> None:
    server.reply = lambda _: (status, text)
    failed = run(served(server))
    assert failed.exit_code == 1 and says in failed.stderr and len(server.requests) == 1
    assert not Path("pairs.jsonl.progress").exists()


def test_short_answers_and_near_scores_make_no_pair(place: Path) -> None:
    assert run(rule(min_tokens=6, min_distance=8)).exit_code == 0
    tokens = [row["provenance"]["tokens"] for row in rows()]
    assert tokens and all(6 <= chosen <= rejected - 8 for chosen, rejected in tokens)
    done = run(rule(min_tokens=25), "--json", out="none.jsonl")
    told = json.loads(done.stdout)
    assert (told["pairs"], told["without_pair"], Path("none.jsonl").read_bytes()) == (0, 14, b"")
    assert told["short"] + told["empty"] == told["responses"] == 56


@pytest.mark.parametrize(
    ("words", "options", "code", "says"),
    [
        (["pairs.jsonl"], {"out": "pairs.txt"}, 2, "does not end in .jsonl"),
        ([], {"out": "none/pairs.jsonl"}, 2, "does not exist"),
        ([], {"prompts": "gone.txt"}, 3, "file not found: gone.txt"),
        ([], {"prompts": "prompts.doc"}, 3, "not a .txt, .jsonl"),
        ([], {"prompts": "folder.txt"}, 3, "cannot read folder.txt"),
        ([], {"prompts": "empty.txt"}, 3, "empty.txt: there is no prompt"),
        ([], {"prompts": "bad.txt"}, 3, "bad.txt:2: not valid UTF-8"),
        ([], {"prompts": "bad.jsonl"}, 3, "2 rows (lines 1, 3): prompt is missing"),
        (["augment={}"], {}, 3, 'has no "rank"'),
        (['augment={"rank": "regex"}'], {}, 3, "needs pattern"),
        (["provider=unsloth"], {}, 3, "the package unsloth is not installed"),
        (["beta=-1"], {}, 3, "beta"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(
    place: Path, words: list[str], options: dict[str, str], code: int, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, content in {"prompts.doc": b"a", "empty.txt": b"\n", "bad.txt": b"a\n\xff\n"}.items():
        (place / name).write_bytes(content)
    (place / "bad.jsonl").write_text('{"x": 1}\n{"prompt": "a"}\n{"x": 1}\n', encoding="utf-8")
    (place / "folder.txt").mkdir()

    def loaded(*_: object) -> None:
        raise AssertionError("the libraries are loaded")

    monkeypatch.setattr("dpo_cli.app.composer_for", loaded)
    done = run(*[word for word in words if "=" in word], **options)
    assert done.exit_code == code, done.output
    assert says in " ".join(done.stderr.split())
    assert not list(place.glob("*.progress"))


def test_bad_rows_are_left_out_when_asked_and_counted(place: Path) -> None:
    Path("some.jsonl").write_text('{"x": 1}\n{"prompt": "a"}\n{"prompt": "b"}\n', encoding="utf-8")
    done = run("on_bad_rows=skip", "--json", prompts="some.jsonl")
    told = json.loads(done.stdout)
    assert (done.exit_code, told["prompts"], told["bad_rows"]) == (0, 2, 1)


def test_a_config_without_a_dataset_is_enough(place: Path) -> None:
    values = json.loads(Path("config.json").read_text(encoding="utf-8"))
    del values["dataset"]
    Path("config.json").write_text(json.dumps(values), encoding="utf-8")
    assert run().exit_code == 0 and rows()


def test_long_prompts_are_cut_as_training_cuts_them(place: Path) -> None:
    Path("long.txt").write_text("the cat sat " * 60 + "\nshort\n", encoding="utf-8")
    told = json.loads(run("max_seq_length=80", "--json", prompts="long.txt").stdout)
    assert (told["prompts"], told["cut"], told["too_long"]) == (2, 1, 0)
    assert [row["prompt"][:5] for row in rows()][-1] == "short"


def test_the_shipped_pairs_are_what_they_say() -> None:
    """Each row answers the prompt that it names, and is preferred by the rule that stands in it and in the config."""
    pairs = ROOT / "data-samples" / "concise-preferences.jsonl"
    made = rows(str(pairs))
    prompts = (ROOT / "data-samples" / "concise-prompts.txt").read_text(encoding="utf-8").splitlines()
    assert len(made) >= 600 and len(prompts) == len(set(prompts)) >= 320
    config = load(str(ROOT / "configs" / "concise.json")).values
    wanted = config["augment"]
    assert wanted["rank"] == "shorter"
    for row in made:
        own = row["provenance"]
        assert prompts[int(own["source"].partition(":")[2]) - 1] == row["prompt"]
        assert own["rule"] == {name: wanted[name] for name in ("rank", "min_tokens", "min_distance")}
        chosen, rejected = own["tokens"]
        assert wanted["min_tokens"] <= chosen <= rejected - wanted["min_distance"]
        assert own["sampling"]["max_new_tokens"] == wanted["max_new_tokens"] and own["seed"] == config["seed"]
    assert pairs.stat().st_size < 1_500_000

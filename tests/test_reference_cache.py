"""The cache of reference log-probs: values by what computes them and by token ids, or none."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from conftest import ROOT, Run, tiny_model
from peft import LoraConfig, get_peft_model
from test_dpo import make_plan, make_trainer
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from dpo_cli.app import app
from dpo_cli.plan.plan import Scoring
from dpo_cli.providers.policy import Policy
from dpo_cli.scoring import reference_cache
from dpo_cli.scoring.reference import computed_by, digest_of_ids
from dpo_cli.scoring.reference_cache import ReferenceCache, path

VALUES = {b"a" * 16: (-1.5, -2.25), b"b" * 16: (-3.0, -1e-7)}


@pytest.fixture
def told() -> list[str]:
    return []


def cache(told: list[str], digest: str = "one") -> ReferenceCache:
    return ReferenceCache(digest, "a-model, float32", told.append)


def test_values_come_back_by_both_keys(told: list[str]) -> None:
    assert cache(told).read(list(VALUES)) == {} and not path().exists()  # reading makes no file
    cache(told).add(VALUES)
    assert cache(told).read([*VALUES, b"c" * 16]) == VALUES
    assert cache(told, "other").read(list(VALUES)) == {}
    cache(told, "other").add({b"a" * 16: (0.0, 0.0)})
    assert cache(told).read(list(VALUES)) == VALUES
    many = {i.to_bytes(16): (float(i), -float(i)) for i in range(2000)}  # more than one query
    cache(told).add(many)
    assert cache(told).read(list(many)) == many and told == []


@pytest.mark.parametrize("damage", ["x'01' || substr(value, 2)", "substr(value, 1, 23)", "NULL", "7", "'text'"])
def test_a_damaged_value_is_missing_until_it_is_added_again(told: list[str], damage: str) -> None:
    cache(told).add(VALUES)
    with closing(sqlite3.connect(path())) as file, file:
        file.execute("CREATE TABLE loose AS SELECT * FROM pairs")  # which also holds NULL
        file.execute("DROP TABLE pairs")
        file.execute("ALTER TABLE loose RENAME TO pairs")
        file.execute(f"UPDATE pairs SET value = {damage} WHERE pair = ?", (b"a" * 16,))
    assert cache(told).read(list(VALUES)) == {b"b" * 16: VALUES[b"b" * 16]}
    with closing(sqlite3.connect(path())) as file, file:
        file.execute("DELETE FROM pairs WHERE pair = ?", (b"a" * 16,))
    cache(told).add({b"a" * 16: VALUES[b"a" * 16]})
    assert cache(told).read(list(VALUES)) == VALUES and told == []


def test_a_value_of_another_pair_or_model_is_missing(told: list[str]) -> None:
    cache(told).add(VALUES)
    cache(told, "other").add({b"c" * 16: (0.0, 0.0)})
    with closing(sqlite3.connect(path())) as file, file:
        file.execute("UPDATE pairs SET value = (SELECT value FROM pairs WHERE pair = ?) WHERE pair = ?", (b"a" * 16, b"b" * 16))
        file.execute("UPDATE models SET digest = digest || '-'")
        file.execute("UPDATE models SET digest = 'one' WHERE digest = 'other-'")
        file.execute("UPDATE models SET digest = 'other' WHERE digest = 'one-'")
    assert cache(told).read([b"c" * 16]) == {} == cache(told, "other").read(list(VALUES))


def damaged() -> None:
    path().write_bytes(b"SQLite format 3\0" + bytes(range(256)) * 16)


def cut_off() -> None:
    path().write_bytes(path().read_bytes()[:5000])


def foreign() -> None:
    path().unlink()
    with closing(sqlite3.connect(path())) as file, file:
        file.execute("CREATE TABLE pairs (of, another, program)")


def later_version() -> None:
    with closing(sqlite3.connect(path())) as file, file:
        file.execute("PRAGMA user_version = 99")


def a_folder() -> None:
    path().unlink()
    path().mkdir()


@pytest.mark.parametrize("spoil", [damaged, cut_off, foreign, later_version, a_folder])
def test_a_file_that_is_not_a_cache_is_left_and_named_once(told: list[str], spoil: Callable[[], None]) -> None:
    cache(told).add({i.to_bytes(16): (0.0, 0.0) for i in range(500)})
    spoil()
    before = path().read_bytes() if path().is_file() else None
    one = cache(told)
    assert one.read(list(VALUES)) == {}
    one.add(VALUES)
    assert one.read(list(VALUES)) == {}
    assert len(told) == 1 and "so they are computed" in told[0]
    assert (path().read_bytes() if path().is_file() else None) == before


def test_a_locked_cache_is_asked_again_later(
    told: list[str], user_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (user_cache / "gguf").unlink()  # the models of the real cache
    cache(told).add(VALUES)
    monkeypatch.setattr(reference_cache, "WAIT_SECONDS", 0.05)
    one = cache(told)
    with closing(sqlite3.connect(path())) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert one.read(list(VALUES)) == {}
        for words in (["cache"], ["cache", "--prune", "0"]):
            failed = CliRunner().invoke(app, words)
            assert failed.exit_code == 1 and "is used by another process" in failed.stderr
    assert len(told) == 1 and "locked" in told[0]
    assert one.read(list(VALUES)) == VALUES


ADDING = """
import sys
from dpo_cli.scoring.reference_cache import ReferenceCache
me = int(sys.argv[1])
ReferenceCache("one", "a-model", print).add({bytes([me, i] * 8): (float(me), float(i)) for i in range(20)})
"""


def test_many_processes_may_write_the_first_values(told: list[str]) -> None:
    """A new file is made whole or not at all: no process sees one without its tables."""
    writers = [
        subprocess.Popen([sys.executable, "-c", ADDING, str(me)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for me in range(6)
    ]
    assert [writer.communicate()[0] for writer in writers] == [""] * 6
    values = {bytes([me, i] * 8): (float(me), float(i)) for me in range(6) for i in range(20)}
    assert cache(told).read(list(values)) == values and told == []


def without_tables() -> None:
    cut_off()
    path().unlink()
    with closing(sqlite3.connect(path())) as file, file:
        file.execute(f"PRAGMA application_id = {reference_cache.APPLICATION}")
        file.execute(f"PRAGMA user_version = {reference_cache.VERSION}")


@pytest.mark.parametrize("spoil", [damaged, foreign, later_version, without_tables])
def test_a_file_that_is_not_a_cache_is_listed_and_removed_by_its_age(
    told: list[str], user_cache: Path, spoil: Callable[[], None]
) -> None:
    (user_cache / "gguf").unlink()  # the models of the real cache
    cache(told).add({i.to_bytes(16): (0.0, 0.0) for i in range(500)})
    spoil()
    (entry,) = as_json("cache")["entries"]
    assert entry["name"] == "not a cache of this version"
    assert as_json("cache", "--prune", "30")["removed"] == [] and path().exists()
    os.utime(path(), (0, 0))
    assert as_json("cache", "--prune", "30")["removed"] != [] and not path().exists()


DIGEST = """
import sys
from pathlib import Path
from dpo_cli.config.config import load
from dpo_cli.hardware.machine import probe
from dpo_cli.plan.decisions import resolve
from dpo_cli.providers.policy import FROZEN
from dpo_cli.providers.registry import PROVIDERS
from dpo_cli.providers.policy import Policy
from dpo_cli.scoring.reference import computed_by
plan = resolve(load(sys.argv[1]), probe())
provider = PROVIDERS["huggingface"](plan.model)
model = provider.start(plan, provider.base_model(plan))
model.add_adapter(FROZEN, model.peft_config["default"])
for name, weight in model.named_parameters():
    if FROZEN in name.split("."):
        weight.data.fill_(0.5)
        weight.requires_grad_(False)
print(computed_by(Policy(model), plan))
"""


@pytest.mark.long
def test_the_digest_of_a_frozen_adapter_is_the_same_in_each_process(run: Run, tmp_path: Path) -> None:
    """Its settings hold sets, whose order depends on the hash seed of the process."""
    run(strategy="sft")
    config, values = tmp_path / "next.json", json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    values |= {"strategy": "dpo", "model_name": str(tmp_path / "run"), "output_dir": str(tmp_path / "next")}
    config.write_text(json.dumps(values), encoding="utf-8")
    words = [sys.executable, "-c", DIGEST, str(config)]
    digests = {
        subprocess.run(words, cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": seed}, stdout=subprocess.PIPE, text=True).stdout
        for seed in ("1", "2", "3")
    }
    assert len(digests) == 1 and len(digests.pop().strip()) == 64


def test_another_adapter_on_the_same_base_has_the_same_reference(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    plan = make_plan(tmp_path)
    digests = set()
    for targets in (["q_proj"], "all-linear"):
        config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets)
        digests.add(computed_by(Policy(get_peft_model(tiny_model("llama", torch.float32), config)), plan))
    assert len(digests) == 1


def test_wrong_values_are_seen_before_the_first_step(run: Run, told: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Also where a cache passes every check of its own."""
    first, place = run()
    with closing(sqlite3.connect(path())) as file:
        ((digest,),) = file.execute("SELECT digest FROM models").fetchall()
        pairs = [pair for (pair,) in file.execute("SELECT pair FROM pairs")]
    known = cache(told, digest).read(pairs)
    cache(told, digest).add({pair: (chosen + 2.0, rejected) for pair, (chosen, rejected) in known.items()})
    second, _ = run()
    assert second["adapter_sha256"] == first["adapter_sha256"]
    assert "differ from those of this model" in capsys.readouterr().out
    assert cache(told, digest).read(pairs) == known  # mended
    third, _ = run()
    assert third["adapter_sha256"] == first["adapter_sha256"]
    assert json.loads((place / "manifest.json").read_text(encoding="utf-8"))["reference_from_cache"] == len(pairs)


@pytest.mark.parametrize("spoil", [damaged, foreign, a_folder])
def test_a_training_does_not_need_it(run: Run, capsys: pytest.CaptureFixture[str], spoil: Callable[[], None]) -> None:
    first, _ = run()
    spoil()
    second, _ = run()
    assert second["adapter_sha256"] == first["adapter_sha256"]
    assert capsys.readouterr().out.count("so they are computed") == 1


def test_a_training_needs_no_home(run: Run, user_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (user_cache.parent / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(user_cache.parent / "file"))
    assert run()[0]["status"] == "completed"


def test_the_digest_of_a_pair_is_of_its_token_ids(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    _, pairs = make_trainer(tmp_path, tokenizer)
    one = pairs[0]
    shifted = replace(one, prompt_ids=[*one.prompt_ids, one.chosen_ids[0]], responses=(one.chosen_ids[1:], one.rejected_ids))
    swapped = replace(one, responses=one.responses[::-1])
    digests = {digest_of_ids(pair.prompt_ids, *pair.responses) for pair in (*pairs, shifted, swapped)}
    assert len(digests) == len(pairs) + 2


def test_the_digest_of_a_reference_is_of_all_that_decides_its_values(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    trainer, _ = make_trainer(tmp_path, tokenizer)
    plan = replace(make_plan(tmp_path), scoring=Scoring(True, ""))
    policy = trainer.policy
    first = computed_by(policy, plan)
    with torch.no_grad():
        for name, weight in policy.model.named_parameters():
            if "lora_B" in name:
                weight.add_(1.0)
    assert computed_by(policy, plan) == first  # the policy is not its reference
    others = {
        computed_by(policy, replace(plan, scoring=Scoring(False, ""))),
        computed_by(policy, replace(plan, config=replace(plan.config, bf16=True))),
    }
    policy.network.config.rope_theta = 1.0
    others.add(computed_by(policy, plan))
    with torch.no_grad():
        policy.network.get_input_embeddings().weight[3, 2] += 1e-6
    others.add(computed_by(policy, plan))
    buffer = next(buffer for name, buffer in policy.network.named_buffers() if "inv_freq" in name)  # in no file
    buffer[0] += 1e-6
    others.add(computed_by(policy, plan))
    assert len(others | {first}) == 6


def test_the_digest_of_a_model_in_4_bits_reads_its_scales(tmp_path: Path) -> None:
    model = tiny_model("llama", torch.float32)
    layer = bnb.nn.Linear4bit(32, 32, bias=False, quant_type="nf4")
    layer.load_state_dict(model.model.layers[0].self_attn.q_proj.state_dict())
    model.model.layers[0].self_attn.q_proj = layer.to("cpu")
    model.requires_grad_(False)
    plan = make_plan(tmp_path)
    first = computed_by(Policy(model, frozen=model), plan)
    assert computed_by(Policy(model, frozen=model), plan) == first
    layer.weight.quant_state.state2.absmax *= 1.01
    assert computed_by(Policy(model, frozen=model), plan) != first


def test_the_cache_is_listed_and_pruned(run: Run, user_cache: Path, told: list[str]) -> None:
    run()
    (model := user_cache / "merged" / "0123").mkdir(parents=True)
    (model / "model.safetensors").write_bytes(bytes(2_000_000))
    (model / "made-from.txt").write_text("my-adapter")
    cache(told).add(VALUES)
    with closing(sqlite3.connect(path())) as file, file:
        file.execute("UPDATE models SET used = ? WHERE digest = 'one'", (time.time() - 40 * 86400,))
    listed = as_json("cache")
    kinds = {(entry["kind"], entry["name"]): entry for entry in listed["entries"]}
    assert kinds["merged", "my-adapter"]["bytes"] == 2_000_010
    assert kinds["reference", "a-model, float32"]["pairs"] == 2
    assert listed["bytes"] == sum(entry["bytes"] for entry in listed["entries"]) and listed["removed"] == []
    pruned = as_json("cache", "--prune", "30")
    assert [entry["name"] for entry in pruned["removed"]] == ["a-model, float32"]
    assert len(pruned["entries"]) == len(listed["entries"]) - 1
    (user_cache / "gguf").unlink()  # the models of the real cache
    assert {entry["kind"] for entry in as_json("cache", "--prune", "0")["removed"]} == {"merged", "reference"}
    assert as_json("cache")["entries"] == [] and not model.exists()


def as_json(*words: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, [*words, "--json"])
    assert result.exit_code == 0, result.output
    document: dict[str, Any] = json.loads(result.stdout)
    return document

"""The cache of reference log-probs: values by what computes them and by token ids, or none."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from conftest import Run, tiny_model
from test_dpo import make_plan, make_trainer
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from dpo_cli.app import app
from dpo_cli.plan.plan import Scoring
from dpo_cli.providers.policy import Policy
from dpo_cli.scoring import reference_cache
from dpo_cli.scoring.reference import computed_by, digest_of_pair
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


def test_a_locked_cache_is_not_waited_for(told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    cache(told).add(VALUES)
    monkeypatch.setattr(reference_cache, "WAIT_SECONDS", 0.05)
    with closing(sqlite3.connect(path())) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert cache(told).read(list(VALUES)) == {}
    assert len(told) == 1 and "locked" in told[0]
    assert cache(told).read(list(VALUES)) == VALUES


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
    assert len({digest_of_pair(pair) for pair in (*pairs, shifted, swapped)}) == len(pairs) + 2
    assert digest_of_pair(replace(one, is_cut=True)) == digest_of_pair(one)


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
        computed_by(policy, replace(plan, config=replace(plan.config, provider="unsloth"))),
    }
    policy.network.config.rope_theta = 1.0
    others.add(computed_by(policy, plan))
    with torch.no_grad():
        policy.network.get_input_embeddings().weight[3, 2] += 1e-6
    others.add(computed_by(policy, plan))
    buffer = next(buffer for name, buffer in policy.network.named_buffers() if "inv_freq" in name)  # in no file
    buffer[0] += 1e-6
    others.add(computed_by(policy, plan))
    assert len(others | {first}) == 7


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
    damaged()
    (user_cache / "gguf").unlink()  # the models of the real cache
    assert {entry["kind"] for entry in as_json("cache", "--prune", "0")["removed"]} == {"merged", "reference"}
    assert as_json("cache")["entries"] == [] and not path().exists() and not model.exists()


def as_json(*words: str) -> dict[str, object]:
    import json

    result = CliRunner().invoke(app, [*words, "--json"])
    assert result.exit_code == 0, result.output
    document: dict[str, object] = json.loads(result.stdout)
    return document

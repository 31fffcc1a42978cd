"""No way in, and nothing out: code that comes with files never runs, nothing is written elsewhere, secrets stay secret."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from gguf_files import write_gguf
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from dpo_cli.cli import app

Pairs = Callable[..., Path]
OPTIONS: dict[str, Any] = {
    **{"device": "cpu", "bf16": False, "fp16": False, "max_steps": 1, "lora_r": 4, "learning_rate": 1e-2},
    **{"kl_prompts": 2, "max_new_tokens": 4, "eval_split": 0.3},
}
AUGMENT = {"rank": "shorter", "max_new_tokens": 4, "responses": 2}


def dpo(*words: object) -> Result:
    return CliRunner().invoke(app, list(map(str, words)))


def put(file: Path, value: Any) -> Path:
    """A JSON file, or a text, with the folders that it lies in."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return file


def changed(file: Path, **values: Any) -> None:
    """Keys of a JSON file set to these values."""
    put(file, {**json.loads(file.read_text(encoding="utf-8")), **values})


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """A file that hostile code would write; it must not be there at the end."""
    place = tmp_path / "code-was-run"
    yield place
    assert not place.exists()


@pytest.fixture
def model(tmp_path: Path, tiny_model_dir: Path) -> Path:
    """A copy of the tiny model, to be spoilt."""
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def config(tmp_path: Path, model: Path, pairs_file: Pairs) -> Path:
    values = {**OPTIONS, "model_name": str(model), "dataset": str(pairs_file()), "output_dir": str(tmp_path / "run")}
    return put(tmp_path / "config.json", values)


class Pickled:
    """Unpickled, it writes the marker."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.marker), "w")


def codes(result: Result) -> list[str]:
    """The codes of the errors that `--json` told."""
    return [problem["code"] for problem in json.loads(result.stdout)["problems"] if problem["severity"] == "error"]


# Code in the files of a model


def own_config(model: Path) -> None:
    auto_map = {"AutoConfig": "hostile.HostileConfig", "AutoModelForCausalLM": "hostile.HostileModel"}
    changed(model / "config.json", auto_map=auto_map, model_type="hostile")


def own_tokenizer(model: Path) -> None:
    changed(
        model / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["hostile.HostileTokenizer", None]},
        tokenizer_class="HostileTokenizer",
    )


def old_tokenizer(model: Path) -> None:
    changed(
        model / "tokenizer_config.json",
        auto_map=["owner/other--hostile.HostileTokenizer", None],
        tokenizer_class="HostileTokenizer",
    )


def own_kernels(model: Path) -> None:
    changed(model / "config.json", attn_implementation="owner/kernels")


SPOILT = [own_config, own_tokenizer, old_tokenizer, own_kernels]


def hostile(marker: Path) -> str:
    """A module that writes the marker, whatever is then asked of it."""
    return (
        f"open({str(marker)!r}, 'w').close()\n"
        "from transformers import LlamaConfig as HostileConfig, LlamaForCausalLM as HostileModel\n"
        "from transformers import PreTrainedTokenizerFast as HostileTokenizer\n"
    )


def test_the_hostile_module_would_run(model: Path, tmp_path: Path) -> None:
    """What these tests rest on: where it is trusted, transformers runs it."""
    put(model / "hostile.py", hostile(tmp_path / "was-run"))
    own_config(model)
    trusting = f"from transformers import AutoConfig; AutoConfig.from_pretrained({str(model)!r}, trust_remote_code=True)"
    subprocess.run([sys.executable, "-c", trusting], env={**os.environ, "HF_HOME": str(tmp_path)}, check=True)
    assert (tmp_path / "was-run").exists()


@pytest.mark.parametrize("spoil", SPOILT)
def test_a_model_that_needs_its_own_code_is_refused(
    spoil: Callable[[Path], None], model: Path, config: Path, marker: Path, tmp_path: Path
) -> None:
    put(model / "hostile.py", hostile(marker))
    spoil(model)
    for command in ("validate", "train"):
        result = dpo(command, config, "--json")
        assert (result.exit_code, codes(result)) == (3, ["model-code"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("spoil", SPOILT)
def test_a_reward_model_that_needs_its_own_code_is_refused(
    spoil: Callable[[Path], None], model: Path, config: Path, marker: Path, tmp_path: Path, tiny_model_dir: Path
) -> None:
    put(model / "hostile.py", hostile(marker))
    spoil(model)
    changed(config, model_name=str(tiny_model_dir), augment={**AUGMENT, "rank": "reward", "reward_model": str(model)})
    result = dpo("augment", put(tmp_path / "p.txt", "hello\n"), config, "--out", tmp_path / "out.jsonl")
    assert result.exit_code == 1 and ("code of its own" in result.stderr or "kernels from elsewhere" in result.stderr)


def test_code_that_is_not_needed_is_told_of_and_not_run(model: Path, config: Path, marker: Path, tmp_path: Path) -> None:
    """As many models of the hub have it: transformers has their classes by now. What is written names that code no more."""
    put(model / "hostile.py", hostile(marker))
    put(model / "custom_generate" / "generate.py", hostile(marker))
    auto_map = {"AutoConfig": "hostile.HostileConfig", "AutoModelForCausalLM": "hostile.HostileModel"}
    changed(model / "config.json", auto_map=auto_map)
    changed(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["hostile.HostileTokenizer", None]})
    found = json.loads(dpo("validate", config, "--json").stdout)["problems"]
    assert [problem["severity"] for problem in found if problem["code"] == "model-code-unused"] == ["hint"]
    assert dpo("train", config).exit_code == 0
    assert dpo("eval", tmp_path / "run").exit_code == 0
    assert dpo("train", config, "lora_r=0", f"output_dir={tmp_path / 'whole'}").exit_code == 0
    written = [file for place in ("run", "whole") for file in (tmp_path / place).rglob("*.json")]
    assert len(written) > 10
    assert [file for file in written if "hostile" in file.read_text(encoding="utf-8") and file.name != "plan.json"] == []


def test_weights_that_are_no_safetensors_are_never_unpickled(model: Path, config: Path, marker: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Pickled(marker)))
    assert codes(dpo("validate", config, "--json")) == ["model-no-weights"]
    assert codes(dpo("train", config, "--json")) == ["model-no-weights"]
    # Safetensors beside them, and an index that names the others.
    save_file({"x": torch.zeros(1)}, str(model / "other.safetensors"))
    put(model / "model.safetensors.index.json", {"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model.bin"}})
    assert codes(dpo("train", config, "--json")) == ["model-no-weights"]
    put(model / "model.safetensors.index.json", {"metadata": {}, "weight_map": {"lm_head.weight": "../x.safetensors"}})
    assert codes(dpo("train", config, "--json")) == ["model-no-weights"]


# Adapters and runs


@pytest.fixture
def adapter(config: Path, tmp_path: Path) -> Path:
    """The adapter of a finished run, which lies in a folder of its own too."""
    result = dpo("train", config)
    assert result.exit_code == 0, result.output
    shutil.copytree(tmp_path / "run" / "adapter", tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_that_is_no_safetensors_is_never_unpickled(config: Path, adapter: Path, marker: Path, tmp_path: Path) -> None:
    for place in (adapter, tmp_path / "run" / "adapter"):
        (place / "adapter_model.safetensors").unlink()
        (place / "adapter_model.bin").write_bytes(pickle.dumps(Pickled(marker)))
    assert codes(dpo("eval", config, "--adapter", adapter, "--json")) == ["not-an-adapter"]
    assert codes(dpo("train", config, f"model_name={adapter}", "output_dir=next", "--json")) == ["adapter-unusable"]
    for command in (["eval", tmp_path / "run"], ["export", tmp_path / "run", "--out", tmp_path / "out"]):
        assert codes(dpo(*command, "--json")) == ["not-a-run"]
    # With other safetensors beside it, whose sum is the one that the run names.
    save_file({"x": torch.zeros(1)}, str(tmp_path / "run" / "adapter" / "other.safetensors"))
    from dpo_cli.runs.directory import sha256_of_all

    changed(tmp_path / "run" / "metrics.json", adapter_sha256=sha256_of_all(tmp_path / "run" / "adapter"))
    assert dpo("eval", tmp_path / "run").exit_code == 1


@pytest.mark.parametrize(
    "named",
    [{"megatron_config": {}, "megatron_core": "hostile"}, {"megatron_config": {"a": 1}, "megatron_core": "hostile"}]
    + [{"auto_mapping": {"base_model_class": "HostileModel", "parent_library": "hostile"}}],
)
def test_an_adapter_imports_nothing(
    named: dict[str, Any], config: Path, adapter: Path, marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(put(tmp_path / "way" / "hostile.py", hostile(marker)).parent))
    for place in (adapter, tmp_path / "run" / "adapter"):
        changed(place / "adapter_config.json", **named)
    if named.get("megatron_config") == {}:  # of no effect in PEFT
        assert dpo("eval", tmp_path / "run").exit_code == 0
        return
    assert codes(dpo("train", config, f"model_name={adapter}", "output_dir=next", "--json")) == ["adapter-unusable"]
    assert codes(dpo("eval", config, "--adapter", adapter, "--json")) == ["not-an-adapter"]
    for command in (["eval", tmp_path / "run"], ["export", tmp_path / "run", "--out", tmp_path / "out"]):
        result = dpo(*command)
        assert result.exit_code == 1 and "no code of an adapter is run" in result.stderr


def test_the_tokenizer_of_an_adapter_runs_no_code(config: Path, adapter: Path, marker: Path, tmp_path: Path) -> None:
    put(adapter / "hostile.py", hostile(marker))
    own_tokenizer(adapter)
    assert codes(dpo("train", config, f"model_name={adapter}", "output_dir=next", "--json")) == ["model-code"]
    put(tmp_path / "run" / "adapter" / "hostile.py", hostile(marker))
    own_tokenizer(tmp_path / "run" / "adapter")
    assert dpo("eval", config, f"model_name={tmp_path / 'run'}", "--adapter", tmp_path / "run").exit_code in (1, 3)


def test_a_gguf_file_is_read_alone(model: Path, config: Path, marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers looks for a tokenizer_config.json beside the file, and asks on the terminal whether to run its code."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    put(model / "hostile.py", hostile(marker))
    own_config(model)
    own_tokenizer(model)
    write_gguf(model / "tiny.gguf", {"general.architecture": "llama"})
    result = dpo("train", config, f"model_name={model / 'tiny.gguf'}")
    assert result.exit_code in (1, 3) and "custom code" not in result.output


def test_a_plan_is_a_config_like_any_other(config: Path, adapter: Path, tmp_path: Path) -> None:
    plan = json.loads((tmp_path / "run" / "plan.json").read_text(encoding="utf-8"))
    plan["config"]["trust_remote_code"] = True
    result = dpo("train", put(tmp_path / "plan.json", plan), f"output_dir={tmp_path / 'again'}", "--json")
    (problem,) = [problem for problem in json.loads(result.stdout)["problems"] if problem["severity"] == "error"]
    assert (result.exit_code, problem["code"]) == (3, "unknown-key") and "runs no code of a model" in problem["fix"]

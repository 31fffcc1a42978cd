"""The Unsloth provider: refused where it cannot run, and held to what it calls where the package is (`make check-unsloth`)."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, made_row
from safetensors.torch import load_file, save_file
from test_imports import HEAVY

from dpo_cli.config.config import load
from dpo_cli.hardware.machine import Gpu, Machine, probe
from dpo_cli.plan.decisions import resolve
from dpo_cli.plan.preflight import inspect

INSTALL = "pip install 'dpo-cli[unsloth]'"
NO_CARD = Machine("cpu", 8, 32.0, gpus=(), is_apple=False, has_unsloth=True)
CARD = replace(NO_CARD, gpus=(Gpu("RTX 4090", 24.0, 23.5, 8.9),))
AMD = replace(NO_CARD, gpus=(Gpu("RX 7900", 24.0, 23.5, 0.0, "amd"),))
APPLE = replace(NO_CARD, is_apple=True)

is_here = importlib.util.find_spec("unsloth") is not None
needs_package = pytest.mark.skipif(not is_here, reason="make check-unsloth installs it, and runs this")


@pytest.fixture
def config(tmp_path: Path, tiny_model_dir: Path) -> Path:
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(made_row(i)) + "\n" for i in range(16)), encoding="utf-8")
    values = {"model_name": str(tiny_model_dir), "dataset": str(data), "provider": "unsloth", "learning_rate": 5e-3}
    values |= {"max_steps": 3, "eval_split": 0.25, "lora_r": 4, "output_dir": str(tmp_path / "run"), "bf16": False}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)


def dpo(*words: object) -> tuple[int, str, list[str]]:
    """(exit code, all that was printed, heavy modules loaded) of a command line in a process of its own."""
    code = (
        "import sys\nfrom dpo_cli.app import app\n"
        f"try: app({list(map(str, words))!r})\n"
        f"except SystemExit as end: print('END', end.code, [name for name in {(*HEAVY, 'unsloth')!r} if name in sys.modules])\n"
    )
    done = run_python(code)
    *_, last = done.stdout.splitlines()
    assert last.startswith("END "), done.stdout + done.stderr
    number, loaded = last.removeprefix("END ").split(" ", 1)
    return int(number), done.stdout + done.stderr, json.loads(loaded.replace("'", '"'))


@pytest.mark.skipif(bool(probe().gpus), reason="there is a GPU")
@pytest.mark.parametrize("override", ["device=auto", "device=cuda"])
def test_training_without_a_gpu_is_refused_before_anything_is_loaded(config: Path, override: str) -> None:
    code, told, loaded = dpo("train", config, override)
    assert (code, loaded) == (3, [])
    assert "needs an NVIDIA GPU" in told and INSTALL in told
    assert not (config.parent / "run").exists()


@pytest.mark.skipif(is_here, reason="the package is installed")
def test_training_without_the_package_is_refused_before_anything_is_loaded(config: Path) -> None:
    code, told, loaded = dpo("train", config, "device=cpu")
    assert (code, loaded) == (3, [])
    assert "the package unsloth is not installed" in told and INSTALL in told
    assert not (config.parent / "run").exists()


def test_validate_only_warns(config: Path) -> None:
    code, told, loaded = dpo("validate", config, "--json")
    assert (code, loaded) == (0, [])
    document = json.loads(told[: told.rindex("\n}") + 2])
    severities = {problem["severity"] for problem in document["problems"] if problem["code"].startswith("unsloth")}
    assert document["ok"] and severities <= {"warning"}


@pytest.mark.parametrize(
    ("machine", "device", "vram_gb", "told"),
    [
        (CARD, None, None, {}),
        (CARD, "cuda", None, {}),
        (CARD, "cpu", None, {"unsloth-on-cpu": False}),
        (NO_CARD, "cpu", None, {"unsloth-on-cpu": False}),
        (NO_CARD, "auto", None, {"unsloth-without-cuda": True}),
        (NO_CARD, "cuda", None, {"unsloth-without-cuda": True}),
        (AMD, None, None, {"unsloth-without-cuda": True}),
        (APPLE, "mps", None, {"unsloth-without-cuda": True}),
        (replace(CARD, has_unsloth=False), None, None, {"unsloth-not-installed": True}),
        (replace(NO_CARD, has_unsloth=False), "cpu", None, {"unsloth-on-cpu": False, "unsloth-not-installed": True}),
        (replace(NO_CARD, has_unsloth=False), None, 24.0, {}),  # planned for another machine
    ],
)
def test_what_stops_a_training(
    config: Path, machine: Machine, device: str | None, vram_gb: float | None, told: dict[str, bool]
) -> None:
    """Each reported code, with whether it stops a training on this machine."""
    found = inspect(load(str(config), [f"device={device}"] if device else []), machine, vram_gb).problems
    assert {problem.code: problem.stops_training for problem in found if problem.code.startswith("unsloth")} == told


def test_the_plan_counts_each_prompt_twice(config: Path) -> None:
    """So the bill is that of the padded rows from the start, and not only once the model is loaded."""
    ours = resolve(load(str(config)), CARD)
    assert not ours.scoring.shared and "drops the mask" in ours.scoring.why
    shared = resolve(load(str(config), ["provider=huggingface"]), CARD)
    assert shared.scoring.shared and not resolve(load(str(config), ["prompt_sharing=false"]), CARD).scoring.shared


def test_no_length_is_stretched(config: Path) -> None:
    """The tiny model's context is 2048: beyond it Unsloth would scale the positions, and train another model."""
    for provider, stops in (("unsloth", True), ("huggingface", False)):
        found = inspect(load(str(config), ["max_seq_length=4096", f"provider={provider}"]), CARD).problems
        assert [problem.stops_training for problem in found if problem.code == "beyond-context"] == [stops]


def test_what_is_imported_first_brings_nothing_heavy() -> None:
    done = run_python(
        f"import sys, dpo_cli.providers.unsloth_import\nprint([name for name in {HEAVY!r} if name in sys.modules])"
    )
    assert done.stdout == "[]\n", done.stderr


# What the provider passes, and the default it has without us.
PASSED = {"max_seq_length": 2048, "dtype": None, "load_in_4bit": True, "use_gradient_checkpointing": "unsloth"}
PASSED |= {"device_map": None}
CUDA_PASSED = {**PASSED, "device_map": "sequential", "use_exact_model_name": False}
# UNSLOTH_ALLOW_CPU, which the import for "cuda" sets, shows its CUDA side without a GPU: enough to read it, not to run it.
LOOK = """
import inspect, json, sys, warnings
from dpo_cli.providers.unsloth_import import import_unsloth
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    import_unsloth({device!r})
from unsloth import FastLanguageModel
from trl import DPOTrainer
import trl.trainer.dpo_trainer as own
def of(function):
    parameters = inspect.signature(function).parameters.values()
    return {{p.name: None if p.default is p.empty else p.default for p in parameters}}
seen = {{"from_pretrained": of(FastLanguageModel.from_pretrained), "trainer": DPOTrainer.__module__}}
seen["too_late"] = [str(w.message) for w in told if "should be imported before" in str(w.message)]
if {device!r} == "cuda":
    seen["patch_peft_model"] = of(FastLanguageModel.patch_peft_model)
    from unsloth.models.rl import _patch_trl_rl_trainers
    peft = inspect.getsource(DPOTrainer.__init__).split("# PEFT\\n")[1].split(":\\n")[0].strip()
    _patch_trl_rl_trainers("dpo_trainer")
    from trl import DPOTrainer as rewritten
    source = inspect.getsource(rewritten.__mro__[1].__init__)
    seen["peft"] = [peft, source.split("# PEFT\\n")[1].split(":\\n")[0].strip(), rewritten.__name__]
print("SEEN", json.dumps(seen, default=str))
"""


def look(device: str) -> dict[str, Any]:
    done = run_python(LOOK.format(device=device))
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("SEEN ")] or [""]
    assert line, done.stdout + done.stderr
    seen: dict[str, Any] = json.loads(line.removeprefix("SEEN "))
    return seen


@needs_package
def test_contract_of_the_cpu_fallback() -> None:
    seen = look("cpu")
    assert {name: seen["from_pretrained"].get(name, "gone") for name in PASSED} == PASSED
    assert seen["trainer"] == "trl.trainer.dpo_trainer"


@needs_package
def test_contract_of_the_cuda_side() -> None:
    """Its loader and its patch take what we pass, it is imported in time, and TRL's trainer is left alone.

    The last line is why: the trainer that it would put in its place has "if False" where TRL puts on the adapter.
    """
    seen = look("cuda")
    assert {name: seen["from_pretrained"].get(name, "gone") for name in CUDA_PASSED} == CUDA_PASSED
    assert seen["patch_peft_model"] == {"model": None, "use_gradient_checkpointing": "unsloth"}
    assert seen["trainer"] == "trl.trainer.dpo_trainer"
    assert seen["too_late"] == []
    assert seen["peft"] == ["if peft_config is not None", "if False", "UnslothDPOTrainer"]


@needs_package
@pytest.mark.parametrize("options", [[], ["use_4bit=true"]])
def test_a_run_through_the_fallback_is_that_of_huggingface(config: Path, options: list[str]) -> None:
    """Same seed, same pairs, same trainer: bit for bit the same adapter, where Unsloth has no kernels of its own."""
    runs = {"unsloth": [], "huggingface": ["prompt_sharing=false"]}
    summaries = {}
    for provider, own in runs.items():
        place = config.parent / provider
        words = ["train", config, "device=cpu", f"provider={provider}", f"output_dir={place}", "--json", *own, *options]
        code, told, _ = dpo(*words)
        assert code == 0, told
        assert ("Unsloth (CPU)" in (place / "train.log").read_text(encoding="utf-8")) == (provider == "unsloth")
        summaries[provider] = json.loads((place / "metrics.json").read_text(encoding="utf-8"))
        assert json.loads(told[: told.rindex("\n}") + 2])["run_dir"] == str(place)  # one document on standard output
    ours, theirs = summaries["unsloth"], summaries["huggingface"]
    assert ours["train"]["loss"] < 0.69
    assert ours["adapter_sha256"] == theirs["adapter_sha256"]
    assert ours["eval"] == theirs["eval"]
    code, told, loaded = dpo("eval", config.parent / "unsloth", "--json")
    assert code == 0 and "unsloth" not in loaded, told
    judged = json.loads(told[: told.rindex("\n}") + 2])["policy"]
    assert judged["margin"]["value"] == pytest.approx(ours["eval"]["margin"]["value"], abs=1e-4)


@needs_package
def test_four_bits_of_another_kind_are_refused(config: Path) -> None:
    """Unsloth's fallback makes nf4 whatever it is asked for."""
    code, told, _ = dpo("train", config, "device=cpu", "use_4bit=true", "bnb_4bit_quant_type=fp4")
    assert code == 1 and "did not quantise this model as the config says" in told
    assert "Traceback" not in told


@needs_package
def test_what_is_loaded_is_looked_at_as_elsewhere(config: Path, tiny_model_dir: Path) -> None:
    """Settings that nothing can be saved with are left out, and numbers that are none are named."""
    folder = config.parent / "model"
    shutil.copytree(tiny_model_dir, folder)
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False, "temperature": 0.5}), encoding="utf-8")
    words = ["train", config, "device=cpu", f"model_name={folder}"]
    code, told, _ = dpo(*words)
    assert code == 0 and "generation_config.json: temperature" in told, told
    file = folder / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("down_proj.weight"))
    weights[name].view(-1)[0] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    code, told, _ = dpo(*words, "--overwrite")
    assert code == 3 and name in told, told

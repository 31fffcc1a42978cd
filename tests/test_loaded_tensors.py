"""Every tensor is accounted for on every load: a damaged model or adapter is refused by name, or computes the same."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from builders import log_probs, randomised, tiny_tokenizer
from conftest import SHAPE
from huggingface_hub import constants
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_cli.config.config import load
from dpo_cli.errors import InvalidInput, RunFailed
from dpo_cli.hardware.machine import probe
from dpo_cli.models import tensor_files
from dpo_cli.models.source import ModelSource
from dpo_cli.plan.decisions import resolve
from dpo_cli.plan.plan import Plan
from dpo_cli.providers.huggingface import HuggingFace

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
# An architecture of each kind: dense, tied, a mixture of experts (two ways to name them in files), hybrid.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "qwen3": {"tie_word_embeddings": True},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": EXPERTS,
    "falcon_h1": {**MAMBA, "mamba_chunk_size": 8},
}
NO_DROPOUT = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
TARGETS = {"falcon_h1": ["q_proj", "v_proj", "gate_proj"]}
TRIES = 30  # of each architecture, and as many of an adapter on it: 300 in all
Place = Callable[[str], Path]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A model directory of an architecture, or with "-adapter" after its name an adapter on it, made once."""
    root = tmp_path_factory.mktemp("models")

    def of(name: str) -> Path:
        folder, family = root / name, name.removesuffix("-adapter")
        if folder.is_dir():
            return folder
        if name == family:
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SHAPE, **ARCHITECTURES[family]}))
            randomised(model)
            model.save_pretrained(folder)
            tiny_tokenizer().save_pretrained(folder)
        else:
            base = AutoModelForCausalLM.from_pretrained(of(family))
            config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=TARGETS.get(family, "all-linear"))
            model = get_peft_model(base, config)
            randomised(model)
            model.save_pretrained(folder)
        return folder

    return of


def plan_of(model: Path, tmp_path: Path, **options: Any) -> Plan:
    config = tmp_path / "config.json"
    values = {"model_name": str(model), "dataset": "pairs.jsonl", "device": "cpu", "bf16": False, "fp16": False, **options}
    config.write_text(json.dumps(values), encoding="utf-8")
    return resolve(load(str(config)), probe())


def damaged(folder: Path, draw: random.Random) -> list[str]:
    """Damage the weights in `folder` in one of seven ways: the tensors, or the file, that a refusal has to name one of."""
    file = next(folder.glob("*model.safetensors"))
    parts = load_file(file)
    name = draw.choice(sorted(parts))
    way = draw.choice(["drop", "rename", "reshape", "cut", "prefix", "nan", "shards"])
    if way == "cut":
        content = file.read_bytes()
        file.write_bytes(content[: draw.randrange(len(content))])
        return [file.name]
    if way == "shards" and not file.name.startswith("adapter"):
        return _in_shards(folder, parts, draw)
    if way == "drop":
        del parts[name]
    elif way == "rename":
        pieces = name.split(".")
        pieces[draw.randrange(len(pieces))] += "x"
        parts[".".join(pieces)] = parts.pop(name)
    elif way == "reshape":
        parts[name] = parts[name].repeat(2, *[1] * (parts[name].dim() - 1)) if draw.random() < 0.5 else parts[name][:-1].clone()
    elif way == "nan":
        parts[name].view(-1)[draw.randrange(parts[name].numel())] = float("nan")
    else:
        parts = {f"module.{name}": tensor for name, tensor in parts.items()}
        name = "module."
    save_file(parts, file, metadata={"format": "pt"})
    return [name.removeprefix("base_model.model.")]


def _in_shards(folder: Path, parts: dict[str, Tensor], draw: random.Random) -> list[str]:
    """Two files with an index, of which one is gone, or is not named in the index."""
    (folder / tensor_files.SINGLE).unlink()
    names, files = sorted(parts), ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    for file, half in zip(files, halves, strict=True):
        save_file({name: parts[name] for name in half}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, half in zip(files, halves, strict=True) for name in half}
    lost = draw.randrange(2)
    if draw.random() < 0.5:
        (folder / files[lost]).unlink()
    else:
        weight_map = {name: file for name, file in weight_map.items() if file != files[lost]}
    (folder / tensor_files.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    return [files[lost]]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_a_damaged_model_is_refused_by_name_or_computes_the_same(place: Place, tmp_path: Path, family: str) -> None:
    plan = plan_of(place(family), tmp_path)
    whole = log_probs(HuggingFace(ModelSource.of(str(place(family)))).base_model(plan))
    torch.testing.assert_close(whole, log_probs(AutoModelForCausalLM.from_pretrained(place(family))))
    refused = 0
    for number in range(TRIES):
        folder = tmp_path / f"try-{number}"
        shutil.copytree(place(family), folder)
        names = damaged(folder, random.Random(f"{family} {number}"))
        refused += is_refused(
            partial(lambda path: HuggingFace(ModelSource.of(path)).base_model(plan), str(folder)), whole, names
        )
        shutil.rmtree(folder)
    assert refused > TRIES / 2


WHOLE = torch.ones(4, 4, dtype=torch.int8)
PART = torch.ones(4, 4)


def in_files(folder: Path, files: dict[str, dict[str, Tensor]]) -> list[str]:
    """What is wrong with a folder of these files, whose index places every tensor in the first that holds it."""
    index: dict[str, str] = {}
    for name, tensors in files.items():
        save_file(tensors, folder / name)
        index = {**dict.fromkeys(tensors, name), **index}
    (folder / tensor_files.INDEX).write_text(json.dumps({"weight_map": index}), encoding="utf-8")
    return [fault.message for fault in tensor_files.faults(tensor_files.TensorFiles(folder), {})]


def test_a_tensor_that_stands_twice_is_the_same_or_refused(tmp_path: Path) -> None:
    files = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    assert (
        in_files(tmp_path, dict(zip(files, ({"a.weight": PART}, {"a.weight": PART, "b.weight": PART.clone()}), strict=True)))
        == []
    )
    for other in (PART + 1, PART.half(), PART.reshape(2, 8)):
        (fault,) = in_files(
            tmp_path, dict(zip(files, ({"a.weight": PART}, {"a.weight": other, "b.weight": PART + 1}), strict=True))
        )
        assert "both hold a.weight" in fault


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool])
def test_whole_numbers_are_no_weights_without_their_scale(tmp_path: Path, dtype: torch.dtype) -> None:
    masks = {"h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=dtype), "position_ids": torch.ones(1, 4, dtype=dtype)}
    assert in_files(tmp_path, {"one.safetensors": masks}) == []
    (fault,) = in_files(tmp_path, {"one.safetensors": {**masks, "a.weight": WHOLE.to(dtype)}})
    assert "a.weight" in fault and "no quantization_config" in fault


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"load_in_8bit": True}, ["a.SCB"]),
        ({"load_in_4bit": True}, ["a.weight.absmax", "a.weight.quant_map", "a.weight.quant_state.bitsandbytes__nf4"]),
    ],
)
def test_a_lost_part_of_quantised_weights_is_named(tmp_path: Path, settings: dict[str, bool], parts: list[str]) -> None:
    config = {"quantization_config": {"quant_method": "bitsandbytes", **settings}}
    for lost in (None, *parts):
        save_file({"a.weight": WHOLE, **{part: PART.clone() for part in parts if part != lost}}, tmp_path / tensor_files.SINGLE)
        found = [fault.message for fault in tensor_files.faults(tensor_files.TensorFiles(tmp_path), config)]
        assert len(found) == (lost is not None) and all(str(lost).removesuffix("nf4") in message for message in found)


def test_a_pointer_of_git_lfs_is_called_so(tmp_path: Path) -> None:
    (tmp_path / tensor_files.SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    (fault,) = tensor_files.faults(tensor_files.TensorFiles(tmp_path), {})
    assert "is a Git LFS pointer" in fault.message and "git lfs pull" in fault.fix


CONFIG = {"r": 2, "target_modules": ["q_proj"], "use_dora": False}
HALVES = {f"base_model.model.layers.{layer}.q_proj.lora_{half}.weight": (2, 2) for layer in (0, 1) for half in "AB"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, ""),
        ({"r": 4}, "rank 2 .* has r 4"),
        ({"r": 4, "rank_pattern": {"q_proj": 2}}, ""),
        ({"target_modules": ["proj", "v_proj"]}, "target_modules proj, v_proj"),
        ({"target_modules": ".*q_proj"}, ""),
        ({"layers_to_transform": [1]}, r"layers\.0.* layers_to_transform"),
        ({"use_dora": True}, "lacks the magnitudes of DoRA"),
    ],
)
def test_an_adapter_is_as_its_config_says_by_its_header(change: dict[str, Any], said: str) -> None:
    fault = tensor_files.lora_fault(HALVES, {}, {**CONFIG, **change})
    assert (fault is not None) == bool(said) and (fault is None or re.search(said, fault.message))


def test_the_other_half_of_an_adapter_is_named() -> None:
    for lost in HALVES:
        fault = tensor_files.lora_fault({name: shape for name, shape in HALVES.items() if name != lost}, {}, CONFIG)
        assert fault is not None and f"lacks 1 tensor ({lost})" in fault.message and "copy it again" in fault.fix
    fault = tensor_files.lora_fault(HALVES, dict.fromkeys(HALVES, "I8"), CONFIG)
    assert fault is not None and "whole numbers (I8)" in fault.message


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_a_damaged_adapter_is_refused_by_name_or_computes_the_same(place: Place, tmp_path: Path, family: str) -> None:
    base, adapter = place(family), place(f"{family}-adapter")
    plan = plan_of(base, tmp_path)
    provider = HuggingFace(ModelSource.of(str(base)))
    whole = log_probs(provider.trained(plan, adapter).model)
    by_hand = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    torch.testing.assert_close(whole, log_probs(by_hand))
    assert (whole - log_probs(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 0.01
    refused = 0
    for number in range(TRIES):
        folder = tmp_path / f"try-{number}"
        shutil.copytree(adapter, folder)
        names = damaged(folder, random.Random(f"{family} adapter {number}"))
        refused += is_refused(partial(lambda path: provider.trained(plan, path).model, folder), whole, names)
        shutil.rmtree(folder)
    assert refused > TRIES / 2


def is_refused(open_it: Callable[[], nn.Module], whole: Tensor, names: list[str]) -> bool:
    """Whether it was refused; the third outcome, other log-probs or a refusal without a name, fails."""
    try:
        model = open_it()
    except (InvalidInput, RunFailed) as error:
        assert any(name in str(error) for name in names), f"{names} in {error}"
        return True
    torch.testing.assert_close(log_probs(model), whole, msg=lambda text: f"{names}: {text}")
    return False


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_what_config_json_leaves_to_its_class_is_not_guessed(place: Place, family: str) -> None:
    """Each key but the family may be gone: nothing is held against the files that only a default could tell."""
    folder = place(family)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for key in [key for key in config if key != "model_type"]:
        assert not list(
            tensor_files.faults(
                tensor_files.TensorFiles(folder), {name: value for name, value in config.items() if name != key}
            )
        ), key
    assert not list(tensor_files.faults(tensor_files.TensorFiles(folder), {"model_type": config["model_type"]}))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_joined_experts_are_read_from_files(place: Place, tmp_path: Path, family: str) -> None:
    """As they are in memory; a joined tensor that is not whole is refused by its name."""
    model = AutoModelForCausalLM.from_pretrained(place(family))
    shutil.copytree(place(family), folder := tmp_path / "joined")
    weights = {name: part.clone() for name, part in model.state_dict().items()}
    save_file(weights, folder / tensor_files.SINGLE, metadata={"format": "pt"})
    assert any(name.endswith("experts.gate_up_proj") for name in weights)
    loaded = HuggingFace(ModelSource.of(str(folder))).base_model(plan_of(folder, tmp_path))
    torch.testing.assert_close(log_probs(loaded), log_probs(model))
    for name in [name for name in weights if "layers.1.mlp" in name]:
        rest = {other: part for other, part in weights.items() if other != name}
        for damage in (rest, {**rest, name: weights[name][:-1].contiguous()}):
            save_file(damage, folder / tensor_files.SINGLE, metadata={"format": "pt"})
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            assert any(name in fault.message for fault in tensor_files.faults(tensor_files.TensorFiles(folder), config))


def test_files_left_over_from_another_division_are_passed_over(place: Place, tmp_path: Path) -> None:
    shutil.copytree(place("llama"), folder := tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / tensor_files.SINGLE).unlink()
    model.save_pretrained(folder, max_shard_size="40KB")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shard = min(folder.glob("model-*.safetensors"))
    old = folder / "model-00001-of-00099.safetensors"
    shutil.copy(shard, old)
    assert not list(tensor_files.faults(tensor_files.TensorFiles(folder), config))
    save_file({"another": torch.zeros(1)}, old)
    assert ["another" in fault.message for fault in tensor_files.faults(tensor_files.TensorFiles(folder), config)] == [True]
    old.rename(folder / f"model-00099-of-{shard.name.partition('-of-')[2]}")
    assert ["model-00099" in fault.message for fault in tensor_files.faults(tensor_files.TensorFiles(folder), config)] == [True]


WITH_MASKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "gpt2": ("transformer.h.1.attn", ("bias", "masked_bias")),
    "gpt_neo": ("transformer.h.1.attn.attention", ("bias", "masked_bias")),
    "gptj": ("transformer.h.1.attn", ("bias", "masked_bias")),
    "codegen": ("transformer.h.1.attn", ("causal_mask",)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", WITH_MASKS)
def test_masks_that_old_files_hold_are_passed_over(tmp_path: Path, family: str) -> None:
    """Older versions of transformers stored them; anything else of these names has no place."""
    options: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4}
    if family == "gpt_neo":
        options = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, vocab_size=300, **options, **NO_DROPOUT))
    model.save_pretrained(folder := tmp_path / "model")
    tiny_tokenizer().save_pretrained(folder)
    place, names = WITH_MASKS[family]
    weights = load_file(folder / tensor_files.SINGLE)
    for name in names:
        weights[f"{place}.{name}"] = torch.tensor(-1e4) if name == "masked_bias" else torch.ones(1, 1, 64, 64)
    save_file(weights, folder / tensor_files.SINGLE, metadata={"format": "pt"})
    provider = HuggingFace(ModelSource.of(str(folder)))
    torch.testing.assert_close(log_probs(provider.base_model(plan_of(folder, tmp_path))), log_probs(model))
    if family != "gpt2":  # where transformers itself passes over the other
        assert [f"{place}.{names[0]}" in note and "ignored" in note for note in provider.notes] == [True]
    weights[f"{place}.{names[-1]}"] = torch.ones(32)
    save_file(weights, folder / tensor_files.SINGLE, metadata={"format": "pt"})
    with pytest.raises(InvalidInput, match=f"{place}.{names[-1]}.*without a place"):
        HuggingFace(ModelSource.of(str(folder))).base_model(plan_of(folder, tmp_path))


def test_the_order_of_experts_is_seen_in_a_model_of_the_hub(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was fetched is looked at as a local folder is."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--owner--model" / "snapshots" / ("a" * 40)
    shutil.copytree(place("mixtral"), folder)
    (folder.parents[1] / "refs").mkdir()
    (folder.parents[1] / "refs/main").write_text("a" * 40, encoding="utf-8")
    monkeypatch.setattr(transformers.utils.hub, "TRANSFORMERS_CACHE", str(tmp_path), raising=False)
    plan = plan_of(place("mixtral"), tmp_path)
    HuggingFace(ModelSource.of("owner/model")).base_model(plan)
    weights = load_file(folder / tensor_files.SINGLE)
    renamed = {name.replace("experts.1.", "experts.7."): part for name, part in weights.items()}
    save_file(renamed, folder / tensor_files.SINGLE, metadata={"format": "pt"})
    with pytest.raises(InvalidInput, match=r"experts\.1"):
        HuggingFace(ModelSource.of("owner/model")).base_model(plan)

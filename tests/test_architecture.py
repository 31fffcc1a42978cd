"""What a run trains of its model, before the weights are loaded: against PEFT's own model, and counted by hand."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from builders import tiny_tokenizer
from conftest import CONFIGS, SHAPE, Run
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from typer.testing import CliRunner

from dpo_cli.app import app
from dpo_cli.config.config import load
from dpo_cli.config.options import Config
from dpo_cli.errors import InvalidInput, Problem
from dpo_cli.hardware.machine import probe
from dpo_cli.plan.decisions import resolve
from dpo_cli.plan.plan import Adapted
from dpo_cli.plan.preflight import inspect
from dpo_cli.providers.architecture import Architecture, adapted

pytestmark = pytest.mark.filterwarnings("ignore")
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
SIGLIP = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGES = {"mm_tokens_per_image": 4, "image_token_index": 290, "boi_token_index": 291, "eoi_token_index": 292}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": CONFIGS["llama"],
    "qwen3": CONFIGS["qwen3"],  # tied
    "gpt2": CONFIGS["gpt2"],  # Conv1D
    "biogpt": AutoConfig.for_model("biogpt", **SHAPE),  # its head has another name
    "mixtral": AutoConfig.for_model("mixtral", **SHAPE, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": AutoConfig.for_model("qwen3_moe", **SHAPE, **EXPERTS),
    "falcon_h1": AutoConfig.for_model("falcon_h1", **SHAPE, **MAMBA, mamba_chunk_size=32),
    "gemma3": AutoConfig.for_model(
        "gemma3",
        text_config={**SHAPE, "sliding_window": 32},
        vision_config={**SIGLIP, "image_size": 28, "patch_size": 14},
        **IMAGES,
    ),
}


def config_of(place: Path, model: Path | str = "owner/model", **options: Any) -> Config:
    values = {"model_name": str(model), "dataset": "pairs.jsonl", "device": "cpu", "lora_r": 4, "lora_dropout": 0.0}
    (place / "config.json").write_text(json.dumps({**values, "lora_alpha": 8, **options}), encoding="utf-8")
    return load(str(place / "config.json")).config


def fresh(family: str, place: Path, **options: Any) -> tuple[LoraConfig, Adapted]:
    return Architecture(FAMILIES[family], family).fresh(config_of(place, **options))


def refused(family: str, place: Path, **options: Any) -> Problem:
    with pytest.raises(InvalidInput) as caught:
        fresh(family, place, **options)
    (problem,) = caught.value.problems
    return problem


def saved(family: str, folder: Path) -> Path:
    """A model directory with a tokenizer."""
    AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES[family])).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
FUSED = ["experts.gate_up_proj", "experts.down_proj"]
# Both blocks have each of these kinds of layers under "all-linear"; weights of a rank-4 adapter on one block, by hand:
# 4 * (inputs + outputs) a layer, and for a fused tensor 4 for each expert. Hidden states are 32 wide, keys and values 16.
DENSE = 4 * (64 + 48 + 48 + 64)
BY_HAND: dict[str, tuple[list[str], int]] = {
    "llama": ([*ATTENTION, *MLP], DENSE + 4 * 3 * 80),
    "qwen3": ([*ATTENTION, *MLP], DENSE + 4 * 3 * 80),
    "gpt2": (["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"], 4 * (32 + 96 + 64 + 160 + 160)),
    "mixtral": ([*ATTENTION, *FUSED], DENSE + 4 * 4 * (2 * (32 + 96) + 48 + 32)),
    "qwen3_moe": ([*ATTENTION, *FUSED], DENSE + 4 * 4 * (2 * (32 + 32) + 16 + 32)),
    "falcon_h1": ([*ATTENTION, *MLP, "in_proj"], DENSE + 4 * 3 * 80 + 4 * (32 + 32 + 48 + 4)),
    "gemma3": ([*ATTENTION, *MLP], DENSE + 4 * 3 * 80),
}


@pytest.mark.parametrize("family", BY_HAND)
def test_what_all_linear_touches_is_what_peft_trains(family: str, tmp_path: Path) -> None:
    adapter, shown = fresh(family, tmp_path, target_modules="all-linear")
    kinds, weights = BY_HAND[family]
    assert shown.layers == dict.fromkeys(kinds, 2)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES[family]))
    assert shown.weights == sum(weight.numel() for weight in model.parameters())
    on_model = get_peft_model(model, adapter)
    trained = {name: weight for name, weight in on_model.named_parameters() if weight.requires_grad}
    assert shown.trained == sum(weight.numel() for weight in trained.values()) == 2 * weights
    assert not [name for name in trained if any(f".{part}." in name for part in ("gate", "out_proj", "conv1d", "vision_tower"))]


@pytest.mark.parametrize(
    ("family", "left", "why"),
    [
        ("mixtral", "mlp.gate (2)", "load balancing"),
        ("qwen3_moe", "mlp.gate (2)", "load balancing"),
        ("falcon_h1", "out_proj (2)", "state-space blocks"),
        ("gemma3", "model.vision_tower (15 layers)", "no text reaches them"),
    ],
)
def test_what_all_linear_leaves_out_is_said(family: str, left: str, why: str, tmp_path: Path) -> None:
    (note,) = fresh(family, tmp_path, target_modules="all-linear")[1].notes
    assert note.startswith(f"no adapter on {left}: ") and why in note


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_model_that_is_all_touched_has_no_note(family: str, tmp_path: Path) -> None:
    assert fresh(family, tmp_path, target_modules="all-linear")[1].notes == ()


@pytest.mark.parametrize(
    ("family", "targets", "layers"),
    [
        ("llama", ["q_proj", "down_proj"], {"q_proj": 2, "down_proj": 2}),
        ("llama", r".*layers\.1\..*[qv]_proj", {"q_proj": 1, "v_proj": 1}),
        ("gpt2", ["c_attn", "mlp.c_proj"], {"c_attn": 2, "mlp.c_proj": 2}),
        ("mixtral", ["w1", "w3", "w2"], dict.fromkeys(FUSED, 2)),
        ("qwen3_moe", ["q_proj", "gate_proj", "up_proj"], {"q_proj": 2, FUSED[0]: 2}),
        ("qwen3_moe", ["gate"], {"mlp.gate": 2}),
        ("falcon_h1", ["in_proj", "q_proj"], {"in_proj": 2, "q_proj": 2}),
        ("gemma3", ["q_proj"], {"q_proj": 2}),
    ],
)
def test_what_is_named_is_touched(family: str, targets: list[str] | str, layers: dict[str, int], tmp_path: Path) -> None:
    adapter, shown = fresh(family, tmp_path, target_modules=targets)
    assert shown.layers == layers
    on_model = get_peft_model(AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES[family])), adapter)
    assert shown.trained == sum(weight.numel() for weight in on_model.parameters() if weight.requires_grad)


@pytest.mark.parametrize(
    ("family", "targets", "said"),
    [
        ("llama", ".*(q_proj|nope)", "target_modules names nope"),
        ("mixtral", ["q_proj"], "no adapter on the fused experts (experts.down_proj (2), experts.gate_up_proj (2)), 59%"),
        ("mixtral", ["gate", "w1", "w3", "w2"], "the router (mlp.gate (2)) is trained"),
        ("gemma3", ["q_proj"], "no adapter on model.vision_tower (2 layers): no text reaches them"),
    ],
)
def test_what_one_may_not_expect_is_said(family: str, targets: list[str] | str, said: str, tmp_path: Path) -> None:
    (note,) = fresh(family, tmp_path, target_modules=targets)[1].notes
    assert note.startswith(said)


@pytest.mark.parametrize(
    ("family", "targets", "code", "named"),
    [
        ("llama", ["q_proj", "nope"], "no-such-module", "nope"),
        ("llama", ".*nope", "no-such-module", ".*nope"),
        ("gpt2", ["q_proj"], "no-such-module", "q_proj"),
        ("mixtral", ["q_proj", "down_proj"], "no-such-module", "down_proj"),
        ("qwen3", ".*norm", "target-not-linear", "model.layers.0.self_attn.q_norm (Qwen3RMSNorm)"),
        ("llama", ".*self_attn", "target-not-linear", "model.layers.0.self_attn (LlamaAttention)"),
        ("qwen3_moe", ".*experts", "target-not-linear", "model.layers.0.mlp.experts (Qwen3MoeExperts)"),
        ("falcon_h1", ["q_proj", "out_proj"], "state-space-target", "out_proj"),
        ("biogpt", ["q_proj", "output_projection"], "lm-head-adapter", "output_projection"),
        ("gemma3", ".*vision_tower.*q_proj", "target-unreached", "gemma3"),
    ],
)
def test_what_no_adapter_can_be_on_is_refused(
    family: str, targets: list[str] | str, code: str, named: str, tmp_path: Path
) -> None:
    problem = refused(family, tmp_path, target_modules=targets)
    assert (problem.code, problem.key) == (code, "target_modules") and named in problem.message and problem.fix


def test_a_module_to_save_that_is_not_there_is_refused(tmp_path: Path) -> None:
    problem = refused("llama", tmp_path, modules_to_save=["embed_tokens", "nope"])
    assert (problem.key, problem.code) == ("modules_to_save", "no-such-module") and problem.message.endswith("named nope")


def test_a_module_that_is_saved_whole_is_shown(tmp_path: Path) -> None:
    shown = fresh("llama", tmp_path, target_modules=["q_proj"], modules_to_save=["embed_tokens"])[1]
    assert shown.layers == {"q_proj": 2, "embed_tokens whole": 1}
    assert shown.trained == 2 * 4 * 64 + SHAPE["vocab_size"] * 32


def test_experts_take_neither_dropout_nor_dora(tmp_path: Path) -> None:
    """The architecture names the option; `validate` has the same from the directory's files alone, and exits with 3."""
    for key, value in (("lora_dropout", 0.1), ("use_dora", True)):
        for family, names in (("mixtral", ["w1", "w2", "w3"]), ("qwen3_moe", "all-linear")):
            problem = refused(family, tmp_path, target_modules=names, **{key: value})
            assert (problem.code, problem.key) == ("adapter-on-experts", key)
            folder = tmp_path / family
            options = {"target_modules": names, key: value}
            (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n', encoding="utf-8")
            config_of(tmp_path, folder if folder.is_dir() else saved(family, folder), **options)
            loaded = load(str(tmp_path / "config.json"))
            found = [problem for problem in inspect(loaded, probe(), with_data=False).errors]
            assert [(problem.code, problem.key) for problem in found] == [("adapter-on-experts", key)]
            assert CliRunner().invoke(app, ["validate", str(tmp_path / "config.json")]).exit_code == 3
        assert fresh(family, tmp_path, target_modules=ATTENTION, **{key: value})[1].layers == dict.fromkeys(ATTENTION, 2)


def test_a_type_without_a_causal_model_is_refused(tmp_path: Path) -> None:
    """By `validate`, from config.json alone, and by the architecture."""
    config = AutoConfig.for_model("vit")
    with pytest.raises(InvalidInput) as caught:
        Architecture(config, "vit")
    config.save_pretrained(tmp_path / "vit")
    config_of(tmp_path, tmp_path / "vit")
    found = inspect(load(str(tmp_path / "config.json")), probe(), with_data=False).errors
    assert [problem.code for problem in caught.value.problems] == ["model-not-causal"]
    assert "model-not-causal" in {problem.code for problem in found}


def test_every_weight_is_shown_without_an_adapter(tmp_path: Path) -> None:
    folder = saved("mixtral", tmp_path / "base")
    config_of(tmp_path, folder, lora_r=0, lora_alpha=None)
    shown, _ = adapted(resolve(load(str(tmp_path / "config.json")), probe()), FAMILIES["mixtral"])
    assert shown is not None and (shown.layers, shown.trained) == ({}, shown.weights)
    assert shown.words == f"every one of {shown.weights:,} weights"


def test_an_adapter_that_is_trained_further_is_shown(tmp_path: Path) -> None:
    """Of its own shape: by its adapter_config.json."""
    base = saved("llama", tmp_path / "base")
    shape = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], layers_to_transform=[1])
    model: PeftModel = get_peft_model(AutoModelForCausalLM.from_pretrained(base), shape)
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "config.json").write_text(
        json.dumps({"model_name": str(tmp_path / "adapter"), "dataset": "pairs.jsonl", "device": "cpu"}), encoding="utf-8"
    )
    plan = resolve(load(str(tmp_path / "config.json")), probe())
    assert plan.goes_on
    shown, _ = adapted(plan, FAMILIES["llama"])
    assert shown is not None and (shown.layers, shown.trained) == ({"q_proj": 1}, 2 * 64)


def test_a_run_trains_what_its_plan_shows(run: Run, tmp_path: Path) -> None:
    """Mixtral with default options: no router is trained, plan.json says what is, and `dpo eval` takes the adapter."""
    summary, place = run(model_name=str(saved("mixtral", tmp_path / "base")), eval_split=0.3)
    plan = json.loads((place / "plan.json").read_text(encoding="utf-8"))
    weights = load_file(place / "adapter" / "adapter_model.safetensors")
    assert plan["adapted"]["layers"] == dict.fromkeys([*ATTENTION, *FUSED], 2)
    assert plan["adapted"]["trained"] == sum(weight.numel() for weight in weights.values())
    assert not [name for name in weights if ".gate." in name] and any(".experts." in name for name in weights)
    assert any("mlp.gate (2)" in note for note in plan["notes"])
    judged = CliRunner().invoke(app, ["eval", str(place), "--json"])
    assert judged.exit_code == 0, judged.stderr
    figure = json.loads(judged.stdout)["policy"]["margin"]["value"]
    assert figure == pytest.approx(summary["eval"]["margin"]["value"], abs=1e-6)

"""What is loaded, merged and saved is what its files say: kinds of adapters, heads, quantised files, settings, token ids."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from builders import IDS, log_probs, randomised, tiny_tokenizer
from conftest import SHAPE, made_row
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.generation import configuration_utils
from typer.testing import CliRunner, Result

from dpo_cli.app import app
from dpo_cli.config.config import load
from dpo_cli.errors import Exit, InvalidInput, RunFailed
from dpo_cli.hardware.machine import probe
from dpo_cli.models.adapter_config import CLASSIFIER_FIX, UNSUPPORTED_FIX, is_on_head, unsupported
from dpo_cli.models.checks import problems
from dpo_cli.models.generation_config import CACHES, invalid
from dpo_cli.models.source import ModelSource
from dpo_cli.plan.decisions import resolve
from dpo_cli.plan.plan import Plan
from dpo_cli.providers import loaded_tensors
from dpo_cli.providers.huggingface import HuggingFace
from dpo_cli.providers.policy import FROZEN
from dpo_cli.scoring.lm_head import Head

COMMON = {"device": "cpu", "bf16": False, "fp16": False, "max_steps": 2, "lora_r": 4, "learning_rate": 1e-2}
COMMON |= {"eval_split": 0.3, "kl_prompts": 0, "max_new_tokens": 4}
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The directory of a tiny model of a family, made once for each set of options."""
    root = tmp_path_factory.mktemp("bases")

    def of(family: str, **options: Any) -> Path:
        folder = root / "-".join([family, *map(str, options.values())])
        if not folder.is_dir():
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SHAPE, **options}))
            randomised(model)
            model.save_pretrained(folder)
            tiny_tokenizer().save_pretrained(folder)
        return folder

    return of


def adapter_on(folder: Path, place: Path, **options: Any) -> Path:
    """A random adapter that PEFT itself made and saved."""
    config = LoraConfig(task_type="CAUSAL_LM", r=2, **{"target_modules": ["q_proj", "v_proj"], **options})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    randomised(model)
    model.save_pretrained(place)
    return place


def plan_of(model: Path | str, tmp_path: Path, **options: Any) -> Plan:
    config = tmp_path / "plan-config.json"
    values = {"model_name": str(model), "dataset": "pairs.jsonl", "device": "cpu", "bf16": False, "fp16": False, **options}
    config.write_text(json.dumps(values), encoding="utf-8")
    return resolve(load(str(config)), probe())


@pytest.fixture
def dpo(tmp_path: Path) -> Callable[..., Result]:
    """Runs a command with a config of these options; its run is in the folder of the given name."""
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(made_row(i)) + "\n" for i in range(24)), encoding="utf-8")

    def command(verb: str, name: str, *words: str, **options: Any) -> Result:
        config = tmp_path / f"{name}.json"
        values = {**COMMON, "dataset": str(data), "output_dir": str(tmp_path / name), **options}
        config.write_text(json.dumps({key: value for key, value in values.items() if value is not None}), encoding="utf-8")
        return CliRunner().invoke(app, [verb, str(config), *words])

    return command


def margin_of(result: Result) -> float:
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    return float((found.get("policy") or found["eval"])["margin"]["value"])


# -- adapters: each part of adapter_config.json is supported, or refused by its name

SUPPORTED: dict[str, dict[str, Any]] = {
    "rank_pattern": {"rank_pattern": {"v_proj": 3}, "alpha_pattern": {"q_proj": 5}},
    "layers_to_transform": {"layers_to_transform": [1]},
    "exclude_modules": {"target_modules": "all-linear", "exclude_modules": ["o_proj"]},
    "use_dora": {"use_dora": True},
    "use_rslora": {"use_rslora": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "names that end so": {"modules_to_save": ["norm"]},  # PEFT trains the norms of each block too
    "lora_bias": {"lora_bias": True},
    "gaussian": {"init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("kind", SUPPORTED)
@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_is_what_its_config_says(base: Callable[..., Path], tmp_path: Path, kind: str, tied: bool) -> None:
    """Judged, gone on from and merged, it computes what PEFT computes with it."""
    model = base("llama", tie_word_embeddings=tied)
    folder = adapter_on(model, tmp_path / "adapter", **SUPPORTED[kind])
    right = log_probs(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), folder))
    bare = log_probs(AutoModelForCausalLM.from_pretrained(model))
    assert (right - bare).abs().max() > 0.01
    policy = HuggingFace(ModelSource.of(str(model))).trained(plan_of(model, tmp_path), folder)
    torch.testing.assert_close(log_probs(policy.network), right)
    with policy.as_reference() as reference:
        torch.testing.assert_close(log_probs(reference), bare)
    provider = HuggingFace(ModelSource.of(str(folder)))
    on = plan_of(folder, tmp_path)
    torch.testing.assert_close(log_probs(provider.start(on, provider.base_model(on))), right)
    to_merge = plan_of(folder, tmp_path, reference="base")
    if kind == "lora_bias":  # which PEFT cannot merge into a layer without a bias
        with pytest.raises(InvalidInput, match="cannot be merged"):
            provider.base_model(to_merge)
    else:
        torch.testing.assert_close(log_probs(provider.base_model(to_merge)), right, atol=1e-4, rtol=1e-4)


REFUSED: dict[str, dict[str, Any]] = {
    "bias": {"bias": "lora_only"},
    "trainable_token_indices": {"trainable_token_indices": [3, 4]},
    "layer_replication": {"layer_replication": [[0, 2], [1, 2]]},
    "alora_invocation_tokens": {"alora_invocation_tokens": [1, 2]},
    "init_lora_weights": {"init_lora_weights": "pissa"},
    "task_type": {"task_type": "SEQ_CLS"},
    "a_new_one": {"a_new_one": {"x": 1}},
}


@pytest.mark.parametrize("name", REFUSED)
def test_another_kind_of_adapter_is_refused_by_name(
    base: Callable[..., Path], tmp_path: Path, dpo: Callable[..., Result], name: str
) -> None:
    """Before anything is loaded: by validate where it is to be trained on, by eval where it is to be judged."""
    model = base("llama", tie_word_embeddings=False)
    folder = adapter_on(model, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert unsupported(config) is None
    (folder / "adapter_config.json").write_text(json.dumps({**config, **REFUSED[name]}), encoding="utf-8")
    for options in ({}, {"reference": "base"}):
        found = dpo("validate", "go-on", model_name=str(folder), lora_r=None, **options)
        assert found.exit_code == Exit.INVALID and name in found.stderr
    if name != "a_new_one":  # which PEFT itself refuses, in an older version
        judged = dpo("eval", "judge", "--adapter", str(folder), model_name=str(model))
        assert judged.exit_code == Exit.INVALID and name in judged.stderr
        with pytest.raises(InvalidInput, match=name) as caught:
            HuggingFace(ModelSource.of(str(model))).trained(plan_of(model, tmp_path), folder)
        assert caught.value.problems[0].fix == (CLASSIFIER_FIX if name == "task_type" else UNSUPPORTED_FIX)


def test_what_asks_for_nothing_is_no_reason_to_refuse(base: Callable[..., Path], tmp_path: Path) -> None:
    """What PEFT writes of an adapter without anything special, tables of nulls, and how one began that left its base alone."""
    folder = adapter_on(base("llama", tie_word_embeddings=False), tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    plain = {"loftq_config": {"loftq_bits": None}, "use_bdlora": {"blocks": {"q": None}, "names": []}}
    eva = {"init_lora_weights": "eva", "eva_config": {"rho": 2.0, "tau": 0.99, "label_mask_value": -100}}
    for more in ({}, plain, eva, {"init_lora_weights": "orthogonal"}, {"init_lora_weights": False}):
        assert unsupported({**config, **more}) is None
    for began, named in (("loftq", "loftq_config"), ("corda", "corda_config"), ("lora_ga", "lora_ga_config")):
        why = unsupported({**config, named: {"bits": 4}, "init_lora_weights": began})
        assert why is not None and f"init_lora_weights {began}" in why and "not supported" not in why
    assert "not supported" in str(unsupported({**config, "use_bdlora": {"nblocks": 1}}))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, True),
        ({"target_modules": r".*(q_proj|lm_head)"}, True),
        ({"target_modules": ["embed_out"]}, True),
        ({"target_modules": ["q_proj"], "target_parameters": ["lm_head.weight"]}, True),
        ({"target_modules": r".*(q_proj|lm_head)", "exclude_modules": ["lm_head"]}, False),
        ({"target_modules": r"model\..*"}, False),
        ({"target_modules": "all-linear"}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False),
        ({}, False),
    ],
)
def test_an_adapter_on_the_head_is_known_by_its_config(config: dict[str, Any], expected: bool) -> None:
    assert is_on_head(config) == expected


def test_a_pattern_that_reaches_the_head_is_refused_before_anything_is_loaded(
    base: Callable[..., Path], tmp_path: Path, dpo: Callable[..., Result]
) -> None:
    model = base("llama", tie_word_embeddings=False)
    folder = adapter_on(model, tmp_path / "adapter", target_modules=r".*(q_proj|lm_head)")
    restore_run = dpo("validate", "go-on", model_name=str(folder), lora_r=None)
    judged = dpo("eval", "judge", "--adapter", str(folder), model_name=str(model))
    for result in (restore_run, judged):
        assert result.exit_code == Exit.INVALID and "also changes lm_head" in result.stderr


def test_one_reason_is_told_alike_wherever_an_adapter_is_taken(
    base: Callable[..., Path], tmp_path: Path, dpo: Callable[..., Result]
) -> None:
    model = base("llama", tie_word_embeddings=False)
    folder = adapter_on(model, tmp_path / "adapter", bias="lora_only")
    told = "it changes biases of the base itself"
    for words in (("validate", "go-on"), ("eval", "judge", "--adapter", str(folder))):
        name = folder if words[0] == "validate" else model
        assert told in dpo(*words, model_name=str(name), lora_r=None).stderr
    with pytest.raises(InvalidInput, match=told):
        HuggingFace(ModelSource.of(str(model))).trained(plan_of(model, tmp_path), folder)


@pytest.mark.parametrize("attention_bias", [True, False])
def test_a_bias_that_cannot_be_merged_is_known_to_validate(
    base: Callable[..., Path], tmp_path: Path, dpo: Callable[..., Result], attention_bias: bool
) -> None:
    """PEFT merges it into layers that have a bias, and trains on it in any layer."""
    model = base("llama", tie_word_embeddings=False, attention_bias=attention_bias)
    folder = adapter_on(model, tmp_path / "adapter", lora_bias=True)
    merged = dpo("validate", "merged", model_name=str(folder), lora_r=None, reference="base")
    assert merged.exit_code == (Exit.DONE if attention_bias else Exit.INVALID), merged.stderr
    assert ("adapter-unmergeable" in merged.stderr) != attention_bias
    assert dpo("validate", "go-on", model_name=str(folder), lora_r=None).exit_code == Exit.DONE
    if attention_bias:
        plan = plan_of(folder, tmp_path, reference="base")
        right = log_probs(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), folder))
        torch.testing.assert_close(
            log_probs(HuggingFace(ModelSource.of(str(folder))).base_model(plan)), right, atol=1e-4, rtol=1e-4
        )


def test_a_resized_embedding_is_refused(base: Callable[..., Path], tmp_path: Path, dpo: Callable[..., Result]) -> None:
    model, folder = base("llama", tie_word_embeddings=False), tmp_path / "adapter"
    network = AutoModelForCausalLM.from_pretrained(model)
    network.resize_token_embeddings(SHAPE["vocab_size"] + 3)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lm_head"])
    get_peft_model(network, config).save_pretrained(folder)
    for result in (
        dpo("validate", "go-on", model_name=str(folder), lora_r=None),
        dpo("eval", "judge", "--adapter", str(folder), model_name=str(model)),
    ):
        assert result.exit_code == Exit.INVALID and "after 3 tokens were added" in result.stderr


def test_the_layer_of_another_base_is_not_taken_over(base: Callable[..., Path], tmp_path: Path) -> None:
    """PEFT saves the base's own table with an adapter on it, and would put it into the model that it is loaded on."""
    model = base("llama", tie_word_embeddings=False)
    folder = adapter_on(model, tmp_path / "adapter", target_modules=["q_proj", "embed_tokens"])
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    (name,) = [name for name in weights if name.endswith("base_layer.weight")]
    provider, plan = HuggingFace(ModelSource.of(str(model))), plan_of(model, tmp_path)
    provider.trained(plan, folder)
    save_file({**weights, name: weights[name] + 1}, file)
    with pytest.raises(InvalidInput, match="another model"):
        provider.trained(plan, folder)


@pytest.mark.parametrize("name", ["model.layers.0.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_a_tensor_of_the_base_in_an_adapter_replaces_nothing(
    base: Callable[..., Path], tmp_path: Path, dpo: Callable[..., Result], name: str
) -> None:
    """Equal to the base's it changes nothing; with other values PEFT would put it into the reference."""
    model = base("llama", tie_word_embeddings=False)
    folder = adapter_on(model, tmp_path / "adapter", modules_to_save=["embed_tokens"])
    file = folder / "adapter_model.safetensors"
    weights, there = load_file(file), load_file(model / "model.safetensors")[name]
    provider, plan = HuggingFace(ModelSource.of(str(model))), plan_of(model, tmp_path)
    right = log_probs(provider.trained(plan, folder).network)
    save_file({**weights, f"base_model.model.{name}": there}, file)
    torch.testing.assert_close(log_probs(provider.trained(plan, folder).network), right)
    save_file({**weights, f"base_model.model.{name}": there + 1}, file)
    with pytest.raises(InvalidInput, match=f"{name}.* of its base"):
        provider.trained(plan, folder)
    found = dpo("validate", "go-on", model_name=str(folder), lora_r=None)
    assert (name in found.stderr) == (name != "lm_head.weight")  # a table may be equal: the loading tells


MOE: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1},
}


def per_expert_adapter(model: Path, place: Path, dropout: float = 0.0) -> tuple[Path, Tensor]:
    """An adapter on each expert of a Mixtral by the names in its files, as older PEFT wrote it; log-probs with it, by hand."""
    draw = torch.Generator().manual_seed(1)
    network = AutoModelForCausalLM.from_pretrained(model)
    written: dict[str, Tensor] = {}
    for number, layer in enumerate(network.model.layers):
        experts, inner = layer.mlp.experts, SHAPE["intermediate_size"]
        for expert in range(4):
            up, down = experts.gate_up_proj.data[expert], experts.down_proj.data[expert]
            for name, part in {"w1": up[:inner], "w3": up[inner:], "w2": down}.items():
                a, b = (torch.randn(shape, generator=draw) * 0.3 for shape in ((2, part.shape[1]), (part.shape[0], 2)))
                part += b @ a  # lora_alpha / r is 1
                key = f"base_model.model.model.layers.{number}.block_sparse_moe.experts.{expert}.{name}."
                written |= {f"{key}lora_A.weight": a, f"{key}lora_B.weight": b}
    place.mkdir()
    save_file(written, place / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 2, "lora_dropout": dropout, "bias": "none"}
    config |= {"target_modules": ["w1", "w2", "w3"], "base_model_name_or_path": str(model)}
    (place / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return place, log_probs(network)


def test_dropout_of_an_adapter_on_experts_is_that_of_this_training(base: Callable[..., Path], tmp_path: Path) -> None:
    """Judged, frozen, merged and gone on from without, whatever it had; PEFT has none for experts, and so it is refused."""
    model = base("mixtral", **MOE["mixtral"])
    folder, right = per_expert_adapter(model, tmp_path / "adapter", dropout=0.05)
    policy = HuggingFace(ModelSource.of(str(model))).trained(plan_of(model, tmp_path), folder)
    torch.testing.assert_close(log_probs(policy.network), right, atol=1e-4, rtol=1e-4)
    provider = HuggingFace(ModelSource.of(str(folder)))
    on = plan_of(folder, tmp_path, strategy="sft")
    network = provider.start(on, provider.base_model(on))
    torch.testing.assert_close(log_probs(network), right, atol=1e-4, rtol=1e-4)
    assert isinstance(network, PeftModel)
    network.set_adapter(FROZEN)
    torch.testing.assert_close(log_probs(network), right, atol=1e-4, rtol=1e-4)
    to_merge = plan_of(folder, tmp_path, reference="base")
    torch.testing.assert_close(log_probs(provider.base_model(to_merge)), right, atol=1e-4, rtol=1e-4)
    assert provider.adapted(on) is not None
    with pytest.raises(InvalidInput, match="lora_dropout does not work here"):
        provider.adapted(plan_of(folder, tmp_path, lora_dropout=0.1))


def test_experts_of_an_adapter_are_not_joined_in_another_order(
    base: Callable[..., Path], tmp_path: Path, dpo: Callable[..., Result]
) -> None:
    folder, _ = per_expert_adapter(model := base("mixtral", **MOE["mixtral"]), tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    save_file({name.replace("experts.1.", "experts.7."): part for name, part in load_file(file).items()}, file)
    with pytest.raises(InvalidInput, match=r"experts\.7.* lacks .*experts\.1"):
        HuggingFace(ModelSource.of(str(model))).trained(plan_of(model, tmp_path), folder)
    assert "experts.1" in dpo("validate", "go-on", model_name=str(folder), lora_r=None).stderr


ON_FROM: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "4-bit with DoRA": ({"use_dora": True}, {"use_4bit": True}),
    "8-bit": ({}, {"use_8bit": True}),
    "embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, {}),
    "norms": ({"modules_to_save": ["norm"]}, {}),
    "every weight": ({}, {"lora_r": 0, "learning_rate": 1e-4}),
    "in bf16": ({}, {"bf16": True}),
    "every weight, in bf16": ({}, {"lora_r": 0, "learning_rate": 1e-4, "bf16": True}),
    "a fresh one, in bf16": ({}, {"reference": "base", "bf16": True}),
}


@pytest.mark.parametrize("kind", ON_FROM)
def test_a_training_begins_at_its_reference(
    base: Callable[..., Path], tmp_path: Path, dpo: Callable[..., Result], kind: str
) -> None:
    """Rewards of 0 to the bit and each pair a tie, on an adapter of full precision, whatever is quantised below it."""
    adapter, options = ON_FROM[kind]
    folder = adapter_on(base("llama", tie_word_embeddings=False), tmp_path / "adapter", **adapter)
    done = dpo("train", "run", **{"model_name": str(folder), "lora_r": None, "max_steps": 1, "eval_split": 0, **options})
    assert done.exit_code == 0, done.stderr
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert (line["reward_chosen"], line["reward_rejected"], line["accuracy"]) == (0, 0, 0.5)
    assert (tmp_path / "run/model").is_dir() == kind.startswith("every weight")


def test_a_training_with_an_adapter_on_the_embedding_goes_on(
    base: Callable[..., Path], tmp_path: Path, dpo: Callable[..., Result]
) -> None:
    options = {"model_name": str(base("llama", tie_word_embeddings=True)), "target_modules": ["q_proj", "embed_tokens"]}
    assert dpo("train", "run", save_steps=1, **options).exit_code == 0
    file = tmp_path / "run/adapter/adapter_model.safetensors"
    before = file.read_bytes()
    assert all(".lora_" in name for name in load_file(file))
    shutil.rmtree(tmp_path / "run/checkpoints/step-2")
    (tmp_path / "run/metrics.json").unlink()
    done = dpo("train", "run", "--resume", save_steps=1, **options)
    assert done.exit_code == 0, done.stderr
    assert file.read_bytes() == before


@pytest.mark.parametrize("family", MOE)
def test_a_run_of_experts_is_taken_by_what_follows(
    base: Callable[..., Path], tmp_path: Path, dpo: Callable[..., Result], family: str
) -> None:
    """Its adapter on fused experts is judged as the run judged it, exported, and gone on from."""
    run = dpo("train", "run", "--json", model_name=str(base(family, **MOE[family])))
    names = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    assert any(".experts." in name for name in names)
    place = str(tmp_path / "run")
    assert margin_of(CliRunner().invoke(app, ["eval", place, "--json"])) == pytest.approx(margin_of(run), abs=1e-6)
    done = CliRunner().invoke(app, ["export", place, "--out", str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["difference"]["max"] < 1e-3
    for options in ({}, {"reference": "base"}):
        after = dpo("train", f"after-{len(options)}", model_name=place, lora_r=None, **options)
        assert after.exit_code == 0, after.stderr


def test_every_weight_of_a_mixture_of_experts_goes_on_to_the_same_bits(
    base: Callable[..., Path], tmp_path: Path, dpo: Callable[..., Result]
) -> None:
    """transformers splits the experts when it saves a model; put back by names, a checkpoint's experts would be passed over."""
    options = {"model_name": str(base("qwen3_moe", **MOE["qwen3_moe"])), "lora_r": 0, "save_steps": 1, "learning_rate": 1e-3}
    assert dpo("train", "whole", **options).exit_code == 0
    file = tmp_path / "whole/model/model.safetensors"
    before = file.read_bytes()
    shutil.rmtree(tmp_path / "whole/checkpoints/step-2")
    (tmp_path / "whole/metrics.json").unlink()
    assert dpo("train", "whole", "--resume", **options).exit_code == 0
    assert file.read_bytes() == before


# -- numbers that are none

LATENT = {"q_lora_rank": None, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
LATENT |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0}


@pytest.mark.parametrize(
    ("family", "options", "end", "quantised"),
    [
        ("deepseek_v3", {**LATENT, "moe_intermediate_size": 16}, "e_score_correction_bias", {}),  # a buffer
        ("llama", {"tie_word_embeddings": False}, "down_proj.weight", {"use_8bit": True}),
        ("llama", {"tie_word_embeddings": False}, "down_proj.weight", {"use_4bit": True}),
    ],
)
def test_a_number_that_is_none_is_found_wherever_it_is(
    base: Callable[..., Path], tmp_path: Path, family: str, options: dict[str, Any], end: str, quantised: dict[str, bool]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(base(family, **options), folder)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith(end))
    weights[name].view(-1)[1] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvalidInput, match=f"NaN or infinity in 1 tensor.*{name}"):
        HuggingFace(ModelSource.of(str(folder))).base_model(plan_of(folder, tmp_path, **quantised))


# -- the head


@pytest.mark.parametrize("options", [{"target_modules": ["lm_head"]}, {"target_modules": ["lm_head"], "use_dora": True}])
def test_an_adapter_on_the_head_is_refused_by_type(base: Callable[..., Path], options: dict[str, Any]) -> None:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base("llama", tie_word_embeddings=False)), LoraConfig(**options)
    )
    with pytest.raises(RunFailed, match="also on the output head"):
        Head.of(model.get_base_model())


def test_a_head_that_is_no_plain_layer_is_refused_by_type(base: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(base("llama", tie_word_embeddings=False))
    torch.nn.utils.parametrizations.weight_norm(model.lm_head)
    with pytest.raises(RunFailed, match="ParametrizedLinear"):
        Head.of(model)


def test_a_head_that_is_trained_whole_takes_part(base: Callable[..., Path], tmp_path: Path) -> None:
    model = base("llama", tie_word_embeddings=True)
    folder = adapter_on(model, tmp_path / "adapter", modules_to_save=["lm_head"])
    policy = HuggingFace(ModelSource.of(str(model))).trained(plan_of(model, tmp_path), folder)
    network = policy.network
    hidden = network.base_model(IDS).last_hidden_state[0]
    torch.testing.assert_close(Head.of(network).logits(hidden), network(IDS).logits[0])
    with policy.as_reference() as reference:
        hidden = reference.base_model(IDS).last_hidden_state[0]
        torch.testing.assert_close(Head.of(reference).logits(hidden), reference(IDS).logits[0])


# -- merging


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["q_proj", "embed_tokens"]])
def test_a_tied_head_is_untied_before_a_merge(base: Callable[..., Path], tmp_path: Path, targets: list[str]) -> None:
    """Merged into the one weight that both share, an adapter on either would change the other too."""
    model = base("llama", tie_word_embeddings=True)
    folder = adapter_on(model, tmp_path / "adapter", target_modules=targets)
    assert not [problem for problem in problems(ModelSource.of(str(folder))) if problem.severity == "error"]
    right = log_probs(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), folder))
    merged = HuggingFace(ModelSource.of(str(folder))).base_model(plan_of(folder, tmp_path, reference="base"))
    torch.testing.assert_close(log_probs(merged), right, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(log_probs(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), log_probs(merged))


OF_EACH_KIND: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "qwen3": {"tie_word_embeddings": True},
    **MOE,
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8},
}


ON_LAYERS: dict[str, dict[str, Any]] = {
    "llama": {"use_dora": True},
    "qwen3": {"target_modules": ["q_proj", "embed_tokens"]},
    "mixtral": {"target_modules": ["q_proj", "gate_up_proj", "down_proj"]},
    "qwen3_moe": {"target_modules": "all-linear", "target_parameters": ["experts.gate_up_proj"]},
    "falcon_h1": {},
}


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("family", OF_EACH_KIND)
def test_a_merge_that_loses_the_adapter_is_refused(
    base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, bf16: bool
) -> None:
    """A small one too, whose effect is less than what rounding in bf16 alone changes; a whole merge is not refused."""
    folder = adapter_on(base(family, **OF_EACH_KIND[family]), tmp_path / "adapter", **ON_LAYERS[family])
    weights = load_file(folder / "adapter_model.safetensors")
    small = {name: part * (0.1 if ".lora_B" in name else 1) for name, part in weights.items()}
    save_file(small, folder / "adapter_model.safetensors")
    plan = plan_of(folder, tmp_path, reference="base", bf16=bf16)
    HuggingFace(ModelSource.of(str(folder))).base_model(plan)
    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda self, **_: self.unload(), raising=False)
    with pytest.raises(InvalidInput, match="computes something else"):
        HuggingFace(ModelSource.of(str(folder))).base_model(plan)


def test_a_block_that_reads_weights_past_their_layer_is_merged_too(base: Callable[..., Path], tmp_path: Path) -> None:
    """As kernels of state-space blocks do: it mixes dtypes where each layer computes in float32."""
    model = base("llama", tie_word_embeddings=False)
    folder = adapter_on(model, tmp_path / "adapter")
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    for layer in network.model.layers:
        layer.mlp.forward = lambda x, mlp=layer.mlp: mlp.down_proj(nn.functional.linear(x, mlp.up_proj.weight))
    adapted = loaded_tensors.with_adapter(network, folder, "default", "llama")
    right = log_probs(adapted)
    torch.testing.assert_close(
        log_probs(loaded_tensors.merged(adapted, "default", "llama", torch.bfloat16)), right, atol=0.1, rtol=0
    )


def test_a_merged_model_in_the_cache_is_of_what_is_there_now(
    base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Base and adapter are changed where they lie: each change gives a model of its own, and nothing changed gives the same."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model, folder = tmp_path / "model", tmp_path / "adapter"
    shutil.copytree(base("llama", tie_word_embeddings=False), model)
    adapter_on(model, folder)

    def changed(file: Path, **values: Any) -> None:
        file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **values}), encoding="utf-8")

    def merged() -> Tensor:
        plan = plan_of(folder, tmp_path, reference="base", use_4bit=True)
        return log_probs(HuggingFace(ModelSource.of(str(folder))).base_model(plan))

    seen = [merged()]
    torch.testing.assert_close(merged(), seen[0], rtol=0, atol=0)
    changed(folder / "adapter_config.json", lora_alpha=40)
    seen.append(merged())
    changed(model / "config.json", rms_norm_eps=0.5)
    seen.append(merged())
    weights = load_file(model / "model.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in weights.items()}, model / "model.safetensors", {"format": "pt"})
    seen.append(merged())
    assert all((one - other).abs().max() > 1e-2 for one, other in itertools.combinations(seen, 2))
    assert len(list((tmp_path / "cache" / "dpo" / "merged").iterdir())) == len(seen)


# -- quantised in its files


@pytest.fixture(scope="module")
def in_4bit(base: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("4bit") / "model"
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    source = base("llama", tie_word_embeddings=False)
    options = {"dtype": torch.float32, "quantization_config": config, "device_map": {"": "cpu"}}
    AutoModelForCausalLM.from_pretrained(source, **options).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def dequantised(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).dequantize()
    return model.float()


def test_an_adapter_is_trained_on_files_of_4_bits(in_4bit: Path, tmp_path: Path, dpo: Callable[..., Result]) -> None:
    """As they are; exported, it is merged into what the 4 bits stand for."""
    run = dpo("train", "run", "--json", model_name=str(in_4bit))
    plan = json.loads((tmp_path / "run/plan.json").read_text(encoding="utf-8"))
    assert plan["config"]["use_4bit"] and any("4-bit weights" in note for note in plan["notes"])
    place = str(tmp_path / "run")
    assert margin_of(CliRunner().invoke(app, ["eval", place, "--json"])) == pytest.approx(margin_of(run), abs=1e-5)
    done = CliRunner().invoke(app, ["export", place, "--out", str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["difference"]["mean"] < 1e-2
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text(encoding="utf-8"))
    right = log_probs(PeftModel.from_pretrained(dequantised(in_4bit), tmp_path / "run/adapter"))
    torch.testing.assert_close(log_probs(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), right, atol=1e-3, rtol=1e-3)


def test_files_of_4_bits_can_wait_in_the_ram(in_4bit: Path, dpo: Callable[..., Result]) -> None:
    whole, apart = (dpo("train", f"run-{wait}", "--json", model_name=str(in_4bit), cpu_offload=wait) for wait in (False, True))
    assert margin_of(whole) == margin_of(apart)


def test_files_of_8_bits_are_not_divided(base: Callable[..., Path], tmp_path: Path, dpo: Callable[..., Result]) -> None:
    """Only the files say that they are in 8 bits, so the rules of the config cannot."""
    folder, config = tmp_path / "8bit", transformers.BitsAndBytesConfig(load_in_8bit=True)
    options = {"dtype": torch.float32, "quantization_config": config, "device_map": {"": "cpu"}}
    AutoModelForCausalLM.from_pretrained(base("llama"), **options).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    done = dpo("validate", "run", model_name=str(folder), cpu_offload=True)
    assert done.exit_code == Exit.INVALID and "not-divided" in done.stderr, done.output


def test_nothing_is_merged_into_4_bits(in_4bit: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    model = get_peft_model(dequantised(in_4bit), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    randomised(model)
    right = log_probs(model)
    model.save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    (folder / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": str(in_4bit)}), encoding="utf-8"
    )
    plan = plan_of(folder, tmp_path, reference="base")
    assert not plan.config.use_4bit
    torch.testing.assert_close(
        log_probs(HuggingFace(ModelSource.of(str(folder))).base_model(plan)), right, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "compressed-tensors"])
def test_other_ways_to_quantise_are_refused_by_name(
    base: Callable[..., Path], tmp_path: Path, dpo: Callable[..., Result], method: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(base("llama", tie_word_embeddings=False), folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for verb in ("validate", "train"):
        found = dpo(verb, "run", model_name=str(folder))
        assert found.exit_code == Exit.INVALID and f"quantised by {method}" in found.stderr
    with pytest.raises(InvalidInput, match=method):
        HuggingFace(ModelSource.of(str(folder))).base_model(plan_of(base("llama", tie_word_embeddings=False), tmp_path))


@pytest.mark.parametrize("bits", ["mixed", [4, 8], None, {"lm_head": 8}])
def test_bits_that_are_no_number_are_refused_by_the_method(
    base: Callable[..., Path], tmp_path: Path, dpo: Callable[..., Result], bits: Any
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(base("llama", tie_word_embeddings=False), folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"text_config": None, "quantization_config": {"quant_method": "auto-round", "bits": bits}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    found = dpo("validate", "run", model_name=str(folder))
    assert found.exit_code == Exit.INVALID and "quantised by auto-round" in found.stderr
    assert "damaged" not in found.stderr


@pytest.mark.parametrize(("option", "value"), [("use_8bit", True), ("lora_r", 0)])
def test_what_4_bits_do_not_allow_is_said(in_4bit: Path, dpo: Callable[..., Result], option: str, value: Any) -> None:
    found = dpo("validate", "run", model_name=str(in_4bit), **{option: value})
    assert found.exit_code == Exit.INVALID and "4-bit" in found.stderr and option in found.stderr


# -- saving


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False, "temperature": 0.6, "top_p": 0.9},
        {"num_beams": 1, "early_stopping": True, "length_penalty": 0.5},
        {"output_scores": True},
        {"max_new_tokens": -1, "cache_implementation": "none", "early_stopping": []},
        {"temperature": "0.6", "pad_token_id": -1, "num_beams": True, "num_return_sequences": 3},
        {"compile_config": {"mode": "x"}, "suppress_tokens": 5, "forced_eos_token_id": [5]},
        {
            **{"do_sample": True, "temperature": -1.0, "top_p": 7, "repetition_penalty": 0.0, "forced_bos_token_id": 600},
            **{"begin_suppress_tokens": [4, 600], "bad_words_ids": [[4], [600]], "sequence_bias": [[[600], -1.0]]},
        },
    ],
)
def test_settings_that_nothing_can_be_saved_with_are_left_out(
    base: Callable[..., Path], tmp_path: Path, dpo: Callable[..., Result], settings: dict[str, Any]
) -> None:
    rank = 4 * (len(settings) % 2)  # an adapter, or every weight
    folder = tmp_path / "model"
    shutil.copytree(base("llama", tie_word_embeddings=False), folder)
    kept = {"eos_token_id": [2, 1], "max_length": 77}
    (folder / "generation_config.json").write_text(json.dumps({**kept, **settings}), encoding="utf-8")
    done = dpo("train", "run", model_name=str(folder), lora_r=rank)
    assert done.exit_code == 0, done.stderr
    sound = {"do_sample": settings.get("do_sample"), "num_beams": 1, "forced_eos_token_id": [5]}
    left_out = [name for name, value in settings.items() if sound.get(name) is not value and sound.get(name) != value]
    assert all(f"generation_config.json: {name}" in done.stdout for name in left_out)
    hint = dpo("validate", "check", model_name=str(folder), lora_r=rank).stderr
    assert [name for name in left_out if f"{name} {json.dumps(settings[name])}" not in hint] in ([], ["compile_config"])
    done = CliRunner().invoke(app, ["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.stderr
    saved = json.loads((tmp_path / "out/generation_config.json").read_text(encoding="utf-8"))
    assert saved.items() >= kept.items() and all(saved.get(name) != settings[name] for name in left_out)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_file_of_a_model_is_named(base: Callable[..., Path], tmp_path: Path, name: str, text: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(base("llama", tie_word_embeddings=False), folder)
    (folder / name).write_text(text, encoding="utf-8")
    (problem,) = problems(ModelSource.of(str(folder)))
    assert problem.code == "model-damaged" and f"{name} is not" in problem.message


def test_settings_are_judged_as_transformers_judges_them() -> None:
    """What is left is loaded and saved as it is, and nothing of it is left out that transformers takes."""
    values: dict[str, Any] = {
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 1,
        "top_k": 0,
        "min_p": 0.1,
        "eos_token_id": [2, 1],
    }
    values |= {"num_beams": 4, "num_return_sequences": 4, "early_stopping": "never", "length_penalty": 2, "max_length": 9}
    values |= {"cache_implementation": "hybrid", "pad_token_id": 0, "return_dict_in_generate": True, "output_logits": True}
    assert invalid(values) == {}
    GenerationConfig(**values).validate(strict=True)
    for name in values:
        less = {key: value for key, value in values.items() if key != name}
        left = {key: value for key, value in less.items() if key not in invalid(less)}
        GenerationConfig(**left).validate(strict=True)
        for key in invalid(less):
            with pytest.raises(ValueError):
                GenerationConfig(**{**left, key: less[key]}).validate(strict=True)
    assert set(CACHES) == {*configuration_utils.ALL_CACHE_IMPLEMENTATIONS, "paged"}


@pytest.mark.parametrize("rank", [0, 4])
def test_what_cannot_be_saved_is_known_before_the_first_step(
    base: Callable[..., Path], tmp_path: Path, dpo: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    """A library that refuses to save ends the run before any step, with its reason."""

    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("this cannot be serialised")

    options = {"model_name": str(base("llama", tie_word_embeddings=False)), "lora_r": rank}
    with monkeypatch.context() as patched:
        patched.setattr(PeftModel if rank else PreTrainedModel, "save_pretrained", refuse)
        done = dpo("train", "run", **options)
    assert done.exit_code == Exit.FAILED and "cannot be saved" in done.stderr and "this cannot be serialised" in done.stderr
    assert not (tmp_path / "run/metrics.jsonl").exists()
    assert not [path for path in (tmp_path / "run").rglob("*") if path.name in (".trial", "adapter", "model")]
    assert dpo("train", "run", "--overwrite", **options).exit_code == 0


# -- token ids


def test_tokens_without_a_row_are_named(base: Callable[..., Path], tmp_path: Path, dpo: Callable[..., Result]) -> None:
    folder = tmp_path / "model"
    shutil.copytree(base("llama", tie_word_embeddings=False), folder)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(SHAPE["vocab_size"] - len(tokenizer))], special_tokens=True)
    tokenizer.add_tokens(["<|image|>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    assert dpo("train", "whole", model_name=str(folder)).exit_code == 0  # no row holds it
    assert "tokens-outside" in dpo("validate", "run", model_name=str(folder)).stderr
    data = tmp_path / "images.jsonl"
    rows = [made_row(i) for i in range(6)]
    rows[3]["chosen"] = "the cat <|image|> sat"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for words in (["train", "run"], ["train", "sft"]):
        found = dpo(*words, model_name=str(folder), dataset=str(data), strategy="sft" if words[1] == "sft" else "dpo")
        assert found.exit_code == Exit.INVALID and f"{data}:4: <|image|> (300)" in found.stderr
    tokenizer.pad_token = "<|image|>"
    tokenizer.save_pretrained(folder)
    for verb in ("validate", "train"):
        found = dpo(verb, "run", model_name=str(folder))
        assert found.exit_code == Exit.INVALID and "301 tokens" in found.stderr and "300 rows" in found.stderr


def test_every_load_asks_for_the_report(monkeypatch: pytest.MonkeyPatch, base: Callable[..., Path]) -> None:
    """The seam of `all_tensors`: transformers ends a load with this call, by keywords."""
    seen = []
    monkeypatch.setattr(transformers.modeling_utils, "log_state_dict_report", lambda **named: seen.append(named))
    AutoModelForCausalLM.from_pretrained(base("llama", tie_word_embeddings=False))
    (named,) = seen
    assert named.keys() >= {"model", "loading_info"}
    fields = {"missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs", "conversion_errors"}
    assert fields <= vars(named["loading_info"]).keys()
    with pytest.raises(RunFailed, match="does not report which tensors of a model"), loaded_tensors.all_tensors("a model"):
        pass

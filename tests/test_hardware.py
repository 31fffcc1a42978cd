"""Model facts, the memory bill, the recommendation."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, tiny_model
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from dpo_cli.errors import DoesNotFit, InvalidInput
from dpo_cli.hardware import gguf, models
from dpo_cli.hardware.facts import _config_facts, model_facts
from dpo_cli.hardware.memory import NF4_BYTES, Settings, bill, fit
from dpo_cli.hardware.probe import GIB
from dpo_cli.hardware.recommend import recommend
from dpo_cli.training import sharing

LLAMA = "meta-llama/Llama-3.1-8B-Instruct"
DOCUMENTED = Settings(batch=2, length=1024, rank=16, four_bit=True, bytes_per_value=2, checkpointing=True)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [  # the counts of the models' own cards
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008),
        (LLAMA, 8_030_261_248),
        ("meta-llama/Llama-3.2-1B-Instruct", 1_235_814_400),
        ("mistralai/Mistral-7B-Instruct-v0.3", 7_248_023_552),
    ],
)
def test_parameters_follow_from_the_shape(name: str, parameters: int) -> None:
    facts = model_facts(name)
    assert facts is not None
    assert facts.parameters == parameters


def test_weights_by_hand() -> None:
    """8B in 4-bit: 32 blocks of 218,103,808 linear weights at 0.5 + 1/64 + 4/16384 bytes, the rest in bf16."""
    facts = model_facts(LLAMA)
    assert facts is not None
    linear = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    expected = linear * NF4_BYTES + (8_030_261_248 - linear) * 2
    assert bill(facts, DOCUMENTED, None).components["weights"] == pytest.approx(expected)


def test_bill_stays_under_the_documented_bounds() -> None:
    """The documentation says 8-10 GB for DPO with a 7B model in 4-bit at the mid-range settings."""
    for name in (LLAMA, "mistralai/Mistral-7B-Instruct-v0.3"):
        facts = model_facts(name)
        assert facts is not None
        assert bill(facts, DOCUMENTED, None).total_gb < 10


def test_bill_grows_with_what_makes_a_run_larger() -> None:
    facts = model_facts(LLAMA)
    assert facts is not None
    base = bill(facts, DOCUMENTED, None).total_gb
    for change in ({"batch": 4}, {"length": 2048}, {"rank": 64}, {"four_bit": False}, {"checkpointing": False}):
        assert bill(facts, replace(DOCUMENTED, **change), None).total_gb > base, change


@pytest.mark.parametrize("shared", [False, True])
def test_activations_are_what_autograd_keeps(shared: bool) -> None:
    """The bill's bytes per token against the tensors that a real forward saves, parameters not counted: within 5 %."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
    )
    base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}
    alive: list[torch.Tensor] = []  # so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        is_cast_weight = tensor.dim() == 2 and 8 in tensor.shape and tensor.shape[0] != 512
        if storage.data_ptr() not in parameters and not is_cast_weight:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    inputs: dict[str, Any] = {"input_ids": torch.randint(64, (4, 128))}
    if shared:  # two pairs of 96 prompt tokens and twice 32
        sharing.enable(base)
        inputs["input_ids"][2:, :96] = inputs["input_ids"][:2, :96]
        labels = inputs["input_ids"].clone()
        labels[:, :96] = sharing.IGNORED
        inputs = sharing.lay_out(inputs["input_ids"], torch.ones_like(labels), labels).inputs()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        model.base_model.model.model(**inputs)
    facts = _config_facts(config.to_dict())
    assert facts is not None
    settings = Settings(batch=2, length=128, rank=8, four_bit=False, bytes_per_value=2, checkpointing=False)
    settings = replace(settings, pair_tokens=160 if shared else None)
    assert sum(kept.values()) == pytest.approx(bill(facts, settings, None).components["activations"], rel=0.05)


def test_a_soft_capped_attention_is_billed_what_autograd_keeps() -> None:
    """The (queries, keys) tensors that eager attention keeps for the backward pass, of two sequences in bf16: within 5 %."""
    model = tiny_model("gemma2", torch.bfloat16)
    model.set_attn_implementation("eager")
    facts = _config_facts(model.config.to_dict())
    assert facts is not None and facts.attn_logit_softcapping == 2.0
    settings = Settings(batch=1, length=128, rank=8, four_bit=False, bytes_per_value=2, checkpointing=False)

    def kept(length: int) -> int:
        sizes: dict[int, int] = {}
        alive: list[torch.Tensor] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.dim() > 2 and tensor.shape[-2:] == (length, length) and tensor.is_floating_point():
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                alive.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.base_model(input_ids=torch.randint(3, 300, (2, length)))
        return sum(sizes.values())

    def billed(length: int) -> float:
        with_cap = bill(facts, replace(settings, length=length), None).components["activations"]
        without = bill(replace(facts, attn_logit_softcapping=None), replace(settings, length=length), None)
        return with_cap - without.components["activations"]

    assert kept(128) == pytest.approx(billed(128), rel=0.05)


def test_fit_changes_only_what_leaves_the_training_the_same() -> None:
    facts = model_facts(LLAMA)
    assert facts is not None
    wanted = replace(DOCUMENTED, batch=4, length=2048, rank=64)
    roomy, _ = fit(facts, wanted, 200, "auto")
    assert (roomy.batch, roomy.checkpointing) == (4, False)
    tight, memory = fit(facts, wanted, 16, "auto")
    assert tight.checkpointing and tight.batch < 4 and memory.fits
    assert (tight.length, tight.rank, tight.four_bit) == (2048, 64, True)
    _, hopeless = fit(facts, wanted, 6, "auto")
    assert hopeless.fits is False and hopeless.largest_change


@pytest.mark.parametrize(("vram", "profile"), [(4, "low_end"), (11.9, "low_end"), (12, "mid_range"), (15.9, "mid_range")])
def test_profiles_below_16(vram: float, profile: str) -> None:
    assert recommend(vram).profile == profile


def test_16_gb_is_high_end_and_keeps_the_documented_preset() -> None:
    made = recommend(16)
    documented = json.loads((ROOT / "configs" / "high-end.json").read_text(encoding="utf-8"))
    assert made.profile == "high_end"
    assert made.config == documented
    assert made.memory.fits
    mid = json.loads((ROOT / "configs" / "mid-range.json").read_text(encoding="utf-8"))
    assert recommend(12).config == mid


def test_recommend_refuses_what_cannot_be() -> None:
    with pytest.raises(DoesNotFit):
        recommend(1)
    with pytest.raises(InvalidInput):
        recommend(12, model="nobody/nothing")


def write_gguf(path: Path, metadata: dict[str, object], tensors: tuple[str, ...] = ()) -> Path:
    """A GGUF header with string, integer and string-array values, written by hand from the format's description."""

    def string(text: str) -> bytes:
        return struct.pack("<Q", len(text)) + text.encode()

    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        out += string(key)
        if isinstance(value, str):
            out += struct.pack("<I", 8) + string(value)
        elif isinstance(value, int):
            out += struct.pack("<II", 4, value)
        elif isinstance(value, list):
            out += struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(string, value))
    for name in tensors:
        out += string(name) + struct.pack("<IQIQ", 1, 8, 0, 0)
    path.write_bytes(out)
    return path


HEADER: dict[str, object] = {
    "general.architecture": "llama",
    "llama.embedding_length": 64,
    "llama.block_count": 2,
    "llama.feed_forward_length": 96,
    "llama.attention.head_count": 4,
    "tokenizer.ggml.tokens": ["a", "b", "c"],
}


def test_gguf_header_gives_the_shape(tmp_path: Path) -> None:
    facts = model_facts(str(write_gguf(tmp_path / "m.gguf", HEADER, ("output.weight",))))
    assert facts is not None
    assert (facts.hidden_size, facts.head_dim, facts.num_key_value_heads, facts.vocab_size) == (64, 16, 4, 3)
    assert not facts.tie_word_embeddings
    tied = model_facts(str(write_gguf(tmp_path / "tied.gguf", HEADER)))
    assert tied is not None and tied.tie_word_embeddings


def test_every_truncation_of_a_header_is_a_value_error(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "m.gguf", HEADER, ("output.weight",)).read_bytes()
    for end in range(4, len(whole)):
        path = tmp_path / "cut.gguf"
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError):
            gguf.read_header(path)


def test_models_that_cannot_be_trained_are_told(tmp_path: Path, tiny_model_dir: Path) -> None:
    adapter, empty = tmp_path / "adapter", tmp_path / "empty"
    for folder in (adapter, empty):
        folder.mkdir()
    (adapter / "adapter_config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "x.gguf").write_bytes(b"not a model")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00")
    expected = {
        adapter: ["model-is-adapter"],
        empty: ["model-incomplete"],
        tmp_path / "x.gguf": ["model-not-gguf"],
        tmp_path / "cut.gguf": ["model-damaged"],
        tmp_path / "gone": ["model-missing"],
        tiny_model_dir: [],
        Path("owner/model-Instruct"): [],
    }
    assert {path: [problem.code for problem in models.problems(str(path))] for path in expected} == expected


def test_a_config_json_gives_the_shape(tiny_model_dir: Path) -> None:
    facts = model_facts(str(tiny_model_dir))
    assert facts is not None
    assert (facts.vocab_size, facts.hidden_size, facts.head_dim) == (300, 32, 8)
    assert facts.parameters * 4 / GIB < 1

"""The Hugging Face provider: GGUF files, 4-bit weights, and models that cannot be had."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from conftest import ROOT, SHAPE, made_row, tiny_model
from gguf_files import write_gguf, write_llama
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from test_dpo import make_plan
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from dpo_cli.data.encoded import EncodedRows
from dpo_cli.data.rows import to_pair
from dpo_cli.data.tokens import encode
from dpo_cli.errors import DpoError, RunFailed
from dpo_cli.evaluation.metrics import score_rows
from dpo_cli.models.source import ModelSource
from dpo_cli.providers import model_cache
from dpo_cli.providers.huggingface import HuggingFace
from dpo_cli.providers.model_cache import made_once
from dpo_cli.scoring.forward import choose, states_of
from dpo_cli.storage.user_cache import cache_dir
from dpo_cli.training.dpo_trainer import build_trainer

NONE = EncodedRows.of([])  # held out

DEMO_MODEL = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.skipif(not DEMO_MODEL.exists(), reason="make install fetches the demo model")
def test_gguf_is_dequantised_once_with_its_own_special_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    provider = HuggingFace(ModelSource.of(str(DEMO_MODEL)))
    tokenizer = provider.tokenizer()
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    encoded = encode([to_pair(made_row(0), 1)], tokenizer)[0]
    assert tokenizer.decode(encoded.chosen_ids).endswith("<|im_end|>\n")
    assert tokenizer.decode(encoded.prompt_ids).count("<|im_start|>system") == 1  # the template's default
    assert provider.local_dir is not None
    assert {file.suffix for file in provider.local_dir.iterdir()} >= {".safetensors", ".json"}
    config = json.loads((provider.local_dir / "config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == "float32" and "quantization_config" not in config

    def not_again(*_: object) -> None:
        raise AssertionError("dequantised twice")

    monkeypatch.setattr(model_cache, "_convert", not_again)
    assert HuggingFace(ModelSource.of(str(DEMO_MODEL))).local_dir == provider.local_dir


def test_what_cannot_be_loaded_is_told(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(RunFailed, match="not in the local cache"):
        HuggingFace(ModelSource.of("nobody/no-such-model")).tokenizer()
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(RunFailed, match="cannot load"):
        HuggingFace(ModelSource.of(str(tmp_path))).tokenizer()


def log_probs(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=torch.arange(3, 40)[None]).logits
    return logits.log_softmax(dim=-1)


def small(**options: object) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE, **options), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.2)
    return model


LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
LLAMA3 |= {"original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 10_000.0},
        {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
        LLAMA3,
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_a_gguf_file_is_the_model_that_it_was_made_from(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, rope: dict[str, Any], tied: bool
) -> None:
    """Its positions too, which are scaled by a tensor (as in Llama 3.1 and 3.2) or by keys that transformers does not read."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = small(rope_parameters=rope, tie_word_embeddings=tied, max_position_embeddings=131072)
    factors = 1 / (rope["rope_theta"] ** (torch.arange(0, 8, 2) / 8)) / model.model.rotary_emb.inv_freq
    more = {"rope_freqs.weight": factors.numpy()} if rope is LLAMA3 else {}
    scaling = {"type": "linear", "factor": 4.0} if rope["rope_type"] == "linear" else {"type": "none"}
    file = write_llama(tmp_path / "m.gguf", model, tokenizer, more, scaling)
    made = HuggingFace(ModelSource.of(str(file))).base_model(make_plan(tmp_path))
    torch.testing.assert_close(log_probs(made), log_probs(model), atol=1e-5, rtol=1e-5)
    assert (log_probs(small(tie_word_embeddings=tied)) - log_probs(model)).abs().max() > 0.01 or rope["rope_type"] == "default"


@pytest.mark.parametrize(
    ("options", "more", "scaling", "told"),
    [
        ({"attention_bias": True}, {}, {}, "blk.0.attn_k.bias"),
        ({}, {"rope_factors_long.weight": np.ones(4, np.float32)}, {}, "rope_factors_long.weight"),
        ({}, {"blk.1.attn_q_norm.weight": np.ones(8, np.float32)}, {}, "blk.1.attn_q_norm.weight"),
        ({}, {"rope_freqs.weight": np.array([1, 2, 3, 9], np.float32)}, {}, "rope_freqs.weight"),
        ({}, {}, {"type": "yarn", "factor": 4.0}, "llama.rope.scaling.type"),
    ],
)
def test_what_of_a_gguf_file_has_no_place_is_named(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    more: dict[str, Any],
    scaling: dict[str, Any],
    told: str,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = write_llama(tmp_path / "m.gguf", small(**options), tokenizer, more, scaling)
    with pytest.raises(DpoError) as caught:
        HuggingFace(ModelSource.of(str(file)))
    assert told in str(caught.value)
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".safetensors"]


def in_cache(place: Path, name: str, *folders: Path) -> Path:
    """A repository of the hub as the local cache holds it once it was fetched, with the files of these folders."""
    repository = place / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("0" * 40)
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(snapshot.name, encoding="utf-8")
    for folder in folders:
        shutil.copytree(folder, snapshot, dirs_exist_ok=True)
    return snapshot


@pytest.mark.parametrize("has_config", [True, False])
def test_an_adapter_of_the_hub_is_taken_for_no_model(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, has_config: bool
) -> None:
    """Axolotl writes a config.json next to it: transformers then loads the base with the adapter on, under the same name."""
    adapter = tmp_path / "adapter"
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir), config).save_pretrained(adapter)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = in_cache(tmp_path / "hub", "me/lora", tiny_model_dir, adapter)
    (snapshot / "model.safetensors").unlink()
    if not has_config:
        (snapshot / "config.json").unlink()
    provider = HuggingFace(ModelSource.of("me/lora"))
    for load in (provider.tokenizer, lambda: provider.base_model(make_plan(tmp_path))):
        with pytest.raises(RunFailed, match="me/lora is an adapter") as caught:
            load()
        assert "hf download me/lora" in str(caught.value.fix)
    assert HuggingFace(ModelSource.of(str(snapshot))).foundation == str(tiny_model_dir)  # named by its folder


def test_pickled_weights_are_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model("llama", torch.float32)
    pickled = tmp_path / "pickled"
    model.config.save_pretrained(pickled)
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    with pytest.raises(RunFailed, match="cannot load"):
        HuggingFace(ModelSource.of(str(pickled))).base_model(make_plan(tmp_path))


def test_4bit_trains_after_an_evaluation(tmp_path: Path, tiny_model_dir: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """bitsandbytes 0.50.2 repacks a layer at its first evaluation on a CPU and loses its gradients; we prevent it."""

    def gradient_norm(evaluate_first: bool) -> float:
        plan = make_plan(tmp_path, use_4bit=True, max_steps=1, lora_r=4)
        provider = HuggingFace(ModelSource.of(str(tiny_model_dir)))
        pairs = encode([to_pair(made_row(i), i) for i in range(8)], tokenizer)
        base = provider.base_model(plan)
        assert choose(base, pairs, tokenizer.pad_token_id, "auto").shared  # so 4-bit weights share prompts too
        adapter = provider.adapter_config(plan, base)
        trainer = build_trainer(base, adapter, tokenizer, plan, pairs, NONE, lambda model: {})
        assert type(base.model.layers[0].mlp.up_proj.base_layer).__name__ == "Linear4bit"
        if evaluate_first:
            assert isinstance(trainer.model, PeftModel)
            score_rows(trainer.policy, pairs, states_of(plan.scoring), tokenizer.pad_token_id, 4, torch.float32)
        trainer.train()
        return float(trainer.state.log_history[0]["grad_norm"])

    assert gradient_norm(evaluate_first=True) == pytest.approx(gradient_norm(evaluate_first=False), rel=1e-3)


def test_a_soft_cap_in_the_attention_is_applied(tmp_path: Path) -> None:
    """transformers 5.17 loads Gemma 2 with SDPA, which leaves its attention soft-cap out without a word."""
    saved = tiny_model("gemma2", torch.float32)
    saved.save_pretrained(tmp_path / "gemma2")
    ids = torch.arange(3, 20)[None]
    wrong = saved(input_ids=ids).logits
    saved.set_attn_implementation("eager")
    right = saved(input_ids=ids).logits
    assert not torch.allclose(wrong, right, atol=1e-3)
    made = HuggingFace(ModelSource.of(str(tmp_path / "gemma2"))).base_model(make_plan(tmp_path))
    torch.testing.assert_close(made(input_ids=ids).logits, right)


def test_base_dropout_is_off(tmp_path: Path, tiny_model_dir: Path) -> None:
    """A model that was trained with attention dropout must not get a noisy reference."""
    config = json.loads((tiny_model_dir / "config.json").read_text(encoding="utf-8"))
    noisy = tmp_path / "noisy"
    shutil.copytree(tiny_model_dir, noisy)
    (noisy / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.5}), encoding="utf-8")
    model = HuggingFace(ModelSource.of(str(noisy))).base_model(make_plan(tmp_path)).train()
    ids = torch.arange(3, 20)[None]
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_gated_model_is_told_as_one(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub describes a gated model to anyone and refuses its files; transformers raises OSError from that refusal."""
    response = httpx.Response(403, request=httpx.Request("GET", "https://hub.example/owner/model"))

    def refuse(*_: object, **__: object) -> None:
        raise OSError("You are trying to access a gated repo.") from GatedRepoError("403", response=response)

    provider = HuggingFace(ModelSource.of(str(tiny_model_dir)))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(RunFailed, match="is gated") as caught:
        provider.tokenizer()
    assert "hf auth login" in (caught.value.fix or "")


def test_a_cache_that_cannot_be_made_is_told_with_its_variable(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file in its place; a full disk while it is written; no home folder at all."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(RunFailed, match=re.escape(f"the cache {tmp_path / 'file'}")) as caught:
        made_once("merged", "a-model", "content", lambda work: None)
    assert "XDG_CACHE_HOME" in caught.value.message and "set XDG_CACHE_HOME" in str(caught.value.fix)

    def fill(work: Path) -> None:
        (work / "half").write_text("half", encoding="utf-8")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    def read(work: Path) -> None:
        raise FileNotFoundError(2, "No such file", "/a/model")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(RunFailed, match="No space left"):
        made_once("merged", "a-model", "content", fill)
    with pytest.raises(FileNotFoundError):  # of what is read, and no matter of the cache
        made_once("merged", "a-model", "content", read)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.name != "dpo" and path.name != "merged"]

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory.")))
    with pytest.raises(RunFailed, match="no home folder"):
        cache_dir()


def test_a_file_of_a_gguf_model_needs_the_cache_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(RunFailed, match="XDG_CACHE_HOME"):
        HuggingFace(ModelSource.of(str(write_gguf(tmp_path / "m.gguf", {})))).tokenizer()


def test_the_tokenizer_is_that_of_its_file(tmp_path: Path, tiny_model_dir: Path) -> None:
    """Of a byte-level tokenizer.json under a class that puts another normaliser on it (as DeepSeek-R1-Distill-Llama has it)."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**config, "tokenizer_class": "LlamaTokenizerFast"}), encoding="utf-8")
    text = "  x\n\ny"
    right = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    assert AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"] != right
    provider = HuggingFace(ModelSource.of(str(folder)))
    assert provider.tokenizer()(text, add_special_tokens=False)["input_ids"] == right
    assert provider.notes

"""Tiny models and tokenizers, built here so that no test needs a network."""

from __future__ import annotations

import copy
import gc
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as `dpo` sets it: spinning threads stall each other when other work runs

import pytest
import torch
from builders import VOCABULARY, tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from dpo_cli.commands.train import train
from dpo_cli.config.config import load
from dpo_cli.errors import Exit
from dpo_cli.hardware.machine import probe
from dpo_cli.plan.preflight import inspect
from dpo_cli.storage.user_cache import cache_dir
from dpo_cli.ui.console import Console

gc.collect()
gc.freeze()  # a collection, of which each training asks for one, then goes through what a test has made, not all libraries
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts tests in the background ignores it for them

Run = Callable[..., tuple[dict[str, Any], Path]]
ROOT = Path(__file__).parent.parent
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NO_HEAD_DIM = {key: value for key, value in SHAPE.items() if key != "head_dim"}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "qwen2": Qwen2Config(**NO_HEAD_DIM, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "qwen3": Qwen3Config(**SHAPE, tie_word_embeddings=True),
    "gemma3": Gemma3TextConfig(**SHAPE, sliding_window=4, final_logit_softcapping=3.0, query_pre_attn_scalar=8),
    "gemma2": Gemma2Config(
        **SHAPE, sliding_window=4, final_logit_softcapping=3.0, attn_logit_softcapping=2.0, query_pre_attn_scalar=8
    ),
    "granite": GraniteConfig(**SHAPE, logits_scaling=4.0),
    "cohere": CohereConfig(**NO_HEAD_DIM, logit_scale=0.25),
    "mistral": MistralConfig(**SHAPE, sliding_window=4),
    "phi3": Phi3Config(**NO_HEAD_DIM, sliding_window=5),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        eos_token_id=2,
        bos_token_id=1,
        pad_token_id=2,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),  # as the provider sets them
    ),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest test goes first: at the end one worker would wait for it."""
    items.sort(key=lambda item: "test_torture" not in item.nodeid)


def tiny_model(family: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A two-layer model of the family with weights large enough that its predictions differ from uniform."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[family]), dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.2)
    return model


@pytest.fixture(autouse=True)
def user_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty user cache for each test, but for models from GGUF files: converting one takes long, and gives the same."""
    models, place = cache_dir() / "gguf", tmp_path_factory.mktemp("cache")
    models.mkdir(parents=True, exist_ok=True)
    (place / "dpo").mkdir()
    (place / "dpo" / "gguf").symlink_to(models)
    monkeypatch.setenv("XDG_CACHE_HOME", str(place))
    return place / "dpo"


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny Llama with its tokenizer, saved as a model directory."""
    place = tmp_path_factory.mktemp("tiny-llama")
    tiny_model("llama", torch.float32).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


@pytest.fixture
def run(tmp_path: Path, tiny_model_dir: Path, pairs_file: Callable[..., Path]) -> Run:
    """Trains two steps of a tiny model with these options; what metrics.json holds, and the run directory."""
    values = {"model_name": str(tiny_model_dir), "dataset": str(pairs_file()), "device": "cpu", "bf16": False, "fp16": False}
    values |= {"max_steps": 2, "lora_r": 4, "learning_rate": 1e-2, "output_dir": str(tmp_path / "run")}
    values |= {"kl_prompts": 2, "max_new_tokens": 4}

    def start(**options: object) -> tuple[dict[str, Any], Path]:
        config = tmp_path / "config.json"
        config.write_text(json.dumps({**values, **options}), encoding="utf-8")
        loaded = load(str(config))
        summary, code = train(
            loaded,
            inspect(loaded, probe()).stricter(lambda found: found.stops_training),
            probe(),
            Console(),
            overwrite=True,
            dry_run=False,
        )
        assert code is Exit.DONE
        return summary, tmp_path / "run"

    return start


@pytest.fixture
def pairs_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows to a .jsonl file; without rows, 24 short pairs over 12 prompts."""

    def write(rows: list[dict[str, object]] | None = None) -> Path:
        rows = rows if rows is not None else [made_row(i) for i in range(24)]
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


def made_row(i: int) -> dict[str, object]:
    return {"prompt": f"question {i // 2}", "chosen": f"the cat sat on {i}", "rejected": f"no {i}"}


@pytest.fixture
def config(tmp_path: Path, tiny_model_dir: Path, pairs_file: Callable[..., Path]) -> Callable[..., Path]:
    """The file of a config of six steps of four pairs of different lengths."""
    rows = [made_row(i) for i in range(24)]
    for i, row in enumerate(rows):
        row["chosen"] = " ".join([str(row["chosen"])] * (1 + i % 4))
    values = {"model_name": str(tiny_model_dir), "dataset": str(pairs_file(rows)), "device": "cpu", "bf16": False}
    values |= {"learning_rate": 1e-2, "eval_split": 0.3, "kl_prompts": 4, "lora_r": 4, "max_steps": 6, "max_new_tokens": 4}
    values |= {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "save_steps": 2,
        "eval_steps": 3,
        "fp16": False,
    }

    def write(name: str, **options: object) -> Path:
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({**values, "output_dir": str(tmp_path / name), **options}), encoding="utf-8")
        return path

    return write

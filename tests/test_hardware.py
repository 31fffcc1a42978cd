"""Model facts, the memory bill, the recommendation."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf_files import write_gguf

from dpo_cli.hardware import gguf, models
from dpo_cli.hardware.facts import model_facts
from dpo_cli.hardware.probe import GIB

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
        adapter: ["adapter-unusable"],
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

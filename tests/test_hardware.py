"""Model facts, the memory bill, the recommendation."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest
from gguf_files import write_gguf

from dpo_cli.hardware.machine import GIB, apple_bf16_flag, bf16_flag, nvidia_gpus, probe
from dpo_cli.models import checks, gguf_header
from dpo_cli.models.source import ModelSource

HEADER: dict[str, object] = {
    "general.architecture": "llama",
    "llama.embedding_length": 64,
    "llama.block_count": 2,
    "llama.feed_forward_length": 96,
    "llama.attention.head_count": 4,
    "tokenizer.ggml.tokens": ["a", "b", "c"],
}


def test_gguf_header_gives_the_shape(tmp_path: Path) -> None:
    facts = ModelSource.of(str(write_gguf(tmp_path / "m.gguf", HEADER, ("output.weight",)))).facts
    assert facts is not None
    assert (facts.hidden_size, facts.head_dim, facts.num_key_value_heads, facts.vocab_size) == (64, 16, 4, 3)
    assert not facts.tie_word_embeddings
    tied = ModelSource.of(str(write_gguf(tmp_path / "tied.gguf", HEADER))).facts
    assert tied is not None and tied.tie_word_embeddings


def test_every_truncation_of_a_header_is_a_value_error(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "m.gguf", HEADER, ("output.weight",)).read_bytes()
    for end in range(4, len(whole)):
        path = tmp_path / "cut.gguf"
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError):
            gguf_header.read_header(path)


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
    assert {path: [problem.code for problem in checks.problems(ModelSource.of(str(path)))] for path in expected} == expected


def test_a_config_json_gives_the_shape(tiny_model_dir: Path) -> None:
    facts = ModelSource.of(str(tiny_model_dir)).facts
    assert facts is not None
    assert (facts.vocab_size, facts.hidden_size, facts.head_dim) == (300, 32, 8)
    assert facts.parameters * 4 / GIB < 1


SMI = """#!/bin/sh
if [ "$1" = -L ]; then
  echo "GPU 0: NVIDIA A (UUID: GPU-1aa)"
  echo "GPU 1: NVIDIA B (UUID: GPU-1bb)"
  echo "  MIG 1g.10gb     Device  0: (UUID: MIG-c0ffee)"
  echo "  MIG 3g.40gb     Device  1: (UUID: MIG-decaf)"
else
  echo "NVIDIA A, 24576, 20480, 8.9, GPU-1aa"
  echo "NVIDIA B, 81920, 16384, 9.0, GPU-1bb"
  echo "NVIDIA C, 12288, 12288, 8.6, GPU-2cc"
fi
"""


@pytest.mark.parametrize(
    ("chosen", "names"),
    [
        (None, "ABC"),
        ("0,1,2", "ABC"),
        ("2,0", "CA"),
        ("", ""),
        (" ", ""),
        ("-1", ""),
        ("none", ""),
        ("0, 1", "AB"),
        (" 2 ,\t1", "CB"),
        ("1,-1,0", "B"),  # the list ends before what names no GPU
        ("1,7,0", "B"),
        ("3", ""),
        ("1,", "B"),
        ("1,1", ""),
        ("GPU-1bb", "B"),
        ("GPU-2", "C"),
        ("GPU-1", ""),  # of two
        ("GPU-2cc,GPU-1aa", "CA"),
        ("GPU-2cc, GPU-nn ,GPU-1aa", "C"),
        ("GPU-2cc,GPU-2", ""),
    ],
)
def test_the_gpus_are_those_that_cuda_sees(
    chosen: str | None, names: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_smi(tmp_path, monkeypatch, chosen)
    assert "".join(gpu.name[-1] for gpu in nvidia_gpus()) == names
    machine = probe()
    assert machine.device == ("cuda" if names else "cpu")
    if names:
        assert machine.memory_of("cuda") == {"A": (24, 20), "B": (80, 16), "C": (12, 12)}[names[0]]


def test_a_part_of_a_gpu_has_the_memory_of_its_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_smi(tmp_path, monkeypatch, "MIG-dec")
    (part,) = nvidia_gpus()
    assert (part.name, part.memory_gb, part.free_gb) == ("NVIDIA B MIG 3g.40gb", 40, 16)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-none")
    assert nvidia_gpus() == ()


def with_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: str | None) -> None:
    """Puts a nvidia-smi with three GPUs on the PATH, and CUDA_VISIBLE_DEVICES into the environment."""
    program = tmp_path / "nvidia-smi"
    program.write_text(SMI, encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if chosen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)


@pytest.mark.parametrize(
    ("machine", "version", "device"), [("arm64", "15.2", "mps"), ("arm64", "13.7", "cpu"), ("x86_64", "15.2", "cpu")]
)
def test_a_mac_trains_on_its_gpu_where_torch_can(
    machine: str, version: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(platform, "mac_ver", lambda: (version, ("", "", ""), machine))
    assert probe().device == device


@pytest.mark.parametrize(
    ("line", "flag"),
    [
        ("flags\t\t: fpu avx2 avx512_bf16 gfni", "avx512_bf16"),
        ("flags\t\t: avx512_bf16 amx_bf16 amx_tile", "amx_bf16"),
        ("flags\t\t: fpu avx2 avx512f", ""),
        ("Features\t: fp asimd i8mm bf16 dgh", "bf16"),
        ("Features\t: fp asimd svei8mm svebf16 i8mm bf16", "svebf16"),
        ("Features\t: fp asimd sve", ""),
        ("model name\t: a bf16 processor", ""),
    ],
)
def test_the_flags_of_a_processor_promise_bfloat16(line: str, flag: str) -> None:
    assert bf16_flag(f"processor\t: 0\n{line}\nbugs\t:\n") == flag


@pytest.mark.parametrize(("answer", "flag"), [("1", "FEAT_BF16"), ("0", "")])
def test_a_mac_is_asked_for_bfloat16(answer: str, flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "sysctl"
    program.write_text(f'#!/bin/sh\n[ "$2" = hw.optional.arm.FEAT_BF16 ] && echo {answer}\n', encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    assert apple_bf16_flag() == flag

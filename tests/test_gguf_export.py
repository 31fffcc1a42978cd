"""GGUF files: a converter that fails is told, and what a real one writes is read back and compared.

The converter is llama.cpp's own: `make check-gguf` fetches it and runs what needs it, which takes a minute.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, SHAPE, made_row
from test_export import left_behind, trained, write  # noqa: F401 - a fixture
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dpo_cli.commands.export import Request, export
from dpo_cli.data.rows import to_pair
from dpo_cli.data.tokens import encode
from dpo_cli.errors import Exit, RunFailed, UsageError
from dpo_cli.models.source import ModelSource
from dpo_cli.providers.huggingface import HuggingFace
from dpo_cli.publish import gguf_export
from dpo_cli.ui.console import Console

DEMO_MODEL = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
CONVERTER = Path(os.environ.get("DPO_GGUF_CONVERTER", ROOT / "models" / "llama.cpp" / "convert_hf_to_gguf.py"))
absent = pytest.mark.skipif(not (CONVERTER.exists() and DEMO_MODEL.exists()), reason="`make check-gguf` fetches the converter")


def real(test: Any) -> Any:
    return pytest.mark.slow(absent(test))


HELP = "usage: convert_hf_to_gguf.py [-h] [--outfile OUTFILE]\n  [--outtype {f32,f16,\n   q8_0,auto}]"


def stub(place: Path, body: str, usage: str = f"print({HELP!r}); sys.exit()") -> Path:
    """A converter that does something else, called as the real one is."""
    script = place / "stub.py"
    start = f"import pathlib, sys\nif '--help' in sys.argv:\n    {usage}\n"
    script.write_text(f"{start}out = pathlib.Path(sys.argv[sys.argv.index('--outfile') + 1])\n{body}\n", "utf-8")
    return script


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("raise ValueError('unknown architecture')", "failed: ValueError: unknown architecture"),
        ("sys.exit(3)", "failed: exit code 3"),
        ("", "wrote no GGUF file"),
        ("out.write_text('done')", "wrote no GGUF file"),
        ("out.write_bytes(b'GGUF' + bytes(64))", "cannot be read back"),
    ],
)
def test_a_converter_that_fails_is_told_and_nothing_is_left(
    trained: Callable[..., Path],  # noqa: F811
    tmp_path: Path,
    body: str,
    says: str,
) -> None:
    place = tmp_path / "exports"
    place.mkdir()
    asked = Request(str(trained("adapter")), place / "out", gguf="f32", converter=stub(tmp_path, body))
    with pytest.raises(RunFailed) as caught:
        export(asked, Console())
    assert says in caught.value.message
    assert left_behind(place) == []


def test_without_a_converter_it_is_said_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything else is looked at: the run that is named here does not exist."""
    monkeypatch.setenv("PATH", str(tmp_path))
    for named in (None, tmp_path / "gone.py"):
        with pytest.raises(UsageError) as caught:
            export(Request("no-run", tmp_path / "out", gguf="q8_0", converter=named), Console())
        assert caught.value.exit_code is Exit.USAGE and "llama-cpp-python" in (caught.value.fix or "")
    on_path = tmp_path / gguf_export.SCRIPT
    on_path.write_text("#!/bin/sh\n", encoding="utf-8")
    on_path.chmod(0o755)
    assert gguf_export.find_converter(None) == on_path
    assert gguf_export.find_converter(CONVERTER if CONVERTER.exists() else on_path).is_absolute()


@pytest.mark.parametrize(
    ("usage", "kind", "message"),
    [
        ("import no_such_module", "f32", "does not run: ModuleNotFoundError: No module named 'no_such_module'"),
        ("print('usage: other.py'); sys.exit()", "f32", "is not llama.cpp's convert_hf_to_gguf.py: its help has no --outtype"),
        (f"print({HELP!r}); sys.exit()", "bf16", "cannot write bf16; it writes f32, f16, q8_0, auto"),
    ],
)
def test_a_converter_that_cannot_write_the_type_is_refused_before_a_model_is_loaded(
    trained: Callable[..., Path],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    usage: str,
    kind: gguf_export.Type,
    message: str,
) -> None:
    monkeypatch.setattr(HuggingFace, "base_model", lambda *_: pytest.fail("a model was loaded"))
    place = tmp_path / "exports"
    place.mkdir()
    converter = stub(tmp_path, "", usage)
    with pytest.raises(UsageError) as caught:
        export(Request(str(trained("adapter")), place / "out", gguf=kind, converter=converter), Console())
    assert caught.value.message == f"{'the converter ' * (not message.startswith('is not'))}{converter} {message}"
    assert left_behind(place) == []


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
def test_a_converter_that_writes_the_type_is_accepted(tmp_path: Path, kind: gguf_export.Type) -> None:
    gguf_export.require_type(stub(tmp_path, ""), kind)


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with SmolLM2's tokenizer, since the converter knows tokenizers by what they make of a text."""
    place = tmp_path_factory.mktemp("small")
    tokenizer = HuggingFace(ModelSource.of(str(DEMO_MODEL))).tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "vocab_size": len(tokenizer), "hidden_size": 64, "head_dim": 16}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.1)
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


@real
@pytest.mark.parametrize("kind", ["f32", "q8_0"])
def test_an_export_with_a_gguf_file_that_answers_the_same(
    trained: Callable[..., Path],  # noqa: F811
    tmp_path: Path,
    small_model: Path,
    kind: gguf_export.Type,
) -> None:
    run = trained("small", model_name=str(small_model), max_steps=2)
    made, code = export(Request(str(run), tmp_path / "mine", gguf=kind, converter=CONVERTER), Console())
    assert code is Exit.DONE
    found = made["gguf"]
    assert found["file"] == f"mine.{kind.upper()}.gguf" and found["positions"] > 50 and found["modelfile_template"]
    assert (found["same_argmax"], found["max_difference"]) == (1.0, 0.0) or kind != "f32"
    assert found["same_argmax"] >= found["least_same"] == gguf_export.LEAST_SAME[kind] and (found["max_difference"] > 0) == (
        kind != "f32"
    )
    assert f"FROM ./{found['file']}\n" in (tmp_path / "mine" / "Modelfile").read_text(encoding="utf-8")
    assert f"`{found['file']}` has the same most likely token" in (tmp_path / "mine" / "README.md").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "mine" / "export.json").read_text(encoding="utf-8"))["gguf"] == found
    size = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tmp_path / "mine").parameters())
    file = (tmp_path / "mine" / found["file"]).stat().st_size
    assert file > size * gguf_export.BYTES_PER_VALUE[kind]  # what the free space is checked for, and the tokenizer


@real
def test_a_file_of_another_model_is_refused(
    trained: Callable[..., Path],  # noqa: F811
    tmp_path: Path,
    small_model: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The converter writes a sound file, but of a model whose weights have another sign."""
    place = tmp_path / "exports"
    place.mkdir()
    shutil.copytree(small_model, tmp_path / "other")
    model = AutoModelForCausalLM.from_pretrained(small_model)
    with torch.no_grad():
        model.lm_head.weight.neg_()
    model.save_pretrained(tmp_path / "other")
    body = f"import runpy\nsys.argv[1] = {str(tmp_path / 'other')!r}\nsys.path.insert(0, {str(CONVERTER.parent)!r})\n"
    body += f"sys.argv[0] = {str(CONVERTER)!r}\nrunpy.run_path({str(CONVERTER)!r}, run_name='__main__')"
    run = trained("small", model_name=str(small_model), max_steps=2)
    made, code = export(Request(str(run), place / "out", gguf="f32", converter=stub(tmp_path, body)), Console())
    assert (code, made["gguf"]["ok"]) == (Exit.MISSED, False) and made["gguf"]["same_argmax"] < 0.5
    assert "[gguf-differs] out.F32.gguf answers otherwise" in capsys.readouterr().err
    assert left_behind(place) == []


@real
def test_a_file_that_ends_texts_otherwise_is_refused(tmp_path: Path, small_model: Path) -> None:
    file = tmp_path / "m.gguf"
    gguf_export.convert(CONVERTER, small_model, file, "f32", "m")
    tokenizer = AutoTokenizer.from_pretrained(small_model)
    rows = encode([to_pair(made_row(i), i + 1) for i in range(4)], tokenizer)
    assert gguf_export.check(small_model, file, "f32", rows, tokenizer).ok
    tokenizer.eos_token = "<|endoftext|>"
    with pytest.raises(RunFailed, match="or in the token that ends a text"):
        gguf_export.check(small_model, file, "f32", rows, tokenizer)

"""GGUF files: a converter that fails leaves the merged model, and what a real one writes is read back and compared.

The converter is llama.cpp's own: `make check-gguf` fetches it and runs what needs it, which takes a minute.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, SHAPE, made_row
from test_export import left_behind, trained, write  # noqa: F401 - a fixture
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, modeling_gguf_pytorch_utils

from dpo_cli.commands import export as export_module
from dpo_cli.commands.export import Request, export
from dpo_cli.data.rows import to_pair
from dpo_cli.data.tokens import encode
from dpo_cli.errors import Exit, RunFailed, UsageError
from dpo_cli.models.source import ModelSource
from dpo_cli.providers.huggingface import HuggingFace
from dpo_cli.publish import gguf_export
from dpo_cli.storage.digests import sha256
from dpo_cli.storage.log import hush
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


# What the real converter does to a Llama in float32.
WRITES = f"""
sys.path.insert(0, {str(Path(__file__).parent)!r})
from gguf_files import write_llama
from transformers import AutoModelForCausalLM, AutoTokenizer
write_llama(out, AutoModelForCausalLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1]))
"""


@pytest.mark.long
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
def test_a_gguf_step_that_fails_leaves_the_merged_model_and_is_repeated_alone(
    trained: Callable[..., Path],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    body: str,
    says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, out = trained("adapter"), tmp_path / "exports" / "out"
    export(Request(str(run), tmp_path / "plain"), Console())
    failing = Request(str(run), out, gguf="f32", converter=stub(tmp_path, body))
    with pytest.raises(RunFailed) as caught:
        export(failing, Console())
    assert capsys.readouterr().out.count("note: sentencepiece is not installed") == (find_spec("sentencepiece") is None)
    assert says in caught.value.message
    assert caught.value.message.endswith(f"; the merged model in {out} is complete and has no GGUF file")
    again = f"repeat only the GGUF step: `dpo export {run} --out {out} --gguf f32 --converter {failing.converter}`"
    assert (caught.value.fix or "").endswith(again)
    assert left_behind(out.parent) == ["out"]
    facts = {place: json.loads((place / "export.json").read_text(encoding="utf-8")) for place in (out, tmp_path / "plain")}
    assert facts[out] == facts[tmp_path / "plain"] and facts[out]["gguf"] is None
    assert left_behind(out) == left_behind(tmp_path / "plain")

    merges = merges_counted(monkeypatch)
    stub(tmp_path, WRITES)
    result, code = export(failing, Console())
    assert (code, result["gguf"]["ok"], merges) == (Exit.DONE, True, [])
    assert_complete(out, facts[out])


def merges_counted(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that merged models are written to from here on."""
    merge, places = export_module._write_merged, []

    def counted(opened: Any, plan: Any, out: Path, place: Path) -> None:
        places.append(out)
        merge(opened, plan, out, place)

    monkeypatch.setattr(export_module, "_write_merged", counted)
    return places


def assert_complete(out: Path, merged: dict[str, Any]) -> None:
    """The files of the merged model as they were, the GGUF file and its Modelfile, one section in the card, and export.json."""
    facts = json.loads((out / "export.json").read_text(encoding="utf-8"))
    assert {**facts, "gguf": None} == merged and facts["gguf"]["file"] == "out.F32.gguf"
    assert {name: sha256(out / name) for name in merged["files"]} == merged["files"]
    added = ["Modelfile", "README.md", "export.json", "out.F32.gguf"]
    assert left_behind(out) == sorted([*merged["files"], *added]) and left_behind(out.parent) == ["out"]
    card = (out / "README.md").read_text(encoding="utf-8")
    assert (card.count("## GGUF"), card.count("`out.F32.gguf` has the same most likely token")) == (1, 1)


@pytest.mark.long
def test_an_export_that_is_killed_while_it_converts_is_continued(
    trained: Callable[..., Path],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The converter kills `dpo` after half a file; then `dpo` is killed once more, before export.json names the file."""
    run, out = trained("adapter"), tmp_path / "exports" / "out"
    converter = stub(tmp_path, "import os, signal\nout.write_bytes(b'GGUF')\nos.kill(os.getppid(), signal.SIGKILL)")
    words = ["export", str(run), "--out", str(out), "--gguf", "f32", "--converter", str(converter)]
    killed = subprocess.run([sys.executable, "-m", "dpo_cli", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (killed.returncode, left_behind(out.parent)) == (-signal.SIGKILL, [".out.part", "out"]), killed.stderr
    merged = json.loads((out / "export.json").read_text(encoding="utf-8"))
    assert (merged["gguf"], left_behind(out)) == (None, sorted([*merged["files"], "README.md", "export.json"]))

    merges, stopped = merges_counted(monkeypatch), json.dumps(merged)
    stub(tmp_path, WRITES)
    for _ in range(2):
        _, code = export(Request(str(run), out, gguf="f32", converter=converter), Console())
        assert (code, merges) == (Exit.DONE, [])
        assert_complete(out, merged)
        (out / "export.json").write_text(stopped, encoding="utf-8")


def test_only_the_unchanged_export_of_the_same_run_is_reused(
    trained: Callable[..., Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    run, other, out = trained("adapter"), trained("other", seed=7), tmp_path / "out"
    converter = stub(tmp_path, WRITES)
    export(Request(str(run), out), Console())

    def refusal(run: Path = run, gguf: gguf_export.Type | None = "f32") -> str:
        with pytest.raises(UsageError) as caught:
            export(Request(str(run), out, gguf=gguf, converter=converter), Console())
        return caught.value.message

    assert refusal(gguf=None) == f"{out} exists already: it holds an export"
    assert refusal(run=other) == f"{out} exists already, and is the export of another run than {other}"
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        content = (out / name).read_bytes()
        (out / name).write_bytes(content[:-1] + b" ")
        assert refusal() == f"{out} exists already, and is incomplete or has changed: {name}"
        (out / name).unlink()
        assert refusal() == f"{out} exists already, and is incomplete or has changed: {name}"
        (out / name).write_bytes(content)
    facts = (out / "export.json").read_bytes()
    for damaged in (facts[:50], b"[]", b"{}", b'{"files": 3}'):
        (out / "export.json").write_bytes(damaged)
        assert refusal() == f"{out} exists already, and its export.json cannot be read or has no digests"
    (out / "export.json").write_bytes(facts)
    assert export(Request(str(run), out, gguf="f32", converter=converter), Console())[1] is Exit.DONE
    assert refusal() == f"{out} exists already, with its GGUF file out.F32.gguf"


def test_a_gguf_file_is_read_without_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    hush()
    assert [*modeling_gguf_pytorch_utils.tqdm(range(3), desc="tensors")] == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_without_a_converter_it_is_said_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything else is looked at: the run that is named here does not exist."""
    monkeypatch.setenv("PATH", str(tmp_path))
    for named in (None, tmp_path / "gone.py"):
        with pytest.raises(UsageError) as caught:
            export(Request("no-run", tmp_path / "out", gguf="q8_0", converter=named), Console())
        assert caught.value.exit_code is Exit.USAGE and "llama-cpp-python" in (caught.value.fix or "")
    (tmp_path / "llama.cpp").mkdir()
    (script := tmp_path / "llama.cpp" / gguf_export.SCRIPT).touch()
    with pytest.raises(UsageError) as caught:
        gguf_export.find_converter(script.parent)
    assert caught.value.fix == f"name the script in it: {script}"
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
    assert "[gguf-differs] out.F32.gguf answers differently" in capsys.readouterr().err
    facts = json.loads((place / "out" / "export.json").read_text(encoding="utf-8"))
    assert (left_behind(place), facts["gguf"], made["out"]) == (["out"], None, str(place / "out"))
    assert left_behind(place / "out") == sorted([*facts["files"], "README.md", "export.json"])


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

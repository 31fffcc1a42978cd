"""A GGUF file of a model directory: written by llama.cpp's own converter, then read back and compared.

The `gguf` package writes files, but cannot convert a model; llama.cpp's script can. It is not a package, so the user names it,
and it runs as a separate process.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from dpo_cli.data.encoded import Encoded
from dpo_cli.errors import RunFailed, UsageError
from dpo_cli.models.gguf_header import read_header
from dpo_cli.models.model_files import ModelFiles
from dpo_cli.results.merge import GgufCheck
from dpo_cli.storage.progress import working

Type = Literal["f32", "f16", "bf16", "q8_0"]
SCRIPT = "convert_hf_to_gguf.py"
BYTES_PER_VALUE = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32}  # q8_0: blocks of 32 bytes and a 16-bit scale
# The share of positions at which the GGUF model must have the same most likely token as the merged model.
LEAST_SAME = {"f32": 0.999, "f16": 0.98, "bf16": 0.98, "q8_0": 0.95}
ROWS, POSITIONS = 32, 16  # held-out rows compared, and the first positions of each response
WHERE = (
    "it is llama.cpp's: `make converter` in a checkout of dpo fetches it into models/llama.cpp, and so does "
    "`pip download --no-binary llama-cpp-python --no-deps llama-cpp-python`, where it is in vendor/llama.cpp; "
    "name the script with --converter or DPO_GGUF_CONVERTER, and keep it next to the folders that it came with"
)

MODULE = "train.log of the run has its output; for a missing module: pip install '.[gguf]' in a checkout of dpo"


def find_converter(named: Path | None) -> Path:
    """The converter that is named, or the one on PATH; `UsageError` says where to get it."""
    path = named or shutil.which(SCRIPT)
    if path is None:
        raise UsageError(f"--gguf needs a converter, {SCRIPT}", WHERE)
    if Path(path, SCRIPT).is_file():
        raise UsageError(f"the converter {path} is a folder", f"name the script in it: {Path(path, SCRIPT)}")
    if not Path(path).is_file():
        raise UsageError(f"the converter {path} is not a file", WHERE)
    return Path(path).absolute()


def require_type(converter: Path, kind: Type) -> None:
    """`UsageError` unless the converter runs and its help names the type. It takes seconds, and a merge takes minutes."""
    done = _run([sys.executable, str(converter), "--help"])
    if done.returncode != 0:
        raise UsageError(
            f"the converter {converter} does not run: {_last_line(done)}", f"{MODULE}; or name another one: {WHERE}"
        )
    types = re.search(r"--outtype\s+\{(.+?)\}", done.stdout, re.DOTALL)
    if types is None:
        raise UsageError(f"{converter} is not llama.cpp's {SCRIPT}: its help has no --outtype", WHERE)
    known = re.findall(r"\w+", types[1])
    if kind not in known:
        raise UsageError(
            f"the converter {converter} cannot write {kind}; it writes {', '.join(known)}", f"name a newer one: {WHERE}"
        )


def has_sentencepiece() -> bool:
    """Whether the package is installed that the converter imports for most tokenizers, and not before it converts."""
    return find_spec("sentencepiece") is not None


def convert(converter: Path, model_dir: Path, file: Path, kind: str, name: str) -> None:
    """Run the converter on a model directory; `RunFailed` if it fails, or writes no GGUF file. Its output is logged."""
    command = [sys.executable, str(converter), str(model_dir), "--outfile", str(file), "--outtype", kind, "--model-name", name]
    with working(f"writing {file.name}"):
        done = _run(command)
    if done.returncode != 0:
        raise RunFailed(f"the converter {converter} failed: {_last_line(done)}", MODULE)
    if not ModelFiles(file).is_gguf:
        raise RunFailed(f"the converter {converter} wrote no GGUF file", f"name llama.cpp's {SCRIPT}; train.log has its output")


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run the converter to its end, and log its output."""
    # It reads the folder with transformers, which must not contact the hub.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment, check=False)
    logging.getLogger("dpo").info("%s\n%s%s", command, done.stdout, done.stderr)
    return done


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    return (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]


def check(model_dir: Path, file: Path, kind: str, rows: Sequence[Encoded], tokenizer: PreTrainedTokenizerBase) -> GgufCheck:
    """Read a GGUF file back with transformers and compare its logits with those of the model directory.

    One model is in memory at a time, in float32. `RunFailed` for a file that cannot be read, or has another end token.
    """
    with working(f"reading {file.name} back"):
        return _check(model_dir, file, kind, rows, tokenizer)


def _check(model_dir: Path, file: Path, kind: str, rows: Sequence[Encoded], tokenizer: PreTrainedTokenizerBase) -> GgufCheck:
    expected = _logits(rows, pretrained_model_name_or_path=str(model_dir))
    try:
        ends = read_header(file).metadata.get("tokenizer.ggml.eos_token_id")
        actual = _logits(rows, pretrained_model_name_or_path=str(file.parent), gguf_file=file.name)
    except (OSError, ValueError, KeyError, RuntimeError) as error:  # the errors of transformers for an unreadable file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        message = f"{file.name} cannot be read back, so it cannot be checked: {reason}"
        raise RunFailed(message, "use a newer converter") from error
    if ends != tokenizer.eos_token_id or actual.shape != expected.shape:
        message = f"{file.name} differs from the model in its vocabulary or in the token that ends a text"
        raise RunFailed(message, "use a newer converter")
    same = float((actual.argmax(dim=-1) == expected.argmax(dim=-1)).double().mean())
    apart = float((actual - expected).abs().max())
    return GgufCheck(file.name, kind, len(expected), same, apart, LEAST_SAME[kind], ok=same >= LEAST_SAME[kind])


def _logits(rows: Sequence[Encoded], **source: str) -> Tensor:
    """The logits that predict the first tokens of each row's first response, (positions, vocabulary), in float32."""
    options: dict[str, Any] = {"dtype": torch.float32, "local_files_only": True, "trust_remote_code": False}
    model = AutoModelForCausalLM.from_pretrained(**source, **options).eval()
    logits_of_rows = []
    with torch.no_grad():
        for row in rows[:ROWS]:
            start = max(len(row.prompt_ids) - 1, 0)
            ids = torch.tensor([(row.prompt_ids + row.responses[0])[: start + POSITIONS]])
            logits_of_rows.append(model(input_ids=ids, use_cache=False).logits[0, start:])
    return torch.cat(logits_of_rows)

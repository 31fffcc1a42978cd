"""The commands of other programs that serve what `dpo` trains: `dpo` itself serves nothing. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from shlex import quote

from dpo_cli.errors import UsageError
from dpo_cli.storage.run_directory import ADAPTER, config_of_run, run_of

PAGE = "docs/guides/serving.md"
GGUF = ".gguf"
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # the values that vLLM accepts for --max-lora-rank


def of_export(folder: Path, gguf: str | None) -> list[str]:
    """The commands for a merged model, and for its GGUF file if there is one."""
    place = quote(str(folder))
    lines = [f"transformers serve {place}", f"vllm serve {place}"]
    if gguf is not None:
        lines.append(f"llama-server -m {quote(str(folder / gguf))}")
        lines.append(f"cd {place} && ollama create {quote(folder.name.lower())} -f Modelfile")
    return lines


def of_adapter(run: Path, base: str, rank: int) -> str:
    """The command for an adapter of this rank next to its base, which is not merged."""
    most = next((size for size in VLLM_RANKS if size >= rank), rank)
    named = quote(f"{run.name}={run / ADAPTER}")
    return f"vllm serve {quote(base)} --enable-lora --max-lora-rank {most} --lora-modules {named}"


def no_server(words: Sequence[str]) -> UsageError:
    """The error of `dpo serve`, with what to type instead."""
    name = words[0] if words else "RUN_DIR"
    config = config_of_run(name)
    lines = [f"dpo export {quote(name)} --out my-model --gguf q8_0", *of_export(Path("my-model"), "my-model.Q8_0.gguf")]
    if config is not None and config["lora_r"] and not str(config["model_name"]).endswith(GGUF):  # vLLM reads safetensors
        lines.append(of_adapter(run_of(name), str(config["model_name"]), int(config["lora_r"])))
    fix = "export the model, and serve it with one of these programs: " + "; ".join(f"`{line}`" for line in lines)
    return UsageError("dpo serves no model: other programs do that well", f"{fix}; {PAGE} has the details")

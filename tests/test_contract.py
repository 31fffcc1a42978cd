"""What other programs read: the keys of every JSON document and file, and the exit codes, as tests/contract.json has them.

`python tests/test_contract.py [TREE]` prints those of a checkout; the file has those of commit 29a37be.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

KEPT = Path(__file__).with_name("contract.json")
SETTINGS = {
    "model_name": "model", "device": "cpu", "bf16": False, "fp16": False, "max_steps": 2, "lora_r": 4, "learning_rate": 1e-2,
    "kl_prompts": 2, "max_new_tokens": 4, "eval_split": 0.6, "save_steps": 1, "dataset": "pairs.jsonl",
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "dpo": {**SETTINGS, "output_dir": "runs/dpo", "augment": {"rank": "shorter", "max_new_tokens": 8}},
    "sft": {**SETTINGS, "strategy": "sft", "output_dir": "runs/sft"},
    "bad": {**SETTINGS, "lerning_rate": 1, "bf16": True, "fp16": True},
    "stages": {**SETTINGS, "output_dir": "runs/stages", "stages": [{"strategy": "sft"}, {"strategy": "dpo"}]},
}
COMMANDS = {
    "validate": ["validate", "dpo.json", "--json"],
    "validate, invalid": ["validate", "bad.json", "--json"],
    "validate, several": ["validate", "dpo.json", "sft.json", "--json"],
    "validate, schema": ["validate", "--schema", "--json"],
    "recommend": ["recommend", "--vram", "12", "--json"],
    "train, dry": ["train", "dpo.json", "--dry-run", "--json"],
    "train": ["train", "dpo.json", "--json"],
    "train, there": ["train", "dpo.json", "--json"],
    "train, resume": ["train", "dpo.json", "--resume", "--json"],
    "train, sft": ["train", "sft.json", "--json"],
    "train, stages": ["train", "stages.json", "--json"],
    "eval": ["eval", "runs/dpo", "--json"],
    "eval, limits": ["eval", "runs/dpo", "--fail-under", "accuracy=2", "--json"],
    "eval, sft": ["eval", "runs/sft", "--json"],
    "eval, side by side": ["eval", "runs/dpo", "--side-by-side", "2", "--json"],
    "eval, tally": ["eval", "--tally", "votes.json", "--json"],
    "report": ["report", "runs/dpo", "--json"],
    "report, several": ["report", "runs/dpo", "runs/sft", "--json"],
    "augment": ["augment", "prompts.txt", "dpo.json", "--out", "made.jsonl", "--json"],
    "export": ["export", "runs/dpo", "--out", "whole", "--json"],
    "cache": ["cache", "--json"],
    "usage": ["eval", "--json"],
}
WORDS = ("ok", "code", "severity", "key", "status", "metric", "rule", "action", "split", "exit_code")  # programs compare these
READ = (".json", ".jsonl")  # files of a run whose keys others read
THEIRS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")  # written by transformers
BY_NAME = (
    "columns",
    "dataset",
    "eval_dataset",
    "versions",
    "categories",
    "below",
    "settings",
    "trained",
)  # whose keys are data


def shape(value: Any, name: str = "") -> Any:
    """A document without its values but for `WORDS`: the keys of objects, the parts of lists that differ, kinds of the rest."""
    if isinstance(value, dict):
        if name in BY_NAME:
            return "object"
        return {key: shape(value[key], key) for key in sorted(value)}
    if isinstance(value, list):
        shapes = [shape(part, name) for part in value]
        return [part for i, part in enumerate(shapes) if part not in shapes[:i]]
    if name in WORDS:
        return value
    return "null" if value is None else {bool: "bool", int: "number", float: "number", str: "text"}[type(value)]


def lay_out(place: Path) -> None:
    from builders import tiny_tokenizer
    from conftest import made_row, tiny_model
    from torch import float32

    tiny_model("llama", float32).save_pretrained(place / "model")
    tiny_tokenizer().save_pretrained(place / "model")
    (place / "pairs.jsonl").write_text("".join(json.dumps(made_row(i)) + "\n" for i in range(24)), encoding="utf-8")
    (place / "prompts.txt").write_text("\n".join(f"question {i}" for i in range(4)), encoding="utf-8")
    for name, config in CONFIGS.items():
        (place / f"{name}.json").write_text(json.dumps(config), encoding="utf-8")
    vote = {"prompt": "p", "adapter": "a", "base": "b", "winner": "adapter", "by": "human"}
    votes = {
        "votes_version": 1,
        "run": "r",
        "adapter_sha256": "0",
        "criterion": "c",
        "page": "p",
        "judge": None,
        "votes": [vote],
    }
    (place / "votes.json").write_text(json.dumps(votes), encoding="utf-8")


def found(place: Path, dpo: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
    """Exit code and document of each command, then the files of the runs with what stands in those of JSON."""
    for name, words in COMMANDS.items():
        done = dpo(*words, cwd=place)
        yield name, {"exit": done.returncode, "document": shape(json.loads(done.stdout)) if done.stdout.strip() else None}
    for run in ("runs/dpo", "runs/sft", "whole"):  # of the model only what is ours
        files = sorted(path for path in (place / run).rglob("*") if path.is_file())
        yield f"files of {run}", [str(path.relative_to(place / run)) for path in files]
        for path in files:
            if path.suffix in READ and path.parent == place / run and path.name not in THEIRS:
                text = path.read_text(encoding="utf-8")
                value = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
                yield f"{run}/{path.name}", shape(value)


ADDED = {  # keys of later versions
    *("row_tokens", "reference_from_cache", "full_determinism", "compare", "longest_prompt", "reward_model"),
    *("reward_functions", "rl_algorithm", "num_generations", "temperature", "num_iterations", "epsilon"),
    *("rounds", "score", "scores", "prompts_file", "ddp_timeout", "processes"),
    *("activation_offloading", "fsdp", "cpu_offload", "desirable_weight", "undesirable_weight"),
    *("f_divergence_type", "f_alpha_divergence_coef", "ld_alpha", "use_weighting"),
}
ADDED_FILES = ("reference.json", "reference.safetensors")  # of a checkpoint


def without_added(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_added(part) for key, part in value.items() if key not in ADDED}
    if isinstance(value, list):
        return [without_added(part) for part in value if not (isinstance(part, str) and part.endswith(ADDED_FILES))]
    return value


def test_documents_and_files_have_the_keys_that_they_had(tmp_path: Path, user_cache: Path) -> None:
    from fork_server import dpo

    (user_cache / "gguf").unlink()  # models of other tests
    lay_out(tmp_path)
    now, then = without_added(dict(found(tmp_path, dpo))), json.loads(KEPT.read_text(encoding="utf-8"))
    assert now.keys() == then.keys()
    assert {name: value for name, value in now.items() if value != then[name]} == {}


if __name__ == "__main__":
    tree = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent).absolute()

    def process(*words: str, cwd: Path) -> Any:
        env = {**os.environ, "PYTHONPATH": str(tree)}
        command = [sys.executable, "-m", "dpo_cli", *words]
        return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)

    with tempfile.TemporaryDirectory() as folder:
        lay_out(Path(folder))
        lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in found(Path(folder), process))
        print("{\n" + ",\n".join(lines) + "\n}")

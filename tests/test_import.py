"""`dpo import`: configs of other tools become ours, and every key that is not taken is named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from fork_server import dpo

from dpo_cli.config.config import load
from dpo_cli.config.foreign_config import read
from dpo_cli.config.tools import tool_of, tools
from dpo_cli.config.translation import Translation, translated
from dpo_cli.errors import InvalidInput

AXOLOTL = """
base_model: org/model
rl: dpo
adapter: qlora
load_in_4bit: true
datasets:
  - path: org/pairs
    split: train_prefs
    type: chatml.intel
sequence_len: 4096
micro_batch_size: 2
num_epochs: 2
learning_rate: 5e-6
lora_r: 32
lora_alpha:
lora_target_linear: true
bf16: auto
wandb_project: tries
flash_attention: true
sample_pakcing: true
"""
LLAMA_FACTORY = """
model_name_or_path: org/model
stage: dpo
finetuning_type: lora
lora_rank: 4
lora_target: q_proj,v_proj
pref_beta: 0.2
pref_loss: ipo
dataset: mine, theirs
template: llama3
val_size: 0.1
"""
TRL = """
model_name_or_path: org/model
dataset_mixer:
  org/pairs: 1.0
  org/more: 0.5
dataset_splits: [train_prefs, test_prefs]
torch_dtype: float16
bf16: true
beta: 0.01
"""
SWIFT = """
# a comment
RATE=2e-5
CUDA_VISIBLE_DEVICES=0 \\
swift rlhf \\
    --rlhf_type dpo \\
    --model org/model \\
    --train_type lora \\
    --dataset 'org/pairs#1000' \\
    --target_modules q_proj v_proj \\
    --learning_rate $RATE \\
    --gradient_accumulation_steps $(expr 16 / 2) \\
    --rpo_alpha 0.1
"""
PROGRAM = """
from unsloth import FastLanguageModel
length = 1024
model, tokenizer = FastLanguageModel.from_pretrained(model_name="org/model", max_seq_length=4096, load_in_4bit=True)
tokenizer = AutoTokenizer.from_pretrained("org/other")
model = FastLanguageModel.get_peft_model(model, r=8, target_modules=["q_proj"], lora_alpha=16, random_state=7)
data = load_dataset("org/pairs", split="train")
more = load_dataset("org/more")
trainer = DPOTrainer(model, ref_model=None, train_dataset=data, tokenizer=tokenizer,
    args=DPOConfig(output_dir="out", max_length=length, beta=0.3, bf16=is_bfloat16_supported()))
"""


def of(tmp_path: Path, text: str, name: str = "theirs.yaml") -> Translation:
    (tmp_path / name).write_text(text, encoding="utf-8")
    return translated(read(tmp_path / name))


def left_out(found: Translation) -> dict[str, str]:
    return {part.key: part.why for part in found.of("left out")}


def test_a_config_of_axolotl(tmp_path: Path) -> None:
    found = of(tmp_path, AXOLOTL)
    assert found.config == {
        "strategy": "dpo", "model_name": "org/model", "dataset": "org/pairs:train_prefs", "num_train_epochs": 2,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "learning_rate": 5e-6,
        "lr_scheduler_type": "cosine", "lora_r": 32,
        "target_modules": "all-linear", "use_4bit": True, "max_seq_length": 4096, "report_to": "wandb",
    }  # fmt: skip
    assert set(left_out(found)) == {"lora_alpha", "flash_attention", "sample_pakcing", "datasets.type"}
    assert left_out(found)["sample_pakcing"] == "dpo does not know this key"
    assert "drops the oldest tokens" in found.differs["max_seq_length"]
    assert not found.problems


def test_without_an_adapter_axolotl_and_trl_train_all_weights(tmp_path: Path) -> None:
    for text, key in ((AXOLOTL.replace("adapter: qlora", ""), "adapter"), (TRL, "use_peft")):
        found = of(tmp_path, text)
        assert found.config["lora_r"] == 0 and "target_modules" not in found.config
        added = {name: part.why for part in found.of("default") for name in part.becomes}
        assert added["lora_r"].startswith(key)


@pytest.mark.parametrize(
    ("name", "text", "strategy"),
    [
        ("a.yaml", "base_model: m\nadapter: lora\nsequence_len: 8\n", "sft"),
        ("a.yaml", "model_name_or_path: m\nfinetuning_type: lora\ncutoff_len: 8\n", "sft"),
        ("a.sh", "swift sft --model m --tuner_type lora\n", "sft"),
        ("a.sh", "swift rlhf --model m --tuner_type lora\n", "dpo"),
        ("a.yaml", "model_name_or_path: m\nuse_peft: true\n", None),
    ],
)
def test_the_method_of_a_file_that_does_not_say_it(tmp_path: Path, name: str, text: str, strategy: str | None) -> None:
    assert of(tmp_path, text, name).config.get("strategy") == strategy


@pytest.mark.parametrize("keys", ["train_type: full\nlora_rank: 8\n", "lora_rank: 8\ntrain_type: full\n"])
def test_all_weights_go_before_a_rank(tmp_path: Path, keys: str) -> None:
    found = of(tmp_path, f"rlhf_type: dpo\n{keys}lora_alpha: 32\ntarget_modules: all-linear\n")
    assert found.config["lora_r"] == 0 and found.config["learning_rate"] == 1e-5  # the default of ms-swift for all weights
    assert {"lora_rank", "lora_alpha", "target_modules"} <= left_out(found).keys()
    assert not {"lora_alpha", "lora_dropout", "target_modules"} & found.config.keys()


def test_names_of_llama_factory_are_looked_up(tmp_path: Path) -> None:
    entries = {
        "mine": {"file_name": "mine.json", "ranking": True, "columns": {"prompt": "instruction", "chosen": "chosen"}},
        "theirs": {"hf_hub_url": "org/pairs", "split": "test"},
    }
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(entries), encoding="utf-8")
    (tmp_path / "examples").mkdir()
    found = of(tmp_path / "examples", LLAMA_FACTORY)
    assert found.config["dataset"] == [str(tmp_path / "data" / "mine.json"), "org/pairs:test"]
    assert found.config["columns"] == {"prompt": "instruction"}
    assert (found.config["lora_r"], found.config["lora_alpha"], found.config["learning_rate"]) == (4, 8, 5e-5)
    assert (found.config["loss_type"], found.config["target_modules"]) == ("ipo", ["q_proj", "v_proj"])
    assert left_out(found)["template"].startswith("the chat template is the model's own")


def test_a_name_that_is_nowhere_stops_the_import(tmp_path: Path) -> None:
    found = of(tmp_path, LLAMA_FACTORY)
    assert [problem.code for problem in found.problems] == ["import-dataset"] * 2
    assert [part.key for part in found.of("stops")] == ["dataset"] and "dataset" not in found.config


def test_odd_entries_of_llama_factory_stop_the_import(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    entries = {"mine": {"script_url": "load.py"}, "theirs": {"file_name": "a.json", "columns": ["a"]}}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(entries), encoding="utf-8")
    found = of(tmp_path, LLAMA_FACTORY)
    assert [problem.code for problem in found.problems] == ["import-dataset"] and "mine" in found.problems[0].message
    assert found.config["dataset"] == str(tmp_path / "data" / "a.json")


def test_a_config_of_the_alignment_handbook(tmp_path: Path) -> None:
    found = of(tmp_path, TRL)
    assert found.config["dataset"] == ["org/pairs:train_prefs", {"path": "org/more:train_prefs", "weight": 0.5}]
    assert found.config["eval_dataset"] == ["org/pairs:test_prefs", "org/more:test_prefs"]
    assert found.config["bf16"] is True and "fp16" not in found.config
    assert left_out(found)["torch_dtype"] == "bf16 says how it computes"


def test_trl_evaluates_on_the_test_split(tmp_path: Path) -> None:
    text = "model_name_or_path: org/model\ndataset_name: org/pairs\n"
    assert of(tmp_path, text + "eval_strategy: steps\n").config["eval_dataset"] == "org/pairs:test"
    assert "eval_dataset" not in of(tmp_path, text + "eval_strategy: false\n").config
    local = text.replace("org/pairs", "pairs.jsonl") + "eval_strategy: steps\n"
    assert "eval_dataset" not in of(tmp_path, local).config
    named = of(tmp_path, text + "eval_strategy: epoch\ndataset_train_split: train_prefs\ndataset_test_split: test_prefs\n")
    assert (named.config["dataset"], named.config["eval_dataset"]) == ("org/pairs:train_prefs", "org/pairs:test_prefs")
    assert "eval_dataset" not in of(tmp_path, text).config
    assert "dataset_test_split" in left_out(of(tmp_path, text + "dataset_test_split: test_prefs\n"))


def test_the_command_of_a_script(tmp_path: Path) -> None:
    found = of(tmp_path, SWIFT, "train.sh")
    assert found.config["target_modules"] == ["q_proj", "v_proj"] and found.config["learning_rate"] == 2e-5
    assert found.config["dataset"] == "org/pairs" and "dataset (#1000)" in left_out(found)
    assert (found.config["loss_type"], found.config["loss_weights"]) == (["sigmoid", "sft"], [1, 0.1])
    assert "gradient_accumulation_steps" not in found.config  # and not its default in ms-swift either
    assert [problem.code for problem in found.problems] == ["import-computed"]


def test_a_script_with_a_config_and_arguments(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("model_name_or_path: org/model\ndataset_name: org/pairs\nbeta: 0.1\n", encoding="utf-8")
    found = of(tmp_path, "cd x; trl kto --config base.yaml --beta 0.5 --use_peft --lora-r=8; echo --done\n", "train.sh")
    assert (found.config["strategy"], found.config["beta"], found.config["lora_r"]) == ("kto", 0.5, 8)
    assert found.config["dataset"] == "org/pairs"


def test_a_hash_within_a_word_and_variables_of_later_lines(tmp_path: Path) -> None:
    text = "RATE=1e-5\nswift rlhf --model m --dataset org/pairs#10 --learning_rate $RATE --lora_rank 4 # a comment\nRATE=3\n"
    found = of(tmp_path, text, "train.sh")
    assert (found.config["learning_rate"], found.config["lora_r"], found.config["strategy"]) == (1e-5, 4, "dpo")
    assert "dataset (#10)" in left_out(found)


def test_the_method_of_the_config_goes_before_the_default(tmp_path: Path) -> None:
    (tmp_path / "kto.yaml").write_text("rlhf_type: kto\nmodel: m\n", encoding="utf-8")
    assert of(tmp_path, "swift rlhf --config kto.yaml\n", "a.sh").config["strategy"] == "kto"
    kto = of(tmp_path, "megatron rlhf --rlhf_type=kto --model m\n", "a.sh")
    assert kto.config["strategy"] == "kto" and not kto.problems


def test_a_program_with_two_methods_is_refused_and_a_name_that_changes_is_computed(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="2 methods"):
        of(tmp_path, "SFTTrainer(args=SFTConfig(seed=1))\nDPOTrainer(args=DPOConfig(seed=2))\n", "a.py")
    found = of(tmp_path, "x = {[1]: 2}\nlr = 1e-4\nlr *= 2\nDPOConfig(learning_rate=lr, beta=0.2)\n", "a.py")
    assert "learning_rate" in left_out(found) and "learning_rate" not in found.config and found.config["beta"] == 0.2


def test_two_different_commands_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="2 training commands"):
        of(tmp_path, "trl dpo --beta 1\ntrl dpo --beta 2\n", "train.sh")


@pytest.mark.parametrize("is_notebook", [False, True])
def test_a_program_and_a_notebook(tmp_path: Path, is_notebook: bool) -> None:
    cells: list[dict[str, Any]] = [{"cell_type": "markdown", "source": ["# A text"]}]
    cells += [{"cell_type": "code", "source": ["!pip install unsloth\n", *PROGRAM.splitlines(keepends=True)]}]
    cells += [{"cell_type": "code", "source": "%%capture\nanything at all"}, {"cell_type": "code", "source": "if so"}]
    text = json.dumps({"cells": cells}) if is_notebook else PROGRAM
    found = of(tmp_path, text, "train.ipynb" if is_notebook else "train.py")
    assert found.config == {
        "strategy": "dpo", "model_name": "org/model", "dataset": "org/pairs", "output_dir": "out", "seed": 7,
        "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "learning_rate": 1e-6, "beta": 0.3, "lora_r": 8,
        "lora_alpha": 16, "target_modules": ["q_proj"], "use_4bit": True, "max_seq_length": 1024,
    }  # fmt: skip
    gone = left_out(found)
    assert {"bf16", "max_seq_length", 'load_dataset("org/more")'} <= gone.keys() and ("cell 3" in gone) == is_notebook
    assert "is_bfloat16_supported()" in gone["bf16"]


def test_values_of_a_program_that_no_config_has_are_named(tmp_path: Path) -> None:
    found = of(
        tmp_path, "DPOConfig(beta=1e999, lora_r={1, 2}, output_dir=b'x', seed=1j, weird={(1, 2): 3}, bf16=True)\n", "a.py"
    )
    assert left_out(found).keys() >= {"beta", "lora_r", "output_dir", "seed", "weird"} and found.config["bf16"] is True


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("base_model: m\nrl: orpo\n", "rl"),
        ("stage: dpo\npref_loss: simpo\n", "pref_loss"),
        ("stage: dpo\nfinetuning_type: oft\n", "finetuning_type"),
    ],
)
def test_another_method_stops_the_import(tmp_path: Path, text: str, key: str) -> None:
    found = of(tmp_path, text)
    assert [part.key for part in found.of("stops")] == [key]
    assert [problem.code for problem in found.problems] == ["import-method"]


def test_values_that_are_none_here_are_warnings(tmp_path: Path) -> None:
    found = of(tmp_path, 'stage: dpo\nlora_rank: "16"\nlearning_rate: high\nhub_model_id: mine\n')
    assert found.config["lora_r"] == 16 and {"learning_rate", "hub_model_id"}.isdisjoint(found.config)
    assert [(problem.code, problem.key) for problem in found.problems] == [
        ("import-value", "learning_rate"),
        ("import-value", "hub_model_id"),
    ]


def test_keys_that_disagree_are_named(tmp_path: Path) -> None:
    found = of(tmp_path, "stage: dpo\nper_device_train_batch_size: 1\nbatch_size: 2\n")
    assert found.config["per_device_train_batch_size"] == 1
    assert "sets per_device_train_batch_size to 1" in left_out(found)["batch_size"]
    with pytest.raises(InvalidInput, match='two sections set "beta"'):
        of(tmp_path, "beta: 1\ntraining:\n  beta: 2\n")


def test_our_own_config_stays_as_it_is(tmp_path: Path) -> None:
    given = {"strategy": "dpo", "task": "text-generation", "model_name": "org/model", "dataset": "pairs.jsonl", "lora_r": 8}
    assert of(tmp_path, json.dumps(given), "ours.json").config == given


def test_the_defaults_of_trl_are_those_of_the_installed_one() -> None:
    from trl import DPOConfig, ModelConfig

    known = {field.name: field.default for kind in (DPOConfig, ModelConfig) for field in dataclasses.fields(kind)}
    ours = {"max_seq_length": "max_length"}
    assert tools()["TRL"].defaults == {name: known[ours.get(name, name)] for name in tools()["TRL"].defaults}
    assert known["use_peft"] is False


def test_each_tool_is_known_by_its_keys() -> None:
    for tool in tools().values():
        assert tool_of(tool.marks) == (tool if tool.marks else None)
    assert tool_of(["beta"]) is None


@pytest.mark.parametrize("suffix", [".json", ".yaml", ".toml"])
def test_the_written_config_is_valid_and_says_what_changed(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "theirs.yaml").write_text(AXOLOTL, encoding="utf-8")
    done = dpo("import", "theirs.yaml", "--write", f"ours{suffix}", "--json", cwd=tmp_path)
    told = json.loads(done.stdout)
    assert done.returncode == 0 and told["ok"] and told["tool"] == "Axolotl", done.stderr
    loaded = load(str(tmp_path / f"ours{suffix}"))
    assert loaded.config is not None and {key: loaded.values[key] for key in told["config"]} == told["config"]
    text = (tmp_path / f"ours{suffix}").read_text(encoding="utf-8")
    assert "drops the oldest tokens" in text and "not in the file: Axolotl" in text
    again = dpo("import", "theirs.yaml", "--write", f"ours{suffix}", cwd=tmp_path)
    assert again.returncode == 2 and "already exists" in again.stderr


def test_what_is_missing_is_said_in_the_config_and_by_the_exit_code(tmp_path: Path) -> None:
    (tmp_path / "theirs.yaml").write_text(LLAMA_FACTORY, encoding="utf-8")
    done = dpo("import", "theirs.yaml", "--write", "ours.yaml", cwd=tmp_path)
    assert done.returncode == 3 and "import-dataset" in done.stderr and "stops the import: dataset" in done.stdout
    text = (tmp_path / "ours.yaml").read_text(encoding="utf-8")
    assert "# to do: " in text and "# dataset: " in text


@pytest.mark.parametrize(
    ("name", "text", "code"),
    [
        ("no.yaml", None, "config-unreadable"),
        ("text.txt", "only words\n", "import-nothing"),
        ("list.yaml", "- a\n- b\n", "config-type"),
        ("bad.yaml", "rl: dpo\nrl: kto\n", "duplicate-key"),
        ("bad.py", "def (", "import-unreadable"),
        ("bad.ipynb", "{}", "import-unreadable"),
        ("bad.sh", "trl dpo --beta '1\n", "import-unreadable"),
        ("empty.py", "x = 1\n", "import-nothing"),
    ],
)
def test_what_is_no_config_is_refused(tmp_path: Path, name: str, text: str | None, code: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text, encoding="utf-8")
    done = dpo("import", name, "--json", cwd=tmp_path)
    assert done.returncode == 3 and [problem["code"] for problem in json.loads(done.stdout)["problems"]] == [code]

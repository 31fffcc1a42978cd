"""What people write into configs and data that is wrong or worth a word: each with the code, key, line and fix that name it.

As long as there are ways to be wrong. The tests run every case; `make reference` quotes the first of each code in the README.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from bad_rows import FAULTS, GOOD
from gguf_files import write_gguf

from dpo_cli.hardware.machine import Gpu, Machine

CARD = Machine("cpu", 8, 32.0, gpus=(Gpu("RTX 4090", 24.0, 23.5, 8.9),), is_apple=False)
NO_CARD = Machine("cpu", 8, 32.0, gpus=(), is_apple=False)
APPLE = replace(NO_CARD, is_apple=True)
OLD_CARD = Machine("cpu", 8, 32.0, gpus=(Gpu("T4", 16.0, 15.5, 7.5),), is_apple=False)
AMD_CARD = Machine("cpu", 8, 32.0, gpus=(Gpu("RX 7900", 24.0, 23.5, 0.0, "amd"),), is_apple=False)
SMALL_HOST = Machine("cpu", 4, 8.0, gpus=(), is_apple=False)

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
HEAD = {"model_name": MODEL, "dataset": "pairs.jsonl", "eval_split": 0.1}  # lines 2 to 4 of a config
FIRST = 5  # the line on which a case's own text starts


@dataclass(frozen=True)
class Case:
    """`own` stands in a config behind the keys of HEAD that it does not give itself; or `text` is the whole file."""

    code: str
    key: str | None
    own: str
    fix: str  # part of the fix
    line: int | None = FIRST
    severity: str = "error"
    machine: Machine = CARD
    vram_gb: float | None = None
    text: bytes | None = None
    file: str = "config.json"  # that the problem lies in

    @property
    def config(self) -> bytes:
        if self.text is not None:
            return self.text
        head = [f'  "{key}": {json.dumps(value)},' if f'"{key}"' not in self.own else "" for key, value in HEAD.items()]
        return "\n".join(["{", *head, f"  {self.own}", "}"]).encode()


def whole(code: str, text: bytes | str, fix: str, line: int | None = 1, key: str | None = None) -> Case:
    return Case(code, key, "", fix, line, text=text if isinstance(text, bytes) else text.encode())


def warning(code: str, key: str | None, own: str, fix: str, line: int | None = FIRST, machine: Machine = CARD) -> Case:
    return Case(code, key, own, fix, line, "warning", machine)


def hint(code: str, key: str | None, own: str, fix: str, line: int | None = FIRST, **options: object) -> Case:
    return Case(code, key, own, fix, line, "hint", **options)  # type: ignore[arg-type]


def rows(code: str, own: str, fix: str, line: int | None, severity: str = "error") -> Case:
    name = json.loads("{" + own + "}")
    return Case(code, next(iter(name)), own, fix, line, severity, file=next(iter(name.values())))


def on(folder: str, targets: str) -> str:
    return f'"model_name": "models/{folder}",\n  "target_modules": {targets}'


def of_ratings(name: str) -> str:
    return f'"dataset": "data/{name}.jsonl",\n  "strategy": "kto"'


def judged(url: str) -> str:
    return f'"augment": {{"rank": "judge", "judge_model": "m", "judge_url": "{url}"}}'


def rlhf(own: str) -> str:
    return f'"strategy": "rlhf",\n  {own}'


SYNTAX = [
    Case("json-syntax", "use_4bit", '"use_4bit": True', "write true"),
    whole("json-syntax", "", 'write { "dataset"'),
    whole("json-syntax", "{", "close the object"),
    whole("json-syntax", '{"dataset": "pairs.jsonl"', "add the comma or bracket"),
    whole("json-syntax", '{"dataset": "pairs.jsonl", "beta": [1, 2}', "add the comma"),
    whole("json-syntax", '{"dataset": "pairs.jsonl"} {"beta": 1}', "delete it"),
    whole("json-syntax", '{"dataset": "pairs.jsonl",, "beta": 1}', 'write "key": value'),
    whole("json-syntax", '{"dataset" "pairs.jsonl"}', 'write "key": value'),
    whole("json-syntax", '{"dataset": "pairs.jsonl" // a comment\n', "add the comma", 2),
    whole("json-syntax", "model_name: meta-llama/Llama-3.1-8B-Instruct\n", "ends in .yaml"),
    whole("json-syntax", "### model\nstage: dpo\npref_beta: 0.1\n", "ends in .yaml", 2),
    whole("json-syntax", "# TOML\n\n[training]\nbeta = 0.1\n", "ends in .toml", 3),
    whole("json-syntax", "// nothing but a comment\n", 'write { "dataset"', 2),
    whole("config-type", '{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "d"}', "looks like a dataset"),
    Case("json-syntax", "beta", '"beta": .5', "write 0.5"),
    Case("json-syntax", "beta", '"beta": +0.5', "write 0.5"),
    Case("json-syntax", "seed", '"seed": 0x10', "write 16"),
    Case("json-syntax", "seed", '"seed": 1_000', "write 1000"),
    Case("json-syntax", "beta", '"beta": 0.1.2', "a JSON number, for example"),
    Case("json-syntax", "beta", '"beta": 1.5j', "a JSON number, for example"),
    Case("json-syntax", "beta", '"beta": ,\n  "seed": 1', "delete the key"),
    Case("json-syntax", "beta", '"beta":', "delete the key", FIRST + 1),
    Case("json-syntax", "use_4bit", '"use_4bit": False', "write false"),
    Case("json-syntax", "output_dir", '"output_dir": None', "write null"),
    Case("json-syntax", "use_4bit", '"use_4bit": yes', "write true"),
    Case("bad-value", "use_4bit", '"use_4bit": "no"', 'write "use_4bit": false'),
    Case("json-syntax", "output_dir", '"output_dir": undefined', "write null"),
    Case("json-syntax", "task", '"task": text-generation', 'write "text-generation"'),
    Case("json-syntax", "task", "\"task\": 'text-generation'", 'write "text-generation"'),
    Case("json-syntax", None, "beta: 0.1", 'write "beta":'),
    Case("json-syntax", None, "'beta': 0.1", 'write "beta":'),
    Case("json-syntax", None, '"beta": 0.1\n  "seed": 1', "add the comma", FIRST + 1),
    Case("json-syntax", None, '"beta": 0.1;', "add the comma"),
    Case("json-syntax", None, '"beta": 0.1 # the documented one', "a comment starts with //"),
    Case("json-syntax", None, '# the documented one\n  "beta": 0.1', "a comment starts with //"),
    Case("json-syntax", None, "“beta”: 0.1", "straight double quotes"),
    Case("json-syntax", None, '"beta": 0,1', "write a decimal point"),
    Case("json-syntax", None, '"beta" = 0.1', 'write "key": value'),
    Case("json-syntax", None, '"output_dir": "runs/a\n  b"', "close it with a double quote"),
    Case("json-syntax", "output_dir", '"output_dir": "C:\\models"', "write / between the folders"),
    Case("json-syntax", "output_dir", '"output_dir": "a\tb"', "the tab as"),
    Case("json-syntax", None, '"output_dir": r"runs"', "delete the r"),
    Case("json-nan", "beta", '"beta": NaN', "a finite number"),
    Case("json-nan", "learning_rate", '"learning_rate": -Infinity', "a finite number"),
    Case("json-number", "beta", '"beta": 1e999', "a smaller number"),
    Case("json-number", "seed", '"seed": ' + "7" * 5000, "a smaller number"),
    Case("json-surrogate", "output_dir", '"output_dir": "\\ud800"', "the character itself"),
    Case("duplicate-key", "beta", '"beta": 0.1,\n  "beta": 0.5', "keep one", FIRST + 1),
    whole("json-depth", "[" * 100_000, "a config is flat"),
    whole("json-depth", '{"a": ' * 100_000, "a config is flat"),
]

FILES = [
    whole("config-type", "[]", "write {"),
    whole("config-type", "3", "write {"),
    whole("config-type", '[{"prompt": "a", "chosen": "b", "rejected": "c"}]', "looks like a dataset"),
    whole("config-unreadable", b"\xff\xfe{\x00}\x00", "save it as UTF-8", None),
    whole("config-unreadable", b"GGUF" + bytes(20), "name it in a config", None),
    whole("config-unreadable", '{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}', '"model_name": "."', None),
    whole("config-unreadable", "{}".encode("utf-32"), "save it as UTF-8", None),
    whole("config-unreadable", "{}".encode("utf-16-le"), "save it as UTF-8", None),
    whole("config-unreadable", b'{"dataset": "\xff"}', "save it as UTF-8", None),
    whole("config-unreadable", b" " * (1 << 20) + b"{}", "is this the dataset?", None),
    whole("missing-key", "{}", 'add "dataset"', None, "dataset"),
    whole("missing-key", "\ufeff{}", 'add "dataset"', None, "dataset"),
    whole("missing-key", '{"model_name": "' + MODEL + '", // no dataset\n}', 'add "dataset"', None, "dataset"),
    Case("data-in-config", "prompt", '"prompt": "What is the capital of France?"', "into a .jsonl file"),
    Case("data-in-config", "messages", '"messages": []', "into a .jsonl file"),
]

KEYS = [
    Case("unknown-key", "lerning_rate", '"lerning_rate": 5e-7', 'did you mean "learning_rate"?'),
    Case("unknown-key", "Beta", '"Beta": 0.1', 'did you mean "beta"?'),
    Case("unknown-key", "per_device_batch_size", '"per_device_batch_size": 2', 'called "per_device_train_batch_size"'),
    Case("unknown-key", "max_length", '"max_length": 512', 'called "max_seq_length"'),
    Case("unknown-key", "lr", '"lr": 5e-7', 'called "learning_rate"'),
    Case("unknown-key", "load_in_4bit", '"load_in_4bit": true', 'called "use_4bit"'),
    Case("unknown-key", "micro_batch_size", '"micro_batch_size": 2', 'called "per_device_train_batch_size"'),
    Case("unknown-key", "evaluation_strategy", '"evaluation_strategy": "epoch"', "at the end of each epoch"),
    Case("unknown-key", "max_prompt_length", '"max_prompt_length": 512', "together have a limit"),
    Case("unknown-key", "torch_dtype", '"torch_dtype": "bfloat16"', 'write "bf16": true instead'),
    Case("unknown-key", "val_set_size", '"val_set_size": 0.1', 'already sets "eval_split"'),
    Case("unknown-key", "trust_remote_code", '"trust_remote_code": true', "runs no code of a model"),
    Case("unknown-key", "", '"": 1', "remove the key"),
    Case("unknown-key", "learningRate", '"learningRate": 2e-4', 'did you mean "learning_rate"?'),
    Case("unknown-key", "pref_beta", '"pref_beta": 0.5', 'called "beta"'),
    Case("unknown-key", "dpo_beta", '"beta": 0.1, "dpo_beta": 0.5', 'remove the key: this config already sets "beta"'),
    Case("unknown-key", "random_state", '"random_state": 3407', 'called "seed"'),
    Case("unknown-key", "cutoff_len", '"cutoff_len": 4', 'called "max_seq_length", and is an integer from 8'),
    Case("unknown-key", "lora_target", '"lora_target": "all"', 'write "target_modules": "all-linear" instead'),
    Case("unknown-key", "lora_target", '"lora_target": "q_proj,v_proj"', '"target_modules": ["q_proj", "v_proj"] instead'),
    Case("unknown-key", "rpo_alpha", '"rpo_alpha": 0.5', 'write "loss_type": ["sigmoid", "sft"], "loss_weights": [1, 0.5]'),
    Case("unknown-key", "rpo_alpha", '"loss_type": "hinge", "rpo_alpha": 1', 'write "loss_type": ["hinge", "sft"]'),
    Case("unknown-key", "quantization_bit", '"quantization_bit": 8', 'write "use_8bit": true instead'),
    Case("unknown-key", "stage", '"stage": "sft"', 'write "strategy": "sft" instead'),
    Case("unknown-key", "rl", '"rl": "orpo"', "remove the key: the strategy says what is trained"),
    Case("unknown-key", "sync_ref_model", '"sync_ref_model": true', "remove the key: the reference stays the same"),
    Case("unknown-key", "pad_to_sequence_len", '"pad_to_sequence_len": true', "remove the key: shared prompts"),
    Case("unknown-key", "sync_ref_modle", '"sync_ref_modle": true', 'did you mean "sync_ref_model" of other tools?'),
    Case("unknown-key", "adapter_path", '"adapter_path": "me/adapter"', 'write "model_name": "me/adapter" instead'),
    Case("unknown-key", "precompute_ref_log_probs", '"precompute_ref_log_probs": true', "the adapter switched off"),
    Case("unknown-key", "chat_template", '"chat_template": "llama3"', "remove the key: the chat template is the model's own"),
    Case("unknown-key", "use_xbit", '"use_xbit": true', "remove the key; `dpo train --help`"),
]

VALUES = [
    Case("bad-value", "beta", '"beta": -5', 'for example "beta": 0.1'),
    Case("bad-value", "beta", '"beta": 0', 'for example "beta": 0.1'),
    Case("bad-value", "beta", '"beta": "0.1"', "without quotes: 0.1"),
    Case("bad-value", "beta", '"beta": true', 'for example "beta": 0.1'),
    Case("bad-value", "beta", '"beta": null', 'for example "beta": 0.1'),
    Case("bad-value", "beta", '"beta": [0.1]', 'for example "beta": 0.1'),
    Case("bad-value", "beta", '"beta": {"value": 0.1}', 'for example "beta": 0.1'),
    Case("bad-value", "learning_rate", '"learning_rate": 0', 'for example "learning_rate": 5e-07'),
    Case("bad-value", "learning_rate", '"learning_rate": 2', 'for example "learning_rate": 5e-07'),
    Case("bad-value", "learning_rate", '"learning_rate": "5e-7"', "without quotes: 5e-7"),
    Case("bad-value", "num_train_epochs", '"num_train_epochs": true', 'for example "num_train_epochs": 3'),
    Case("bad-value", "num_train_epochs", '"num_train_epochs": 0', 'for example "num_train_epochs": 3'),
    Case("bad-value", "num_train_epochs", '"num_train_epochs": -1', 'for example "num_train_epochs": 3'),
    Case("bad-value", "max_steps", '"max_steps": 0', "-1: without a limit"),
    Case("bad-value", "max_steps", '"max_steps": 10.5', "optimizer steps"),
    Case("bad-value", "per_device_train_batch_size", '"per_device_train_batch_size": 0', "for example"),
    Case("bad-value", "per_device_train_batch_size", '"per_device_train_batch_size": "auto"', "for example"),
    Case("bad-value", "gradient_accumulation_steps", '"gradient_accumulation_steps": 1.5', "for example"),
    Case("bad-value", "lora_r", '"lora_r": "16"', "without quotes: 16"),
    Case("bad-value", "lora_r", '"lora_r": -1', 'for example "lora_r": 16'),
    Case("bad-value", "lora_r", '"lora_r": 4096', 'for example "lora_r": 16'),
    Case("bad-value", "lora_alpha", '"lora_alpha": 0', "2 x lora_r"),
    Case("bad-value", "lora_dropout", '"lora_dropout": 1', "Dropout on the adapter"),
    Case("bad-value", "lora_dropout", '"lora_dropout": -0.1', "Dropout on the adapter"),
    Case("bad-value", "columns", '"columns": {"question": "prompt"}', "The columns of prompt, chosen and rejected"),
    Case("bad-value", "quality", '"quality": {\n    "few_pairs": "many"\n  }', "The limits of the findings", FIRST + 1),
    Case("bad-value", "augment", '"augment": {"rank": "best"}', "How `dpo augment` makes pairs"),
    Case("bad-value", "augment", '"augment": {"api_key": "secret"}', "How `dpo augment` makes pairs"),
    Case("bad-value", "dataset", '"dataset": [{"path": "pairs.jsonl", "wait": 2}]', "weight 0.5"),
    Case("bad-value", "use_4bit", '"use_4bit": "True"', 'write "use_4bit": true'),
    Case("bad-value", "$schema", '"$schema": 3', "Where an editor finds"),
    Case("bad-value", "target_modules", '"target_modules": []', "a list of names"),
    Case("bad-value", "target_modules", '"target_modules": [\n    "q_proj",\n    3\n  ]', "a list of names", FIRST + 2),
    Case("bad-value", "loss_type", '"loss_type": "sigmod"', 'did you mean "loss_type": "sigmoid"'),
    Case("bad-value", "loss_type", '"loss_type": ["sigmoid", "sftt"]', "a list of losses"),
    Case("bad-value", "use_4bit", '"use_4bit": "true"', "without quotes: true"),
    Case("bad-value", "use_4bit", '"use_4bit": 1', "in 4 bits"),
    Case("bad-value", "bf16", '"bf16": "bf16"', "Default: on a GPU, if it supports it"),
    Case("bad-value", "strategy", '"strategy": "DPO"', 'did you mean "strategy": "dpo"?'),
    Case("bad-value", "strategy", '"strategy": "ppo"', 'for example "strategy": "dpo"'),
    Case("bad-value", "strategy", '"strategy": null', 'for example "strategy": "dpo"'),
    Case("bad-value", "provider", '"provider": "hugging-face"', 'did you mean "provider": "huggingface"?'),
    Case("bad-value", "provider", '"provider": "mlx"', 'for example "provider": "huggingface"'),
    Case("bad-value", "task", '"task": "summarization"', "Other tasks are text generation too"),
    Case("bad-value", "compute_specs", '"compute_specs": "midrange"', 'did you mean "compute_specs": "mid_range"?'),
    Case("bad-value", "compute_specs", '"compute_specs": "high-end"', 'did you mean "compute_specs": "high_end"?'),
    Case("bad-value", "loss_type", '"loss_type": "simpo"', 'for example "loss_type": "sigmoid"'),
    Case("bad-value", "label_smoothing", '"label_smoothing": 0.5', "flipped labels"),
    Case("bad-value", "label_smoothing", '"label_smoothing": -0.1', "flipped labels"),
    Case("bad-value", "optim", '"optim": "adamw"', 'did you mean "optim": "adamw_torch_fused"?'),
    Case("bad-value", "lr_scheduler_type", '"lr_scheduler_type": "cosin"', 'did you mean "lr_scheduler_type": "cosine"?'),
    Case("bad-value", "warmup_ratio", '"warmup_ratio": 10', "Share of the steps"),
    Case("bad-value", "warmup_steps", '"warmup_steps": -1', "instead of warmup_ratio"),
    Case("bad-value", "max_seq_length", '"max_seq_length": 0', 'for example "max_seq_length": 1024'),
    Case("bad-value", "max_seq_length", '"max_seq_length": -2', 'for example "max_seq_length": 1024'),
    Case("bad-value", "eval_split", '"eval_split": 1', "Share of the prompts"),
    Case("bad-value", "eval_split", '"eval_split": "10%"', "Share of the prompts"),
    Case("bad-value", "seed", '"seed": -1', 'for example "seed": 42'),
    Case("bad-value", "seed", '"seed": 4294967296', 'for example "seed": 42'),
    Case("bad-value", "device", '"device": "gpu"', 'write "device": "cuda"'),
    Case("bad-value", "device", '"device": "cuda:0"', 'write "device": "cuda"'),
    Case("bad-value", "warmup_steps", '"warmup_steps": 0.1', 'write "warmup_ratio": 0.1 instead'),
    Case("bad-value", "task", '"task": "ipo"', 'write "strategy": "dpo", "loss_type": "ipo" instead'),
    Case("bad-value", "optim", '"optim": "paged_lion_8bit"', 'for example "optim": "adamw_torch_fused"'),
    Case("bad-value", "loss_type", '"loss_type": "kto_pair"', 'for example "loss_type": "sigmoid"'),
    Case("bad-value", "gradient_checkpointing", '"gradient_checkpointing": "unsloth"', '"gradient_checkpointing": true'),
    Case("bad-value", "bf16", '"bf16": "auto"', 'write "bf16": null'),
    Case("bad-value", "report_to", '"report_to": "wandb,tensorboard"', 'write "report_to": ["wandb", "tensorboard"]'),
    Case("bad-value", "gradient_checkpointing", '"gradient_checkpointing": "yes"', 'write "gradient_checkpointing": true'),
    Case("bad-value", "bnb_4bit_quant_type", '"bnb_4bit_quant_type": "int4"', 'for example "bnb_4bit_quant_type": "nf4"'),
    Case("bad-value", "bnb_4bit_compute_dtype", '"bnb_4bit_compute_dtype": "bf16"', '"bfloat16"'),
    Case("bad-value", "hub_model_id", '"hub_model_id": "my-adapter"', "owner/name"),
    Case("hub-id-missing", "push_to_hub", '"push_to_hub": true', '"hub_model_id": "me/my-adapter"'),
    Case("bad-value", "model_name", '"model_name": ""', "a hub id, a model directory"),
    Case("bad-value", "model_name", '"model_name": 7', "a hub id, a model directory"),
    Case("bad-value", "dataset", '"dataset": {"path": "pairs.jsonl"}', "Preference pairs"),
    Case("bad-value", "output_dir", '"output_dir": ""', "run directory"),
]

RULES = [
    Case("two-precisions", "fp16", '"bf16": true,\n  "fp16": true', "keep one", FIRST + 1),
    Case("two-quantisations", "use_8bit", '"use_4bit": true,\n  "use_8bit": true', "keep one", FIRST + 1),
    Case("two-warmups", "warmup_ratio", '"warmup_steps": 5,\n  "warmup_ratio": 0.1', "remove one", FIRST + 1),
    Case(
        "rate-below-end",
        "lr_scheduler_type",
        '"learning_rate": 1e-8,\n  "lr_scheduler_type": "polynomial"',
        '"lr_scheduler_type": "linear"',
        FIRST + 1,
    ),
    Case("two-evaluation-sets", "eval_split", '"eval_dataset": "others.jsonl",\n  "eval_split": 0.1', "remove one", FIRST + 1),
    Case("eval-is-train", "eval_dataset", '"eval_split": 0, "eval_dataset": "pairs.jsonl"', '"eval_split": 0.1'),
    Case("lm-head-adapter", "target_modules", '"target_modules": ["q_proj", "lm_head"]', "remove lm_head"),
    Case("all-linear-in-list", "target_modules", '"target_modules": ["all-linear"]', 'write "target_modules": "all-linear"'),
    Case(
        "stages-within", "stages", '"stages": [\n    {"strategy": "sft", "stages": [{}]}\n  ]', "one list of stages", FIRST + 1
    ),
    Case("target-is-name", "target_modules", '"target_modules": "q_proj"', 'write "target_modules": ["q_proj"]'),
    Case("target-is-name", "target_modules", '"target_modules": "q_proj, v_proj"', '["q_proj", "v_proj"]'),
    Case("target-is-name", "target_modules", '"target_modules": "all_linear"', 'write "target_modules": "all-linear"'),
    Case("target-is-name", "target_modules", '"target_modules": "all"', 'write "target_modules": "all-linear"'),
    Case("all-linear-in-list", "target_modules", '"target_modules": ["all"]', 'write "target_modules": "all-linear"'),
    Case("bad-regex", "target_modules", '"target_modules": "(q_proj"', "for example"),
    Case("full-quantised", "use_4bit", '"lora_r": 0,\n  "use_4bit": true', '"lora_r": 16', FIRST + 1),
    warning("no-effect", "lora_dropout", '"lora_r": 0,\n  "lora_dropout": 0.05', "increase lora_r", FIRST + 1),
    Case("loss-weights", "loss_weights", '"loss_type": ["sigmoid", "sft"],\n  "loss_weights": [1]', "one weight", FIRST + 1),
    warning(
        "loss-needs-batch",
        "per_device_train_batch_size",
        '"loss_type": "aot",\n  "per_device_train_batch_size": 1',
        "lower gradient_accumulation_steps",
        FIRST + 1,
    ),
    warning(
        "loss-needs-batch",
        "gradient_accumulation_steps",
        '"loss_type": ["sft", "aot_unpaired"],\n  "gradient_accumulation_steps": 3',
        '"per_device_train_batch_size": 6, "gradient_accumulation_steps": 1',
        FIRST + 1,
    ),
    Case(
        "rate-below-end",
        "lr_scheduler_type",
        '"learning_rate": 1e-7,\n  "lr_scheduler_type": "polynomial"',
        "linear",
        FIRST + 1,
    ),
    Case("label-smoothing-ignored", "label_smoothing", '"label_smoothing": 0.1', '"loss_type": "robust"'),
    Case("label-smoothing-ignored", "label_smoothing", '"loss_type": "ipo",\n  "label_smoothing": 0.1', '"robust"', FIRST + 1),
    Case(
        "divergence-ignored",
        "f_divergence_type",
        '"f_divergence_type": "js_divergence",\n  "loss_type": "bco_pair"',
        '"loss_type": "sigmoid"',
    ),
    Case(
        "weighting-of-pairs",
        "use_weighting",
        '"use_weighting": true,\n  "loss_type": ["sigmoid", "sft"]',
        '"use_weighting": false',
    ),
    hint("stopping-plain-loss", "ld_alpha", '"ld_alpha": 0.5,\n  "early_stopping_patience": 3', "remove ld_alpha"),
    Case("bad-value", "ld_alpha", '"ld_alpha": 1.5', "LD-DPO"),
    Case("value-of-strategy", "loss_type", '"loss_type": "kto"', '"strategy": "kto"'),
    Case("value-of-strategy", "loss_type", '"strategy": "kto",\n  "loss_type": "ipo"', '"loss_type": "kto"', FIRST + 1),
    Case("value-of-strategy", "loss_type", '"strategy": "kto",\n  "loss_type": ["kto"]', '"loss_type": "kto"', FIRST + 1),
    Case(
        "step-of-one",
        "gradient_accumulation_steps",
        '"strategy": "kto",\n  "gradient_accumulation_steps": 1,\n  "per_device_train_batch_size": 1',
        '"gradient_accumulation_steps": 8',
        FIRST + 1,
    ),
    hint(
        "both-weights",
        "desirable_weight",
        '"strategy": "kto",\n  "desirable_weight": 2,\n  "undesirable_weight": 2',
        "keep one of them",
        FIRST + 1,
    ),
    Case("loss-needs-smoothing", "loss_type", '"loss_type": "exo_pair"', '"label_smoothing": 0.001'),
    warning("loss-needs-smoothing", "loss_type", '"loss_type": "robust"', '"label_smoothing": 0.1'),
    Case(
        "save-eval-steps",
        "save_steps",
        '"early_stopping_patience": 3, "eval_steps": 20,\n  "save_steps": 50',
        '"save_steps": 60',
        FIRST + 1,
    ),
    Case("qlora-without-4bit", "use_4bit", '"strategy": "qlora",\n  "use_4bit": false', '"use_4bit": true', FIRST + 1),
    Case("output-is-input", "output_dir", '"output_dir": "pairs.jsonl"', "runs/my-run"),
    Case("path-too-long", "output_dir", '"output_dir": "runs/' + 256 * "x" + '"', "write a shorter path"),
    Case("path-control-character", "dataset", '"dataset": "C:\\temp\\new.jsonl"', "write / or"),
    Case("default-model", "model_name", "", "your model", None, "warning", text=b'{"dataset": "pairs.jsonl"}'),
    warning("no-effect", "warmup_ratio", '"warmup_ratio": 0.1,\n  "lr_scheduler_type": "constant"', '"constant_with_warmup"'),
    warning("no-effect", "bnb_4bit_quant_type", '"bnb_4bit_quant_type": "fp4"', '"use_4bit": true'),
    warning("no-effect", "use_nested_quant", '"use_nested_quant": false', '"use_4bit": true'),
    warning("no-effect", "hub_model_id", '"hub_model_id": "me/mine"', '"push_to_hub": true'),
    warning("other-strategy", "packing", '"packing": true', "remove the key"),
    hint("weights-below-one", "dataset", '"dataset": [{"path": "pairs.jsonl", "weight": 0.5}]', "write 1"),
    warning("nothing-to-evaluate", "eval_steps", '"eval_split": 0,\n  "eval_steps": 5', '"eval_split"', FIRST + 1),
    warning("nothing-to-evaluate", "split_seed", '"eval_split": 0,\n  "split_seed": 5', '"eval_split"', FIRST + 1),
    warning(
        "no-effect",
        "eval_dataset",
        '"eval_split": 0,\n  "eval_dataset": [{"path": "data/few.jsonl", "weight": 2}]',
        "remove the weight",
        FIRST + 1,
    ),
    warning(
        "two-compute-dtypes",
        "bnb_4bit_compute_dtype",
        '"use_4bit": true, "bf16": true,\n  "bnb_4bit_compute_dtype": "float16"',
        '"bfloat16"',
        FIRST + 1,
    ),
    Case("columns-disagree", "columns", '"columns": {"responses": ["a", "b"], "chosen": "label"}', '"preferred"'),
    Case("columns-disagree", "columns", '"columns": {"responses": ["a", "b"], "scores": "score"}', "for each response"),
    Case("columns-disagree", "columns", '"columns": {"responses": ["a", "b"], "labels": [1, 2, 3, 4]}', "in their order"),
    Case("rank-incomplete", "augment", '"augment": {"rank": "regex"}', 'add "pattern"'),
    Case("rank-incomplete", "augment", '"augment": {"rank": "reward", "reward_model": null}', 'add "reward_model"'),
    Case("answers-url", "augment", '"augment": {"answers_model": "m", "answers_url": "h:8000"}', '"http://localhost:8000/v1"'),
    Case("answers-model", "augment", '"augment": {"rank": "shorter", "answers_model": "m"}', 'add "answers_url"'),
    Case("answers-model", "augment", '"augment": {"rank": "shorter", "answers_url": "http://h/v1"}', 'add "answers_model"'),
    Case("rank-incomplete", "augment", '"augment": {"rank": "judge", "judge_model": "m"}', 'add "judge_url"'),
    Case("rank-missing", "rounds", '"rounds": 2', '"augment": {"rank": "shorter"}'),
    Case(
        "rounds-served",
        "augment",
        '"rounds": 2,\n  "augment": {"rank": "longer", "answers_url": "http://h/v1", "answers_model": "m"}',
        '"answers_url": null',
        FIRST + 1,
    ),
    Case("reference-first", "reference", '"lora_r": 0, "reference": "first"', 'remove "reference"'),
    Case("bad-regex", "augment", '"augment": {"rank": "regex", "pattern": "("}', "a regular expression"),
    Case("judge-url", "augment", judged("https://me:secret@host/v1"), "OPENAI_API_KEY"),
    Case("judge-url", "augment", judged("https://host/v1?key=secret"), "OPENAI_API_KEY"),
    Case("judge-url", "augment", judged("host:8000/v1"), '"http://localhost:8000/v1"'),
    Case("too-few-responses", "augment", '"augment": {"responses": 3, "pairs_per_prompt": 4}', 'raise "responses"'),
    Case("augment-too-long", "augment", '"max_seq_length": 256,\n  "augment": {}', 'raise "max_seq_length"', FIRST + 1),
    warning("no-effect", "augment", '"augment": {"rank": "shorter", "pattern": "yes"}', 'write "rank": "regex"'),
    warning("not-yet", "revision", '"revision": "v1"', '"revision": null'),
    Case("one-process", "num_processes", '"num_processes": 2, "provider": "unsloth"', '"provider": "huggingface"'),
    Case("one-process", "num_processes", '"num_processes": 2, "loss_type": "aot"', '"loss_type": "sigmoid"'),
    Case(
        "one-process",
        "num_processes",
        '"num_processes": "auto", "rounds": 2, "augment": {"rank": "shorter"}',
        '"rounds": null',
    ),
    Case("not-divided", "fsdp", '"num_processes": 2, "fsdp": true, "lora_r": 0', '"lora_r": 16'),
    Case("not-divided", "fsdp", '"num_processes": 2, "cpu_offload": true, "fsdp": false', 'remove "fsdp"'),
    Case("not-divided", "cpu_offload", '"cpu_offload": true, "use_8bit": true', '"use_8bit": false'),
    Case("not-divided", "cpu_offload", '"cpu_offload": true, "use_dora": true', '"use_dora": false'),
    Case("not-divided", "cpu_offload", '"cpu_offload": true, "modules_to_save": ["lm_head"]', '"modules_to_save": null'),
    Case("not-divided", "cpu_offload", '"cpu_offload": true, "provider": "unsloth"', '"provider": "huggingface"'),
    Case(
        "offloaded-weights",
        "activation_offloading",
        '"cpu_offload": true, "activation_offloading": true',
        '"gradient_checkpointing": true',
    ),
    Case("unknown-key", "context_parallel_size", '"context_parallel_size": 2', "attention mask"),
    warning("idle-processes", "num_processes", '"num_processes": 64, "gradient_accumulation_steps": 4', '"num_processes": 8'),
    Case("bad-value", "num_processes", '"num_processes": "all"', "one for each visible GPU"),
    Case("reward-missing", "reward_model", '"stages": [{"strategy": "rlhf"}]', '"reward_functions": ["shorter"]', None),
    Case("reward-model-missing", "reward_model", rlhf('"reward_model": "nowhere"'), "may remove the key", FIRST + 1),
    Case("not-a-reward-model", "reward_model", rlhf('"reward_model": "models"'), "may remove the key", FIRST + 1),
    Case("rank-incomplete", "reward_functions", rlhf('"reward_functions": ["regex"]'), 'add "pattern"', FIRST + 1),
    Case("bad-value", "reward_functions", rlhf('"reward_functions": ["best"]'), "Rules that score", FIRST + 1),
    Case("broken-group", "num_generations", rlhf('"num_generations": 3, "reward_functions": ["shorter"]'), ": 6", FIRST + 1),
    Case(
        "samples-too-long",
        "max_new_tokens",
        rlhf('"max_new_tokens": 2048, "reward_functions": ["shorter"]'),
        "max_seq_length",
        FIRST + 1,
    ),
    Case("bad-value", "compare", '"compare": {"methods": []}', "What `dpo compare` trains"),
    Case("bad-value", "compare", '"compare": {"methods": [{"strategy": "dpo"}]}', "What `dpo compare` trains"),
    Case("bad-value", "compare", '"compare": {"methods": [{"name": "../dpo"}]}', "What `dpo compare` trains"),
    Case("method-name", "compare", '"compare": {"methods": ["dpo", {"name": "DPO"}]}', "another name"),
    Case("method-own-key", "compare", '"compare": {"methods": [{"name": "m", "eval_dataset": "d"}]}', '"eval_dataset" next to'),
    Case("method-own-key", "compare", '"compare": {"methods": [{"name": "m", "stages": [{"seed": 1}]}]}', 'remove "seed"'),
    Case("method-rounds", "compare", '"compare": {"methods": [{"name": "m", "rounds": 2}]}', 'remove "rounds"'),
    Case("budget-missing", "compare", '"compare": {"budget": "seconds"}', 'add "budget_value": 600'),
]

GUIDANCE = [
    hint("learning-rate-small", "learning_rate", '"learning_rate": 5e-7', '"learning_rate": 0.0002'),
    hint("learning-rate-small", "learning_rate", '"lora_r": 16', '"learning_rate": 0.0002', None),
    hint("learning-rate-small", "learning_rate", '"learning_rate": 1e-9', '"learning_rate": 0.0002'),
    hint("learning-rate-small", "learning_rate", '"learning_rate": 5e-6', '"learning_rate": 0.0002'),
    hint(
        "learning-rate-sft",
        "learning_rate",
        '"strategy": "sft",\n  "learning_rate": 5e-7',
        '"learning_rate": 0.0002',
        FIRST + 1,
    ),
    warning("learning-rate-high", "learning_rate", '"learning_rate": 0.5', '"learning_rate": 0.0002'),
    hint("beta", "beta", '"beta": 0.4', "0.1 a weak preference signal, 0.5 balanced"),
    hint("epochs", "num_train_epochs", '"num_train_epochs": 9', "overfit"),
    hint("epochs-ignored", "num_train_epochs", '"max_steps": 10,\n  "num_train_epochs": 3', "remove one", FIRST + 1),
    warning("learning-rate-full", "learning_rate", '"lora_r": 0,\n  "learning_rate": 1e-4', "5e-7", FIRST + 1),
    hint("lora-rank", "lora_r", '"lora_r": 8', "more memory"),
    hint("lora-alpha", "lora_alpha", '"lora_r": 16, "lora_alpha": 8', '"lora_alpha": 32'),
    hint("lora-dropout", "lora_dropout", '"lora_dropout": 0.3', '"lora_dropout": 0.05'),
    hint("max-kl", "max_kl", '"max_kl": 50', '"max_kl": 10'),
    hint("nothing-to-judge", "eval_split", '"eval_split": 0', '"eval_split": 0.1'),
    hint("above-profile", "lora_r", '"compute_specs": "mid_range",\n  "lora_r": 64', '"lora_r": 16', FIRST + 1),
    hint("qlora", "strategy", '"strategy": "qlora"', '"strategy": "sft", "use_4bit": true'),
]

MODELS = [
    Case("model-missing", "model_name", '"model_name": "/no/such/model"', "check the path"),
    Case("model-missing", "model_name", '"model_name": "models/gone.gguf"', "check the path"),
    Case("model-missing", "model_name", '"model_name": "https://hub.example/owner/model"', '"owner/model"'),
    Case("model-missing", "model_name", '"model_name": "C:\\\\models\\\\llama"', "owner/model"),
    Case("model-missing", "model_name", '"model_name": "owner/ model"', "a hub id is owner/model"),
    Case("model-not-gguf", "model_name", '"model_name": "/dev/null"', "name a GGUF file"),
    warning("model-repacked", "model_name", '"model_name": "owner/Model-7B-Instruct-AWQ"', "it was converted from"),
    warning("model-not-here", "model_name", '"model_name": "llama"', "owner/model"),
    warning("model-not-here", "model_name", '"model_name": "models/gone"', "owner/model"),
    Case("adapter-unusable", "model_name", '"model_name": "models/adapter"', "a complete adapter"),
    Case("adapter-unusable", "model_name", '"model_name": "models/run"', "a finished run"),
    Case("adapter-unusable", "model_name", '"model_name": "models/lora-on-itself"', "a complete adapter"),
    Case("adapter-unusable", "model_name", '"model_name": "models/lora-of-text"', "the value that it was trained with"),
    Case("model-missing", "model_name", '"model_name": "models/lora-on-nothing"', "check the path"),
    Case("reference-adapter", "reference", '"reference": "adapter"', "name a run or an adapter"),
    Case("reference-first", "reference", '"reference": "first"', "or name such a dpo run"),
    Case(
        "reference-adapter",
        "reference",
        '"model_name": "models/lora",\n  "lora_r": 64,\n  "reference": "adapter"',
        '"reference": "base"',
        FIRST + 2,
    ),
    Case("model-incomplete", "model_name", '"model_name": "models/empty"', "a complete model directory"),
    Case("model-incomplete", "model_name", '"model_name": "models/typeless"', "copy the config.json"),
    Case("model-damaged", "model_name", '"model_name": "models/damaged"', "download it again"),
    Case("model-damaged", "model_name", '"model_name": "models/cut.gguf"', "download it again"),
    Case("model-not-gguf", "model_name", '"model_name": "pairs.jsonl"', "name a GGUF file"),
    Case("model-not-causal", "model_name", '"model_name": "models/bert"', "an instruct model"),
    Case("model-no-classifier", "model_name", '"model_name": "models/falcon", "strategy": "reward"', "of another family"),
    Case("model-no-weights", "model_name", '"model_name": "models/pickled"', "save_pretrained"),
    Case("model-no-tokenizer", "model_name", '"model_name": "models/mute"', "tokenizer.json"),
    Case("model-code", "model_name", '"model_name": "models/own-code"', "no option changes that"),
    Case("model-tensors", "model_name", '"model_name": "models/lacking"', "copy it whole"),
    Case("model-tensors", "model_name", '"model_name": "models/cut-off"', "copy it whole"),
    Case("model-tensors", "model_name", '"model_name": "models/pointer"', "git lfs pull"),
    Case("tokenizer-no-eos", "model_name", '"model_name": "models/endless"', '"eos_token"'),
    Case("model-quantised", "model_name", '"model_name": "models/gptq"', "the model that it was quantised from"),
    Case("quantised-already", "use_8bit", '"model_name": "models/4bit",\n  "use_8bit": true', "remove use_8bit", FIRST + 1),
    Case("tokens-outside", "model_name", '"model_name": "models/padded"', "another pad_token"),
    hint("generation-config", "model_name", '"model_name": "models/greedy"', "omitted when the model is saved"),
    Case("adapter-on-head", "model_name", '"model_name": "models/lora-on-head"', '"reference": "base"'),
    Case(
        "adapter-unmergeable",
        "model_name",
        '"model_name": "models/lora-with-bias",\n  "reference": "base"',
        'remove "reference"',
    ),
    hint("model-code-unused", "model_name", '"model_name": "models/phi"', "no change is needed"),
    hint("model-name-near", "model_name", '"model_name": "meta-llama/Llama-3.1-8b-Instruct"', "Llama-3.1-8B-Instruct"),
    hint("start-with-sft", "model_name", '"model_name": "meta-llama/Llama-3.1-8B"', '"strategy": "sft"'),
]

HARDWARE = [
    Case("does-not-fit", None, '"model_name": "meta-llama/Llama-3.1-8B-Instruct"', '"use_4bit": true', None, vram_gb=16),
    warning("fp16-device", "fp16", '"fp16": true', '"bf16": true instead', machine=NO_CARD),
    warning("bf16-device", "bf16", '"bf16": true', "fp16 is used", machine=OLD_CARD),
    warning("optim-device", "optim", '"device": "mps", "optim": "adamw_8bit"', 'remove "optim"', machine=APPLE),
    warning("device-missing", "device", '"device": "cuda"', "--vram", machine=NO_CARD),
    warning("device-missing", "device", '"device": "mps"', "--vram", machine=NO_CARD),
    warning("unsloth-without-cuda", "provider", '"provider": "unsloth"', '"provider": "huggingface"', machine=NO_CARD),
    warning("unsloth-without-cuda", "provider", '"provider": "unsloth", "seed": 1', "dpo-cli[unsloth]", machine=AMD_CARD),
    warning("unsloth-not-installed", "provider", '"provider": "unsloth", "seed": 2', "pip install 'dpo-cli[unsloth]'"),
    warning("unsloth-on-cpu", "provider", '"provider": "unsloth", "device": "cpu"', '"provider": "huggingface"'),
    Case("not-with-unsloth", "prompt_sharing", '"prompt_sharing": true, "provider": "unsloth"', '"auto"'),
    Case("not-with-unsloth", "lora_r", '"lora_r": 0, "provider": "unsloth"', '"lora_r": 16'),
    Case("not-a-reward-model", "lora_r", '"lora_r": 0, "strategy": "reward"', '"lora_r": 16'),
    Case("not-a-reward-model", "provider", '"provider": "unsloth", "strategy": "reward"', '"provider": "huggingface"'),
    Case("not-with-unsloth", "use_8bit", '"use_8bit": true, "provider": "unsloth"', '"provider": "huggingface"'),
    warning("beyond-context", "max_seq_length", '"model_name": "google/gemma-2-2b-it", "max_seq_length": 16384', ": 8192"),
    warning("no-such-layer", "target_modules", '"target_modules": ["q_porj"]', "q_proj"),
    warning(
        "no-such-layer", "target_modules", '"target_modules": ".*\\\\.q_porj"', "whole names like model.layers.0.self_attn"
    ),
    Case("no-such-layer", "target_modules", on("llama", '["q_porj"]'), "q_proj", FIRST + 1),
    warning("no-such-layer", "target_modules", on("llama", '".*\\\\.(q_proj|nope)"'), "q_proj", FIRST + 1),
    Case("target-not-linear", "target_modules", on("llama", '".*\\\\.self_attn"'), "whole names like", FIRST + 1),
    Case("target-not-linear", "target_modules", on("llama", '".*norm"'), "its layers are q_proj", FIRST + 1),
    Case("state-space-target", "target_modules", on("falcon", '["in_proj", "out_proj"]'), '"all-linear"', FIRST + 1),
    Case(
        "fused-target", "target_modules", on("experts", '["q_proj", "up_proj"]'), "name all of gate_proj and up_proj", FIRST + 1
    ),
    Case("adapter-on-experts", "lora_dropout", on("experts", '"all-linear"') + ', "lora_dropout": 0.1', '": 0, or', FIRST + 1),
    Case("adapter-on-experts", "use_dora", on("experts", '["down_proj"]') + ', "use_dora": true', '": false, or', FIRST + 1),
    hint("router-unbalanced", "lora_r", '"model_name": "models/experts",\n  "lora_r": 0', '"lora_r": 16', FIRST + 1),
    warning("host-memory", "model_name", '"model_name": "models/large.gguf", "use_4bit": true', "safetensors"),
    replace(warning("memory-unknown", "model_name", '"model_name": "me/mine"', "hf download"), vram_gb=12.0),
    hint("small-card", "use_4bit", '"use_4bit": false', "dpo recommend --vram 8", vram_gb=8),
    hint("small-memory", None, '"seed": 1', "close other programs", None, machine=SMALL_HOST),
]

DATA = [
    Case("dataset-missing", "dataset", '"dataset": "gone.jsonl"', 'check the path in "dataset"'),
    Case("dataset-missing", "dataset", '"dataset": "Pairs.jsonl"', "did you mean pairs.jsonl?"),
    Case(
        "dataset-missing", "eval_dataset", '"eval_split": 0, "eval_dataset": "gone.jsonl"', 'check the path in "eval_dataset"'
    ),
    Case("dataset-format", "dataset", '"dataset": "data/pairs.txt"', "use a .jsonl file"),
    Case("dataset-unreadable", "dataset", '"dataset": "data/folder.jsonl"', "a readable file"),
    Case("dataset-utf16", "dataset", '"dataset": "data/utf16.jsonl"', "UTF-8"),
    rows("dataset-empty", '"dataset": "data/empty.jsonl"', "add pairs", None),
    rows("dataset-not-list", '"dataset": "data/object.json"', "between [ and ]", 1),
    warning("dataset-on-hub", "dataset", '"dataset": "trl-lib/ultrafeedback_binarized"', "hf download"),
    Case("dataset-pointer", "dataset", '"dataset": "data/pointer.jsonl"', "git lfs pull"),
    Case("dataset-packed", "dataset", '"dataset": "data/pairs.jsonl.zst"', "zstd -d < data/pairs.jsonl.zst > data/pairs.jsonl"),
    Case("dataset-arrow", "dataset", '"dataset": "data/saved"', "load_from_disk(sys.argv[1]).to_parquet"),
    Case("dataset-arrow", "dataset", '"dataset": "data/data-00000-of-00001.arrow"', "Dataset.from_file"),
    Case("dataset-split", "dataset", '"dataset": "data/splits"', "data/splits:SPLIT"),
    Case("dataset-split", "dataset", '"dataset": "data/splits:valid"', "train_prefs, train_sft"),
    hint("folder-files", "dataset", '"dataset": "data/folder"', "FOLDER:SPLIT"),
    Case("dataset-damaged", "dataset", '"dataset": "data/text.parquet"', "create it again"),
    *(rows(fault.code, f'"dataset": "{fault.file}"', fault.fix, fault.line, fault.severity) for fault in FAULTS),
    rows("column-unread", '"dataset": "data/unread.jsonl"', "put its text into the prompt", 1, "warning"),
    rows("media-unread", '"dataset": "data/images.jsonl"', "describe them in the prompt", 1, "warning"),
    rows("media-marker", '"dataset": "data/marked.jsonl"', "in the prompt", 1, "warning"),
    rows("scores-contradict", '"dataset": "data/scores.jsonl"', "swap the two responses", 1, "warning"),
    rows("scores-tie", '"dataset": "data/scores.jsonl", "seed": 1', "delete the row", 2, "warning"),
    rows("label-unwanted", '"dataset": "data/unwanted.jsonl", "strategy": "sft"', "delete the row", 1, "warning"),
    rows("label-suggested", '"dataset": "data/suggested.jsonl"', "answer it in the annotation tool", 1, "warning"),
    rows("null-arguments", '"dataset": "data/null-arguments.jsonl"', "delete them", 1, "hint"),
    rows("rows-read-as", '"dataset": "data/questions.jsonl"', "columns", None, "hint"),
    warning("column-missing", "columns", '"dataset": "pairs.jsonl", "columns": {"system": "sytem"}', "correct the name"),
    rows("too-similar", '"dataset": "data/similar.jsonl"', "clearly worse", 1, "warning"),
    rows("chat-markers", '"dataset": "data/markers.jsonl"', "without the template", 2, "warning"),
    rows("length-decides", '"dataset": "data/longer.jsonl"', "the other length", None, "hint"),
    rows("refusals-on-one-side", '"dataset": "data/refusals.jsonl"', "a refusal is right", None, "hint"),
    rows("mixed-languages", '"dataset": "data/languages.jsonl"', "the right language", 1, "hint"),
    rows("few-pairs", '"dataset": "data/few.jsonl"', "add rows", None, "hint"),
    rows("few-prompts", '"dataset": "data/one-prompt.jsonl"', "other prompts", None, "hint"),
    rows("repeated-pairs", '"dataset": "data/repeated.jsonl"', "keep one of each", 2, "hint"),
    rows("near-duplicates", '"dataset": "data/near.jsonl"', "keep one of each", 2, "hint"),
    Case("one-rating", "dataset", of_ratings("all-good"), "to train on good answers alone, use strategy sft"),
    rows("row-unrated", of_ratings("unrated"), "these rows are skipped", 3, "warning"),
    rows("row-unpaired", '"dataset": "data/unpaired.jsonl"', "these rows are skipped", 3, "warning"),
    rows("repeated-ratings", of_ratings("rated-again"), "keep one of each", 3, "hint"),
    rows("contradicting-ratings", of_ratings("rated-otherwise"), "decide which rating is right", None, "warning"),
    warning(
        "ratings-unbalanced",
        "undesirable_weight",
        of_ratings("unbalanced") + ', "eval_split": 0',
        '"undesirable_weight": ',
        None,
    ),
    rows("reversed-preference", '"dataset": "data/reversed.jsonl"', "delete the other", None, "warning"),
    Case(
        "prompt-in-both",
        "eval_dataset",
        '"eval_split": 0,\n  "eval_dataset": "data/overlap.jsonl"',
        "measure memorisation",
        2,
        "warning",
        file="data/overlap.jsonl",
    ),
    warning(
        "pairs-too-long", "max_seq_length", '"dataset": "data/long.jsonl", "max_seq_length": 64', "increase max_seq_length"
    ),
    Case("never-evaluated", "eval_steps", '"eval_steps": 1000', '"eval_steps": 5', FIRST, "warning"),
    Case("never-warm", "warmup_steps", '"warmup_steps": 1000', '"warmup_ratio": 0.1', FIRST, "warning"),
    Case(
        "never-warm",
        "warmup_steps",
        '"max_steps": 9,\n  "warmup_steps": 9,\n  "lr_scheduler_type": "polynomial"',
        '"warmup_ratio": 0.1',
        FIRST + 1,
    ),
    warning("never-warm", "warmup_ratio", '"max_steps": 2,\n  "warmup_ratio": 0.6', '"warmup_ratio": 0.1', FIRST + 1),
    warning("never-warm", "warmup_ratio", '"max_steps": 1,\n  "warmup_ratio": 0.1', '"warmup_ratio": 0', FIRST + 1),
    warning(
        "never-warm",
        "warmup_steps",
        '"max_steps": 1,\n  "warmup_steps": 1,\n  "lr_scheduler_type": "constant_with_warmup"',
        '"warmup_steps": 0, or train more steps',
        FIRST + 1,
    ),
    Case("nothing-to-train", "dataset", '"dataset": [{"path": "data/few.jsonl", "weight": 0.01}]', "increase the weights"),
    Case("nothing-to-train", "eval_split", '"dataset": "data/few.jsonl", "eval_split": 0.999', "reduce eval_split"),
    Case(
        "nothing-held-out",
        "eval_split",
        '"dataset": "data/few.jsonl", "eval_split": 0.001',
        "increase eval_split",
        FIRST,
        "warning",
    ),
]

CASES = [*SYNTAX, *FILES, *KEYS, *VALUES, *RULES, *GUIDANCE, *MODELS, *HARDWARE, *DATA]


def pair(number: int, chosen: str = "yes", rejected: str = "no") -> bytes:
    return json.dumps({"prompt": f"question {number}", "chosen": chosen, "rejected": rejected}).encode()


def weights(shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    """A safetensors file of zeros in float32."""
    header: dict[str, object] = {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    written = json.dumps(header).encode()
    return struct.pack("<Q", len(written)) + written + bytes(end)


def matrices(layers: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The tensors of a decoder of one block, as wide as SHAPE says, with these layers."""
    within = {f"model.layers.0.{name}.weight": shape for name, shape in layers.items()}
    norms = {"model.norm.weight": (8,), "model.layers.0.input_layernorm.weight": (8,)}
    return {"model.embed_tokens.weight": (9, 8), "lm_head.weight": (9, 8), **norms, **within}


SHAPE = {"hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8, "num_attention_heads": 1, "vocab_size": 9}
ATTENTION = dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"), (8, 8))
LLAMA = matrices(ATTENTION | dict.fromkeys(("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"), (8, 8)))
PHI = {"self_attn.qkv_proj": (24, 8), "self_attn.o_proj": (8, 8), "mlp.gate_up_proj": (16, 8), "mlp.down_proj": (8, 8)}
IN_4BIT = {"quant_method": "bitsandbytes", "load_in_4bit": True}
# Model directories by their names: what config.json holds in addition to SHAPE, and the tensors.
FOLDERS: dict[str, tuple[dict[str, object], Mapping[str, tuple[int, ...]]]] = {
    "llama": ({"model_type": "llama"}, LLAMA),
    "lacking": ({"model_type": "llama"}, {name: shape for name, shape in LLAMA.items() if "down" not in name}),
    "gptq": ({"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": 4}}, LLAMA),
    "4bit": ({"model_type": "llama", "quantization_config": IN_4BIT}, LLAMA),
    "padded": ({"model_type": "llama"}, LLAMA),
    "greedy": ({"model_type": "llama"}, LLAMA),
    "endless": ({"model_type": "llama"}, LLAMA),
    "pointer": ({"model_type": "llama"}, LLAMA),
    "typeless": ({}, LLAMA),
    "cut-off": ({"model_type": "llama"}, LLAMA),
    "falcon": ({"model_type": "falcon_h1"}, {}),
    "experts": ({"model_type": "olmoe", "num_experts": 8}, {}),
}


def rating(number: int, label: bool | None, answer: str = "yes") -> bytes:
    return json.dumps({"prompt": f"question {number}", "completion": f"{answer} {number}", "label": label}).encode()


def lay_out(place: Path) -> None:
    """The files that the cases name."""

    def write(name: str, *lines: bytes) -> None:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(b"\n".join(lines) + b"\n")

    write("pairs.jsonl", *map(pair, range(60)))
    write("others.jsonl", *map(pair, range(60, 100)))
    for fault in FAULTS:
        write(fault.file, *((GOOD, fault.row, GOOD) if fault.content is None else (fault.content,)))
    write("data/pointer.jsonl", b"version https://git-lfs.github.com/spec/v1", b"oid sha256:" + b"0" * 64, b"size 12345")
    write("data/pairs.jsonl.zst", b"\x28\xb5\x2f\xfd")
    write("data/saved/state.json", b"{}")
    write("data/saved/dataset_info.json", b"{}")
    write("data/data-00000-of-00001.arrow", b"")
    for split in ("train_prefs", "train_sft"):
        write(f"data/splits/{split}.jsonl", pair(0))
    for name in ("train.jsonl", "test.jsonl", "notes.txt"):
        write(f"data/folder/{name}", *map(pair, range(60)))
    write("data/unread.jsonl", b'{"prompt": "a", "persona": "a pirate", "chosen": "b", "rejected": "c"}')
    write("data/images.jsonl", b'{"prompt": "a", "images": ["cat.jpg"], "chosen": "b", "rejected": "c"}')
    write("data/marked.jsonl", b'{"prompt": "a", "chosen": "b, as <image> shows", "rejected": "c"}')
    scored = b'{"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 1, "score_rejected": %d}'
    write("data/scores.jsonl", scored % 2, scored % 1)
    write("data/unwanted.jsonl", b'{"prompt": "a", "completion": "b", "label": false}')
    fields = b'{"prompt": "a", "response_a": "b", "response_b": "c"}'
    suggested = b'{"fields": %s, "responses": {}, "suggestions": {"winner": {"value": "response_a", "agent": "judge-1"}}}'
    write("data/suggested.jsonl", suggested % fields)
    call = b'{"function": {"name": "weather", "arguments": "{\\"city\\": null}"}}'
    called = b'{"prompt": "a", "chosen": {"role": "assistant", "tool_calls": [%s]}, "rejected": {"from": "gpt", "value": "b"}}'
    write("data/null-arguments.jsonl", called % call)
    write("data/pairs.txt", pair(0))
    (place / "data" / "folder.jsonl").mkdir()
    (place / "data" / "utf16.jsonl").write_bytes(pair(0).decode().encode("utf-16"))
    write("data/empty.jsonl", b"")
    write("data/object.json", b"{}")
    write("data/few.jsonl", *map(pair, range(3)))
    write("data/one-prompt.jsonl", *(pair(0, f"yes {number}") for number in range(160)))
    write("data/repeated.jsonl", pair(0), pair(0), pair(1))
    story = "Once there was a house by the river in which nobody had lived for as long as anyone could remember."
    write("data/near.jsonl", pair(0, story), pair(0, story.replace("house", "home")), pair(1, story[::-1]))
    write("data/reversed.jsonl", pair(0), pair(0, "no", "yes"), pair(1))
    write("data/text.parquet", b"prompt,chosen,rejected")
    write("data/questions.jsonl", b'{"system": "Be brief.", "question": "q", "chosen": "yes", "rejected": "no"}')
    write(
        "data/similar.jsonl",
        b'{"prompt": "Describe a sunset", "chosen": "The sunset was beautiful.", "rejected": "The sunset was pretty."}',
    )
    write("data/markers.jsonl", pair(0), pair(1, "<|im_start|>assistant\nyes<|im_end|>"))
    write("data/long.jsonl", *(pair(number, "yes " * 200, "no") for number in range(3)))
    write("data/all-good.jsonl", *(rating(number, True) for number in range(3)))
    both = [rating(0, True), rating(1, False)]
    write("data/unrated.jsonl", *both, rating(2, None))
    write("data/unpaired.jsonl", rating(0, True), rating(0, False, "no"), rating(1, False))
    write("data/rated-again.jsonl", *both, rating(0, True))
    write("data/rated-otherwise.jsonl", *both, rating(0, False))
    write("data/unbalanced.jsonl", *(rating(number, number % 7 > 0) for number in range(70)))
    write("data/longer.jsonl", *(pair(number, "yes and yes") for number in range(200)))
    write("data/refusals.jsonl", *(pair(number, "yes", "I'm sorry, I cannot help with that.") for number in range(20)))
    russian = "\u041a\u0430\u043a\u043e\u0439 " * 6
    write(
        "data/languages.jsonl",
        json.dumps({"prompt": russian, "chosen": "Paris is the capital of France.", "rejected": "no"}).encode(),
    )
    write("data/overlap.jsonl", pair(900), pair(7))
    config = json.dumps({**SHAPE, "model_type": "stablelm", "architectures": ["StableLmForCausalLM"]}).encode()
    write("models/adapter/adapter_config.json", b"{}")
    write("models/run/plan.json", b"{}")
    lora = {
        "peft_type": "LORA",
        "r": 16,
        "lora_alpha": 32,
        "target_modules": ["q_proj"],
        "use_dora": False,
        "use_rslora": False,
    }
    for folder, base in (("lora", "owner/Model-Instruct"), ("lora-on-nothing", "/no/model")):
        write(f"models/{folder}/adapter_config.json", json.dumps({**lora, "base_model_name_or_path": base}).encode())
        write(f"models/{folder}/adapter_model.safetensors", b"")
    for folder, own in (("lora-on-itself", {}), ("lora-of-text", {"r": "8"})):
        written = {**lora, "base_model_name_or_path": f"models/{folder}", **own}
        write(f"models/{folder}/adapter_config.json", json.dumps(written).encode())
        write(f"models/{folder}/adapter_model.safetensors", b"")
    on_head = {**lora, "base_model_name_or_path": "owner/Model-Instruct", "target_modules": ["q_proj", "lm_head"]}
    write("models/lora-on-head/adapter_config.json", json.dumps(on_head).encode())
    write("models/lora-on-head/adapter_model.safetensors", b"")
    with_bias = {**lora, "base_model_name_or_path": "models/llama", "lora_bias": True}
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    parts = {f"{layer}.lora_A.weight": (16, 8), f"{layer}.lora_B.weight": (8, 16), f"{layer}.lora_B.bias": (8,)}
    write("models/lora-with-bias/adapter_config.json", json.dumps(with_bias).encode())
    (place / "models/lora-with-bias/adapter_model.safetensors").write_bytes(weights(parts))
    (place / "models" / "empty").mkdir()
    write("models/damaged/config.json", b'{"hidden_size": ')
    write("models/cut.gguf", b"GGUF\x03\x00")
    large = {"embedding_length": 5120, "block_count": 40, "feed_forward_length": 13824, "attention.head_count": 40}
    header = {"general.architecture": "llama", **{f"llama.{key}": value for key, value in large.items()}}
    write_gguf(place / "models/large.gguf", {**header, "tokenizer.chat_template": "", "tokenizer.ggml.tokens": ["a"] * 32_000})
    code = {"auto_map": {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}}
    with_code: dict[str, tuple[dict[str, object], Mapping[str, tuple[int, ...]]]] = {
        "own-code": ({"model_type": "own", **code}, {}),
        "phi": ({"model_type": "phi3", **code}, matrices(PHI)),
    }
    for folder, (settings, shapes) in {**FOLDERS, **with_code}.items():
        write(f"models/{folder}/config.json", json.dumps({**SHAPE, **settings}).encode())
        (place / f"models/{folder}/model.safetensors").write_bytes(weights(shapes))
        write(f"models/{folder}/tokenizer.json", b"{}")
        write(f"models/{folder}/chat_template.jinja", b"")
    (place / "models/cut-off/model.safetensors").write_bytes(weights(LLAMA)[:-100])
    write("models/pointer/model.safetensors", b"version https://git-lfs.github.com/spec/v1", b"oid sha256:0", b"size 12345")
    write("models/endless/tokenizer_config.json", b'{"tokenizer_class": "PreTrainedTokenizerFast"}')
    write("models/padded/tokenizer.json", b'{"added_tokens": [{"id": 9, "content": "<pad>"}]}')
    write("models/padded/tokenizer_config.json", b'{"pad_token": "<pad>"}')
    write("models/greedy/generation_config.json", b'{"do_sample": false, "temperature": 0.6}')
    for folder in ("bert", "mute"):
        (place / f"models/{folder}").mkdir()
        (place / f"models/{folder}/model.safetensors").write_bytes(weights({}))
    write("models/bert/config.json", json.dumps({"architectures": ["BertForMaskedLM"]}).encode())
    for folder in ("mute", "pickled"):
        write(f"models/{folder}/config.json", config)
    write("models/pickled/pytorch_model.bin", b"")
    for folder in ("bert", "pickled"):
        write(f"models/{folder}/tokenizer.json", b"{}")
        write(f"models/{folder}/chat_template.jinja", b"")

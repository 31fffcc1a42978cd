"""A training by plain TRL, as its documentation has it: benchmarks/speed.py runs it in TRL's own virtual environment.

python benchmarks/peers/trl_training.py JOB.json    prints a JSON object: seconds of `train()`, losses, TRL's version

A job may name a `device` (cpu by default) and an `adapter`, the file of its first weights. benchmarks/gpu imports `trainer_of`.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl import DPOConfig, DPOTrainer

DIRECT = (
    "beta",
    "learning_rate",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_steps",
)


def trainer_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    config: dict[str, Any],
    device: str,
    **arguments: Any,
) -> DPOTrainer:
    """TRL's trainer with the values of a config of dpo; `arguments` are those of TRL alone."""
    made = DPOConfig(
        **{name: config[name] for name in DIRECT},
        lr_scheduler_type=config["lr_scheduler_type"],
        warmup_steps=config["warmup_steps"] or config["warmup_ratio"],
        max_length=config["max_seq_length"],
        max_grad_norm=config["max_grad_norm"],
        weight_decay=config["weight_decay"],
        seed=config["seed"],
        bf16=config["bf16"],
        gradient_checkpointing=False,
        use_cpu=device == "cpu",
        dataloader_pin_memory=device == "cuda",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **arguments,
    )
    adapter = LoraConfig(r=config["lora_r"], lora_alpha=config["lora_alpha"], target_modules=config["target_modules"])
    return DPOTrainer(model=model, args=made, train_dataset=rows, processing_class=tokenizer, peft_config=adapter)


def main() -> None:
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    config, device = job["config"], job.get("device", "cpu")
    dtype = torch.bfloat16 if config["bf16"] else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype)
    set_seed(config["seed"])
    started = time.monotonic()  # with precomputed references, which the constructor computes
    rows = load_dataset("json", data_files=job["rows"], split="train")  # a file, whose references TRL keeps in its cache
    options = {"output_dir": job["output_dir"], "precompute_ref_log_probs": job["precompute"]}
    trainer = trainer_of(model, tokenizer, rows, config, device, **options)
    if "adapter" in job:
        set_peft_model_state_dict(trainer.model, load_file(job["adapter"]))
    if not job["precompute"]:
        started = time.monotonic()
    with contextlib.redirect_stdout(sys.stderr):  # TRL prints a line for each step
        trainer.train()
    seconds = time.monotonic() - started
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    print(json.dumps({"seconds": seconds, "losses": losses, "trl": version("trl")}))


if __name__ == "__main__":
    main()

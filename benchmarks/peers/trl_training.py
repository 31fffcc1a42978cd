"""A training by plain TRL, as its documentation has it: benchmarks/speed.py runs it in TRL's own virtual environment.

python benchmarks/peers/trl_training.py JOB.json    prints a JSON object: seconds of `train()`, losses, TRL's version
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
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import DPOConfig, DPOTrainer

DIRECT = (
    "beta",
    "learning_rate",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_steps",
)


def main() -> None:
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    config = job["config"]
    dtype = torch.bfloat16 if config["bf16"] else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype)
    arguments = DPOConfig(
        output_dir=job["output_dir"],
        **{name: config[name] for name in DIRECT},
        precompute_ref_log_probs=job["precompute"],
        lr_scheduler_type=config["lr_scheduler_type"],
        warmup_steps=config["warmup_steps"] or config["warmup_ratio"],
        max_length=config["max_seq_length"],
        max_grad_norm=config["max_grad_norm"],
        weight_decay=config["weight_decay"],
        seed=config["seed"],
        bf16=config["bf16"],
        gradient_checkpointing=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    adapter = LoraConfig(r=config["lora_r"], lora_alpha=config["lora_alpha"], target_modules=config["target_modules"])
    set_seed(config["seed"])
    started = time.monotonic()  # with precomputed references, which the constructor computes
    rows = load_dataset("json", data_files=job["rows"], split="train")  # a file, whose references TRL keeps in its cache
    trainer = DPOTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer, peft_config=adapter)
    if not job["precompute"]:
        started = time.monotonic()
    with contextlib.redirect_stdout(sys.stderr):  # TRL prints a line for each step
        trainer.train()
    seconds = time.monotonic() - started
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    print(json.dumps({"seconds": seconds, "losses": losses, "trl": version("trl")}))


if __name__ == "__main__":
    main()

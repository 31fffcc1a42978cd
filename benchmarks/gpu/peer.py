"""A peer's trainer in a process of its own, for speed.py: a package that patches others at import, or needs other releases.

python benchmarks/gpu/peer.py NAME JOB.json    an answer (JSON, one line) once the package is imported, then one a line of input

The first line of input builds the model and the trainer; each runs the steps of the job. An answer has the `seconds` of each
step and the `loss` of the first, or the `error` that ended the process. Names are those of `PEERS`:

- flash-pref, as its README has it: `FlashDPOTrainer` in place of TRL's. Release 0.1.1 needs transformers 4.49 to 4.51, and
  a TRL of that time. It shares attention too where the package flash-attn is, and else all but attention.
- Unsloth, as its guides have it: `FastLanguageModel.from_pretrained`, `get_peft_model`, and the DPOTrainer that its import puts
  in the place of TRL's. The weights are random like those of all others: it reads the model's folder, and where it would
  load the weights, `AutoModelForCausalLM` builds them on the device.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
Job = dict[str, Any]


def import_flash_pref(job: Job) -> str:
    import flash_pref  # noqa: F401
    from packaging.requirements import Requirement

    for needs in map(Requirement, requires("flash-pref") or []):  # it is imported with others too, and fails later
        if not needs.specifier.contains(version(needs.name)):
            raise ImportError(f"flash-pref {version('flash-pref')} asks for {needs}, and {version(needs.name)} is there")
    attention = "flash-attn" if importlib.util.find_spec("flash_attn") else "sdpa, whose prompts are not shared"
    return f"flash-pref {version('flash-pref')}, TRL {version('trl')}, transformers {version('transformers')}, {attention}"


def flash_pref_trainer(job: Job) -> Any:
    from flash_pref import FlashDPOTrainer
    from peft import LoraConfig
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(Path(job["model"]) / "tokenizer.json"), **job["tokens"])
    tokenizer.chat_template = job["chat_template"]
    attention = "flash_attention_2" if importlib.util.find_spec("flash_attn") else "sdpa"
    model = random_model(job, attn_implementation=attention)
    config = job["config"]
    adapter = LoraConfig(r=config["lora_r"], lora_alpha=config["lora_alpha"], target_modules=config["target_modules"])
    options = {"args": arguments(job), "train_dataset": rows(job), "processing_class": tokenizer, "peft_config": adapter}
    return FlashDPOTrainer(model, None, **options)


def import_unsloth(job: Job) -> str:
    os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"  # else each load of a model is reported to the hub
    os.environ["UNSLOTH_COMPILE_LOCATION"] = str(Path(job["output_dir"]) / "unsloth")
    if job["device"] == "cpu":
        os.environ["UNSLOTH_FORCE_CPU"] = "1"
    import unsloth  # noqa: F401

    return f"Unsloth {version('unsloth')}, TRL {version('trl')}, transformers {version('transformers')}"


def unsloth_trainer(job: Job) -> Any:
    from unittest.mock import patch

    from transformers import AutoModelForCausalLM
    from trl import DPOTrainer
    from unsloth import FastLanguageModel

    config = job["config"]
    with patch.object(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: random_model(job)):
        model, tokenizer = FastLanguageModel.from_pretrained(
            job["model"],
            max_seq_length=config["max_seq_length"],
            dtype=dtype_of(job),
            load_in_4bit=job["bits"] == 4,
            use_gradient_checkpointing=False,
            use_exact_model_name=True,
        )
    options = {"r": config["lora_r"], "lora_alpha": config["lora_alpha"], "lora_dropout": 0.0, "bias": "none"}
    model = FastLanguageModel.get_peft_model(model, **options, use_gradient_checkpointing=False)  # on all linear layers
    trainer = DPOTrainer(model, None, args=arguments(job), train_dataset=rows(job), processing_class=tokenizer)
    if job["device"] == "cpu":  # TRL's own head is a Triton kernel
        from dpo_cli.scoring import forward

        forward.attach(trainer.model.get_base_model(), forward.plain_states, outputs=("log_probs",))
    return trainer


PEERS: dict[str, tuple[Callable[[Job], str], Callable[[Job], Any]]] = {
    "flash-pref": (import_flash_pref, flash_pref_trainer),
    "Unsloth": (import_unsloth, unsloth_trainer),
}


def dtype_of(job: Job) -> Any:
    import torch

    return torch.bfloat16 if job["config"]["bf16"] else torch.float32


def random_model(job: Job, **how: Any) -> Any:
    """Random weights on the device, in 4 bits as benchmarks/step_memory.py has it, which needs a newer transformers."""
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM, LlamaConfig

    with torch.device(job["device"]):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**job["shape"]), torch_dtype=dtype_of(job), **how)
    if job["bits"]:
        import bitsandbytes as bnb

        linear = [(parent, name, child) for parent in model.model.modules() for name, child in parent.named_children()]
        for parent, name, child in linear:
            if isinstance(child, nn.Linear):
                size, kind = (child.in_features, child.out_features), {"compress_statistics": True, "quant_type": "nf4"}
                made = bnb.nn.Linear4bit(*size, bias=False, compute_dtype=dtype_of(job), device="meta", **kind)
                made.weight = bnb.nn.Params4bit(child.weight.data, requires_grad=False, **kind)
                setattr(parent, name, made.to(job["device"]))
        model.is_loaded_in_4bit = True
    return model


def arguments(job: Job) -> Any:
    """The arguments of TRL's trainer; releases before 1.0 cut prompts to 512 tokens unless they are told not to."""
    from dataclasses import fields

    from trl import DPOConfig

    config = job["config"]
    names = ("beta", "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "bf16", "seed")
    longer = {"max_prompt_length": None} if "max_prompt_length" in {field.name for field in fields(DPOConfig)} else {}
    return DPOConfig(
        **{name: config[name] for name in (*names, "max_steps", "max_grad_norm", "weight_decay", "lr_scheduler_type")},
        **longer,
        output_dir=job["output_dir"],
        max_length=config["max_seq_length"],
        gradient_checkpointing=False,
        use_cpu=job["device"] == "cpu",
        dataloader_pin_memory=job["device"] == "cuda",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def rows(job: Job) -> Any:
    from datasets import Dataset

    return Dataset.from_list([json.loads(line) for line in Path(job["rows"]).read_text(encoding="utf-8").splitlines()])


def clock() -> Any:
    """A callback with the seconds of each step, when the device has done it."""
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.steps: list[float] = []

        def now(self) -> float:
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            return time.monotonic()

        def on_step_begin(self, *_: object, **__: object) -> None:
            self.begin = self.now()

        def on_step_end(self, *_: object, **__: object) -> None:
            self.steps.append(self.now() - self.begin)

    return Clock()


def turns(name: str, job: Job, answer: Callable[[dict[str, Any]], None]) -> None:
    """Answer each line of input, until it ends."""
    import_package, build = PEERS[name]
    answer({"versions": import_package(job)})
    trainer = None
    for _ in sys.stdin:
        import torch

        if trainer is None:
            trainer, own = build(job), clock()
            trainer.add_callback(own)
        own.steps.clear()
        trainer.train()
        losses = [float(line["loss"]) for line in trainer.state.log_history if "loss" in line]
        if job["device"] == "cuda":
            torch.cuda.empty_cache()  # the others need it
        answer({"seconds": own.steps, "loss": losses[0]})


def main() -> None:
    sys.path.remove(str(Path(__file__).resolve().parent))  # its modules would hide others of their names
    sys.path.append(str(ROOT))
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what packages print is not an answer

    def answer(values: dict[str, Any]) -> None:
        print(json.dumps(values), file=output, flush=True)

    try:
        turns(sys.argv[1], json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")), answer)
    except Exception as error:  # any other release may fail in any way; the reason becomes a line of the results
        answer({"error": f"{type(error).__name__}: {(str(error) or 'without a message').splitlines()[0]}"})
        raise


if __name__ == "__main__":
    main()

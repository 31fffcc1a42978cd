"""What one training step has alive at its peak, and the memory bill of it: `make memory` on a CPU, gpu/bill.py on a GPU.

Models are made from their configs with random weights, so nothing is downloaded; trainer, head and layout are those of
`dpo train`. Measured is the second micro-batch of a step, when the adapter's gradients are there already, above what was
there before it.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import resource
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler reports every start

import baseline
import torch
from baseline import Column, Table
from peft import LoraConfig
from tokenizers import Tokenizer, models
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from dpo_cli.config.config import load
from dpo_cli.data.encoded import Encoded, EncodedRows
from dpo_cli.data.rows import Pair, question_of
from dpo_cli.hardware.machine import probe
from dpo_cli.hardware.memory import components
from dpo_cli.hardware.memory_inputs import Longest, Settings
from dpo_cli.models.shape import ModelFacts, config_facts
from dpo_cli.plan.decisions import resolve
from dpo_cli.plan.plan import Plan
from dpo_cli.plan.tokenized import SampledPrompt
from dpo_cli.providers.classifier import HEAD, as_classifier
from dpo_cli.providers.eight_bit import use_exact_product
from dpo_cli.providers.sharding import shard
from dpo_cli.scoring import shared_prompts
from dpo_cli.storage.world import ALONE
from dpo_cli.strategies.strategies import STRATEGIES
from dpo_cli.training import dpo_trainer, policy_trainer, reward_trainer, sft_trainer
from dpo_cli.training.trainer import CarefulTrainer, ProbeFirst

TRAINERS: dict[str, Any] = {"dpo": dpo_trainer, "sft": sft_trainer, "reward": reward_trainer, "rlhf": policy_trainer}
DTYPES = {2: torch.bfloat16, 4: torch.float32}


def random_model(config: PreTrainedConfig, settings: Settings, device: str) -> PreTrainedModel:
    """The model of a config with random weights on `device`, in the dtype of the settings, quantised as they say."""
    with torch.device(device):
        dtype = DTYPES[settings.bytes_per_value] if settings.rank else torch.float32  # what is trained is float32
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    if settings.bits:
        quantise(model, settings)
        setattr(model, f"is_loaded_in_{settings.bits}bit", True)
    return model


def quantise(model: PreTrainedModel, settings: Settings) -> None:
    """Replace each linear layer of the blocks by bitsandbytes' own, as transformers does while it loads."""
    import bitsandbytes as bnb

    layers = [(parent, name, child) for parent in model.base_model.modules() for name, child in parent.named_children()]
    for parent, name, child in layers:
        if not isinstance(child, nn.Linear):
            continue
        size, bias, device = (child.in_features, child.out_features), child.bias is not None, child.weight.device
        if settings.bits == 4:
            how = {"compress_statistics": settings.nested_quantisation, "quant_type": "nf4"}
            made = bnb.nn.Linear4bit(*size, bias=bias, compute_dtype=child.weight.dtype, device="meta", **how)
            made.weight = bnb.nn.Params4bit(child.weight.data, requires_grad=False, **how)
        else:
            made = bnb.nn.Linear8bitLt(*size, bias=bias, has_fp16_weights=False, device="meta")
            # Its `to` quantises only what comes from the CPU.
            made.weight = bnb.nn.Int8Params(child.weight.data, requires_grad=False, has_fp16_weights=False)._quantize(device)
        made.bias = child.bias
        setattr(parent, name, made.to(device))
        if made.weight.dtype not in (torch.int8, torch.uint8):
            raise RuntimeError(f"bitsandbytes left {name} as it was")
        if hasattr(made, "support_avx512bf16_for_cpu"):  # see providers/huggingface.py
            made.support_avx512bf16_for_cpu = False
    use_exact_product(model)


def plan_of(settings: Settings, length: int, shared: bool, device: str, place: Path, new_tokens: int = 1) -> Plan:
    """The plan of `dpo train` for a config that has these settings, and sequences of this length.

    `new_tokens` are those of an answer that a strategy samples.
    """
    half, targets = settings.bytes_per_value == 2, settings.target_modules
    values = {"model_name": "random/model", "dataset": "none.jsonl", "output_dir": str(place / "run"), "device": device}
    values |= {"bf16": half, "fp16": False, "gradient_checkpointing": settings.checkpointing, "prompt_sharing": shared}
    values |= {"strategy": settings.strategy, "optim": settings.optimizer, "max_steps": 1, "max_seq_length": length}
    values |= {"per_device_train_batch_size": settings.batch, "gradient_accumulation_steps": 2, "lora_r": settings.rank}
    values |= {"lora_dropout": DROPOUT if settings.dropout else 0.0, "use_dora": settings.dora}
    values |= {"use_4bit": settings.bits == 4, "use_8bit": settings.bits == 8, "use_nested_quant": settings.nested_quantisation}
    values |= {"cpu_offload": settings.in_ram}
    values |= {"target_modules": targets if isinstance(targets, str) else list(targets)}
    if STRATEGIES[settings.strategy].generates:
        values |= {"reward_functions": ["longer"], "num_generations": 2, "max_new_tokens": new_tokens}
    file = place / "config.json"
    file.write_text(json.dumps(values), encoding="utf-8")
    return resolve(load(str(file)), probe())


def billed(plan: Plan, facts: ModelFacts, prompt: int, response: int) -> Settings:
    """What the bill of a plan is made from where all pairs have these lengths."""
    scored = response if plan.strategy.sequences == 1 else 2 * response - 1
    pair = prompt + scored if plan.config.prompt_sharing is True else None
    return replace(Settings.of(plan.config, facts, Longest(prompt + response, pair, scored)), row_tokens=plan.row_tokens)


def random_rows(vocabulary: int, settings: Settings, prompt: int, response: int) -> list[Encoded]:
    """Random pairs of these lengths, for two micro-batches."""
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(2, vocabulary, (count,), generator=generator).tolist()

    # Rejected responses (of sft, every second prompt) are a token shorter, so that padded rows are padded, as real ones are.
    count = 1 if settings.strategy == "sft" else 2
    return [
        Encoded(Pair("", "", "", 1), ids(prompt - (count == 1 and i % 2)), (ids(response), ids(response - 1))[:count])
        for i in range(2 * settings.batch)
    ]


def trainer_for(model: PreTrainedModel, settings: Settings, plan: Plan, rows: Sequence[Encoded]) -> CarefulTrainer:
    """The trainer of `dpo train` on these rows, without its probe."""
    (shared_prompts.enable if plan.config.prompt_sharing is True else shared_prompts.disable)(model)
    modules: Any = settings.target_modules if isinstance(settings.target_modules, str) else list(settings.target_modules)
    is_reward = STRATEGIES[settings.strategy].gives_rewards
    model = as_classifier(model, 0, 0, "random/model") if is_reward else model
    adapter = LoraConfig(
        task_type="SEQ_CLS" if is_reward else "CAUSAL_LM",
        modules_to_save=[HEAD] if is_reward else None,
        r=settings.rank or 1,
        lora_alpha=2 * settings.rank or 1,
        lora_dropout=DROPOUT if settings.dropout else 0.0,
        use_dora=settings.dora,
        target_modules=modules,
    )
    backend = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")
    frozen = None
    if not settings.rank:
        adapter, frozen = None, copy.deepcopy(model) if plan.strategy.refers else None
    sampled: dict[str, Any] = {}
    if plan.strategy.generates:
        prompts = [SampledPrompt(question_of(row.row), row.prompt_ids) for row in rows]
        sampled = {"prompts": prompts, "rank": lambda _, answers: [float(answer.tokens) for answer in answers]}
    build, nothing = TRAINERS[settings.strategy].build_trainer, EncodedRows.of([])
    trainer: CarefulTrainer = build(
        model, adapter, tokenizer, plan, EncodedRows.of(rows), nothing, lambda _: {}, frozen=frozen, **sampled
    )
    trainer.remove_callback(ProbeFirst)
    return trainer


class Peak:
    """Bytes that torch allocated beyond what it had, at their most."""

    bytes = 0


@contextmanager
def measured(device: str) -> Iterator[Peak]:
    """Fill `Peak.bytes` with the peak of the code inside: CUDA's own counter, or on a CPU the profiler's allocations."""
    peak = Peak()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated() - before
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        yield peak
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak.bytes = max(peak.bytes, live)


def step_peak(trainer: Any, device: str) -> int:
    """Bytes of activations and scoring at the peak of the second row of a step."""
    step, calls, peaks = trainer.run_row, [], []

    def run_row(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) != 2:
            return step(*args, **kwargs)
        with measured(device) as peak:
            loss = step(*args, **kwargs)
        peaks.append(peak.bytes)
        return loss

    trainer.run_row = run_row
    trainer.train()
    return int(peaks[0])


def compare(config: PreTrainedConfig, settings: Settings, prompt: int, response: int, shared: bool) -> tuple[float, int]:
    """(predicted, measured) bytes of activations and scoring on this CPU."""
    facts = config_facts(config.to_dict())
    assert facts is not None
    with tempfile.TemporaryDirectory() as place:
        plan = plan_of(settings, prompt + response, shared, "cpu", Path(place), response)
        parts = components(facts, billed(plan, facts, prompt, response))
        rows = random_rows(config.vocab_size, settings, prompt, response)
        model = random_model(config, settings, "cpu")
        if settings.in_ram:
            shard(model, torch.device("cpu"), ALONE, in_ram=True)
        trainer = trainer_for(model, settings, plan, rows)
        return sum(parts.get(name, 0.0) for name in ("activations", "scoring", "gathered")), step_peak(trainer, "cpu")


SHAPE = {"vocab_size": 16_000, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True, "pad_token_id": 0}
DROPOUT = 0.05  # the documented one
FAMILIES = {"phi3": Phi3Config, "llama": LlamaConfig, "qwen3": Qwen3Config, "gemma3": Gemma3TextConfig}
HALF = Settings(batch=2, length=0, rank=16, bytes_per_value=2, checkpointing=False, on_gpu=False)
FULL = replace(HALF, bytes_per_value=4)
# (family, settings, prompt, response, shared)
GRID: list[tuple[str, Settings, int, int, bool]] = [
    ("llama", HALF, 192, 64, True),
    ("llama", HALF, 192, 64, False),
    ("llama", HALF, 768, 256, True),
    ("llama", replace(HALF, batch=1), 3072, 512, True),
    ("llama", replace(HALF, batch=1, checkpointing=True), 6144, 1024, True),
    ("llama", replace(HALF, batch=1, checkpointing=True), 1536, 512, False),
    ("llama", replace(HALF, checkpointing=True), 768, 256, True),
    ("llama", replace(HALF, batch=8, checkpointing=True), 192, 64, True),
    ("llama", replace(HALF, rank=64, batch=4), 384, 128, True),
    ("llama", replace(HALF, rank=256), 48, 16, True),
    ("llama", replace(HALF, rank=256, checkpointing=True), 96, 32, True),
    ("llama", replace(HALF, dropout=True), 192, 64, True),
    ("llama", replace(HALF, dropout=True, bits=4), 192, 64, True),
    ("llama", replace(HALF, dora=True), 384, 128, True),
    ("llama", replace(HALF, dora=True, checkpointing=True), 768, 256, True),
    ("llama", replace(HALF, dora=True, bits=4), 384, 128, True),
    ("llama", replace(HALF, strategy="sft", batch=4), 384, 128, False),
    ("llama", replace(HALF, strategy="sft", batch=4, checkpointing=True), 768, 256, False),
    ("llama", replace(HALF, strategy="sft", batch=4, bits=4), 384, 128, False),
    ("llama", replace(HALF, strategy="rlhf", batch=4), 384, 128, False),
    ("llama", replace(HALF, strategy="rlhf", batch=4, checkpointing=True), 768, 256, False),
    ("llama", replace(HALF, strategy="rlhf", batch=4, bits=4), 384, 128, False),
    ("llama", replace(FULL, rank=0), 384, 128, True),
    ("llama", replace(HALF, rank=0), 384, 128, True),
    ("llama", replace(HALF, rank=0, checkpointing=True), 768, 256, True),
    ("llama", replace(HALF, rank=0, strategy="sft", batch=4), 384, 128, False),
    ("phi3", HALF, 192, 64, True),
    ("llama", replace(HALF, target_modules=("q_proj", "v_proj")), 384, 128, True),
    ("llama", FULL, 384, 128, True),
    ("llama", FULL, 384, 128, False),
    ("llama", replace(FULL, checkpointing=True), 768, 256, True),
    ("llama", replace(HALF, bits=4), 384, 128, True),
    ("llama", replace(HALF, bits=4, checkpointing=True), 768, 256, True),
    ("llama", replace(HALF, in_ram=True), 384, 128, True),
    ("llama", replace(HALF, in_ram=True, checkpointing=True), 768, 256, True),
    ("llama", replace(HALF, in_ram=True, checkpointing=True, bits=4), 384, 128, True),
    ("llama", replace(FULL, in_ram=True, checkpointing=True, strategy="sft", batch=4), 12, 12, False),
    ("llama", replace(HALF, bits=8), 384, 128, True),
    ("llama", replace(HALF, bits=8, checkpointing=True), 768, 256, True),
    ("qwen3", HALF, 384, 128, True),
    ("qwen3", replace(HALF, checkpointing=True), 768, 256, True),
    ("gemma3", HALF, 384, 128, True),
    ("gemma3", replace(HALF, checkpointing=True), 768, 256, True),
]


NAMES = ("model", "dtype", "batch", "tokens", "rank", "targets", "checkpointing", "prompts")
COLUMNS = (
    *map(Column, NAMES),
    Column("predicted MiB", "MiB", "{:.1f}", (0.02, 0)),
    Column("measured MiB", "MiB", "{:.1f}", (0.05, 0)),
    Column("ratio", "predicted / measured", "{:.3f}", (0.05, 0)),
)
LIBRARIES = Column("libraries", "GB", "{:.2f}", (0.2, 0))


def measure(table: Table, options: argparse.Namespace) -> None:
    libraries = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    logging.disable(logging.WARNING)
    for family, settings, prompt, response, shared in GRID[:1] if options.small else GRID:
        predicted, peak = compare(FAMILIES[family](**SHAPE, **HEADS), settings, prompt, response, shared)
        dtype = f"{settings.bits}-bit" if settings.bits else {2: "bf16", 4: "float32"}[settings.bytes_per_value]
        name = family + (", dropout" if settings.dropout else "") + (", DoRA" if settings.dora else "")
        name += ", in the RAM" if settings.in_ram else ""
        name += "" if settings.strategy == "dpo" else f", {settings.strategy}"
        told = [name, dtype, settings.batch, prompt + response, settings.rank, _targets(settings)]
        told += ["yes" if settings.checkpointing else "no", "once" if shared else "twice"]
        table.add(*told, predicted / 2**20, peak / 2**20, predicted / peak)
    table.note("Resident size after all imports: {libraries} GB.", (LIBRARIES, libraries))


def _targets(settings: Settings) -> str:
    return settings.target_modules if isinstance(settings.target_modules, str) else ", ".join(settings.target_modules)


if __name__ == "__main__":
    sys.exit(baseline.main("memory", COLUMNS, measure))

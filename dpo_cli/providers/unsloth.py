"""The Unsloth provider: FastLanguageModel and its kernels; the tokenizer and the adapter are the Hugging Face provider's.

A training runs `import_unsloth` before this module, which imports transformers and peft.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from dpo_cli.errors import RunFailed
from dpo_cli.hardware.unsloth_support import NO_SHARING
from dpo_cli.plan.plan import Plan
from dpo_cli.providers.huggingface import HuggingFace, quantisation, require_device
from dpo_cli.providers.unsloth_import import prints_to_log


class Unsloth(HuggingFace):
    """Loads the same models as the Hugging Face provider, through FastLanguageModel."""

    no_sharing: str | None = NO_SHARING

    def ready(self, model: PreTrainedModel | PeftModel, plan: Plan) -> None:
        """Put Unsloth's fused LoRA kernels on the adapter; its CPU fallback has none."""
        from unsloth import FastLanguageModel

        if plan.config.device == "cuda":
            with prints_to_log():
                FastLanguageModel.patch_peft_model(model, use_gradient_checkpointing=plan.config.gradient_checkpointing)

    def _model(self, plan: Plan, source: str) -> PreTrainedModel:
        from unsloth import FastLanguageModel

        config, device = plan.config, require_device(plan)
        options: dict[str, Any] = {
            "max_seq_length": config.max_seq_length,
            "dtype": getattr(torch, plan.dtype),
            "load_in_4bit": config.use_4bit,
            "use_gradient_checkpointing": config.gradient_checkpointing,
            "use_exact_model_name": True,  # not Unsloth's copy of a model under another name
            "use_safetensors": True,
            "device_map": {"": device},  # else parts that do not fit the GPU go to the CPU
        }
        self._stored_bits(source)  # refuses an unsupported quantisation
        if config.use_4bit:
            options["quantization_config"] = quantisation(plan)
        with prints_to_log():
            model, _ = self._load(FastLanguageModel, source, **options)
        self._require_sound(model, source)
        _require_quantisation(model, plan)
        return cast(PreTrainedModel, model)


def _require_quantisation(model: PreTrainedModel, plan: Plan) -> None:
    """`RunFailed` if Unsloth's CPU fallback loaded 16 bits instead of 4, or nf4, the only kind that it has, for fp4."""
    used = getattr(model.config, "quantization_config", None)
    wanted = quantisation(plan) if plan.config.use_4bit else None
    names = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
    if (used is None) != (wanted is None) or any(getattr(used, name, None) != getattr(wanted, name, None) for name in names):
        message = "Unsloth did not quantise this model as the config says"
        raise RunFailed(message, 'remove the bnb_4bit keys, change "use_4bit", or write "provider": "huggingface"')

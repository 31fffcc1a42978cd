"""The Hugging Face provider: transformers for the model, PEFT for the adapter, bitsandbytes for 4-bit weights."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, cast

import httpx
import torch
import transformers
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from peft import LoraConfig, PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dpo_cli.errors import InvalidInput, Problem, RunFailed
from dpo_cli.hardware import gguf
from dpo_cli.hardware.models import common_name
from dpo_cli.plan import Plan

HUB_TIMEOUT_SECONDS = 8


class HuggingFace:
    """Loads `model_name`: a hub id, a model directory, or a GGUF file."""

    def __init__(self, model_name: str) -> None:
        self.name = model_name
        path = Path(model_name)
        self.source = str(_dequantised(path)) if gguf.is_gguf(path) else model_name
        self.only_local = path.exists() or not _hub_answers(model_name)

    @property
    def local_dir(self) -> Path | None:
        """The model's directory, None when it is on the hub."""
        return Path(self.source) if Path(self.source).is_dir() else None

    def tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer = cast(PreTrainedTokenizerBase, self._load(AutoTokenizer))
        if tokenizer.eos_token is None:
            raise RunFailed(f"the tokenizer of {self.name} names no EOS token", "use an instruct model")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def adapter_config(self, plan: Plan, base: PreTrainedModel) -> LoraConfig:
        wanted = plan.config.target_modules
        linear = {name.rpartition(".")[2] for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
        if not isinstance(wanted, str) and (unknown := set(wanted) - linear):
            message = f"{plan.model_label} has no linear layer named {', '.join(sorted(unknown))}"
            fix = f"it has {', '.join(sorted(linear - {'lm_head'}))}"
            raise InvalidInput([Problem("error", "no-such-module", message, fix, "target_modules")])
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=plan.config.lora_r,
            lora_alpha=plan.config.lora_alpha,
            lora_dropout=plan.config.lora_dropout,
            use_rslora=plan.config.use_rslora,
            target_modules=plan.config.target_modules,
        )

    def with_adapter(self, plan: Plan, directory: Path) -> PeftModel:
        return cast(PeftModel, PeftModel.from_pretrained(self.base_model(plan), str(directory)).eval())

    def base_model(self, plan: Plan) -> PreTrainedModel:
        device = torch.device(plan.config.device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise RunFailed("this torch cannot use CUDA", 'install a CUDA build of torch, or set "device": "cpu"')
        options: dict[str, Any] = {"dtype": getattr(torch, plan.dtype)}
        if plan.config.use_4bit:
            options["quantization_config"] = transformers.BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=plan.config.bnb_4bit_quant_type,
                bnb_4bit_use_double_quant=plan.config.use_nested_quant,
                bnb_4bit_compute_dtype=getattr(torch, plan.config.bnb_4bit_compute_dtype or plan.dtype),
            )
            options["device_map"] = {"": device}
        model = cast(PreTrainedModel, self._load(AutoModelForCausalLM, use_safetensors=True, **options))
        if getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None:
            # transformers 5.17 loads Gemma 2 with SDPA, which leaves the attention's soft-cap out without a word.
            model.set_attn_implementation("eager")
        for module in model.modules():
            # bitsandbytes 0.50.2 repacks such a layer at its first evaluation on a CPU, and it loses its gradients for good.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
            # The reference is computed in training mode too, so only the adapter may have dropout.
            for name, value in vars(module).items():
                if isinstance(value, float) and (isinstance(module, torch.nn.Dropout) or "dropout" in name):
                    setattr(module, name, 0.0)
        return model if plan.config.use_4bit else cast(PreTrainedModel, model.to(device))

    def reward_model(self, device: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model as a classifier whose one label is the reward, in evaluation mode, and its tokenizer."""
        options = {"use_safetensors": True, "dtype": dtype, "output_loading_info": True}
        model, info = self._load(AutoModelForSequenceClassification, **options)
        if model.config.num_labels != 1 or info["missing_keys"]:  # transformers would make up a head that is not there
            raise RunFailed(f"{self.name} is no reward model: it has no head with one score", "name a trained reward model")
        return cast(PreTrainedModel, model.to(device).eval()), cast(PreTrainedTokenizerBase, self._load(AutoTokenizer))

    def _load(self, auto: Any, **options: Any) -> Any:
        """`from_pretrained`, with the library's many ways to fail told as one: the model cannot be had."""
        try:
            return auto.from_pretrained(self.source, trust_remote_code=False, local_files_only=self.only_local, **options)
        except (OSError, ValueError) as error:
            if isinstance(error.__cause__, GatedRepoError):  # its description is public, its files are not
                raise _gated(self.name) from error
            if self.only_local and self.local_dir is None:
                message = f"the hub cannot be reached, and {self.name} is not in the local cache"
                raise RunFailed(message, "check the network, or name a local model directory or GGUF file") from error
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise RunFailed(f"cannot load {self.name}: {reason}", "check that it is a complete model directory") from error


def _hub_answers(model_name: str) -> bool:
    """Whether the hub has the model; False when it cannot be reached, so that only what is cached can be used.

    Asked once, because from_pretrained alone retries for most of a minute.
    """
    try:
        HfApi().model_info(model_name, timeout=HUB_TIMEOUT_SECONDS)
    except GatedRepoError as error:
        raise _gated(model_name) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        near = common_name(model_name)
        fix = f"did you mean {near}? " if near else "check the name (owner/model); "
        fix += "a private model needs `hf auth login`"
        raise RunFailed(f"there is no model {model_name} on the hub", fix) from error
    except (httpx.TransportError, HfHubHTTPError, OfflineModeIsEnabled):
        return False
    return True


def _gated(model_name: str) -> RunFailed:
    return RunFailed(f"{model_name} is gated", "ask for access on its page, then `hf auth login`")


def cache_dir() -> Path:
    """Where dequantised GGUF models are kept: $XDG_CACHE_HOME/dpo or ~/.cache/dpo."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dpo"


def _dequantised(path: Path) -> Path:
    """The GGUF file as a float32 model directory with safetensors, made once per content and transformers version."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    target = cache_dir() / "gguf" / f"{digest[:32]}-transformers-{transformers.__version__}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".making-", dir=target.parent))
    try:
        _convert(path, work)
        work.rename(target)
    except ValueError as error:
        raise RunFailed(f"{path} cannot be dequantised: {error}", "download it again") from error
    except OSError:
        if not target.is_dir():  # else another process finished first, and its copy serves
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _convert(path: Path, target: Path) -> None:
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    # transformers 5.17 guesses the special tokens of a GGUF (SmolLM2's EOS comes out as its BOS); the header knows them.
    header = gguf.read_header(path).metadata
    for name, key in {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}.items():
        token_id = header.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None:
            setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(token_id))
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.save_pretrained(target)
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # The weights are plain float32 now; with the GGUF quantisation config left in, save_pretrained refuses.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(target)

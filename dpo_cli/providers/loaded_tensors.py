"""Every load checks every tensor: the files hold all tensors of the architecture, and no others.

transformers initialises missing tensors randomly, and PEFT ignores tensors without a place; both only write a log line. Here
both are errors that name the tensors. So are values that are not finite, and a merge that changes what the model computes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import transformers
import transformers.modeling_utils
from peft import LoraConfig, PeftModel
from peft.utils import set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import cached_file
from transformers.utils.loading_report import LoadStateDictInfo

from dpo_cli.errors import InvalidInput, Problem, RunFailed, invalid
from dpo_cli.models.adapter_config import CAUSAL, CLASSIFIER, Adapter
from dpo_cli.models.model_files import ModelFiles
from dpo_cli.models.tensor_files import (
    AGAIN,
    PULL,
    RESIZED_FIX,
    PointerError,
    TensorFiles,
    count,
    expert_gap,
    faults,
    lora_fault,
    names_in,
    of_base,
    place_of,
    resized,
    some,
    wrapper_of,
)
from dpo_cli.providers.classifier import head_of
from dpo_cli.providers.out_of_memory import is_out_of_memory
from dpo_cli.providers.precision import in_float32
from dpo_cli.storage.run_directory import WEIGHTS

OTHER_BASE = "name the model that it was made on as model_name"
MASKS = ("bias", "masked_bias", "causal_mask")  # last names of buffers of GPT-2, GPT-Neo, GPT-J and CodeGen
MERGE_ALLOWANCE = 1e-4  # nats per token that a merge in float32 may change
PROBE_TOKENS, PROBE_ROWS = 24, 2  # of the sequences for the check of a merge


def refuse(what: str, missing: Sequence[str], unexpected: Sequence[str], other: Sequence[str], fix: str, key: str) -> None:
    """`InvalidInput` that names the tensors of `what` which are missing, which have no place in the model, or which do not fit.

    Nothing happens if all three are empty.
    """
    parts = []
    if missing:
        parts.append(f"lacks {count(sorted(missing))}")
    if unexpected:
        parts.append(f"holds {count(sorted(unexpected))} without a place in the model")
    if other:
        parts.append(f"holds tensors that do not fit: {some(sorted(other))}")
    if not parts:
        return
    if wrapper := wrapper_of(unexpected):
        fix = f"save it again without the wrapper that put {wrapper!r} before every name"
    raise invalid("tensors-unaccounted", f"{what} {', and '.join(parts)}", fix, key)


@contextmanager
def all_tensors(what: str) -> Iterator[list[str]]:
    """Within, transformers loads a model completely, or `InvalidInput` names the tensors that do not match the architecture.

    `_finalize_model_loading` (transformers 5.17) ends every load with a call of `log_state_dict_report`, also for Unsloth,
    which does not pass `output_loading_info` on. Here that call is the check; `RunFailed` if it is missing. Yields a list for
    notes on ignored tensors.
    """
    checked, notes = [], list[str]()

    def check(
        model: PreTrainedModel, loading_info: LoadStateDictInfo, pretrained_model_name_or_path: object = None, **_: object
    ) -> None:
        checked.append(what)
        unexpected = set(loading_info.unexpected_keys)
        idle = _without_use(model, unexpected, str(pretrained_model_name_or_path))
        if idle:
            notes.append(f"{what} holds {count(sorted(idle))} that its model does not use: ignored")
        shapes = [f"{name} {list(found)} instead of {list(wanted)}" for name, found, wanted in loading_info.mismatched_keys]
        broken = [*shapes, *loading_info.error_msgs, *loading_info.conversion_errors]
        fix = "download it again; config.json and weights have to be of one model"
        refuse(what, loading_info.missing_keys, sorted(unexpected - idle), broken, fix, "model_name")

    before = transformers.modeling_utils.log_state_dict_report
    transformers.modeling_utils.log_state_dict_report = check
    try:
        yield notes
    finally:
        transformers.modeling_utils.log_state_dict_report = before
    if not checked:
        message = f"transformers {transformers.__version__} does not report which tensors of {what} it has loaded"
        raise RunFailed(message, "install the version that constraints.txt names")


def _without_use(model: PreTrainedModel, names: set[str], source: str) -> set[str]:
    """The tensors without a place that change nothing: masks stored with the attention, the old head of a classifier."""
    masks = {name for name in names if name.rpartition(".")[2] in MASKS}
    stored = TensorFiles(folder_of(source)).shapes if masks else {}  # possibly without the first part of the names
    idle = {name for name in masks if any(_is_mask(shape) for short, shape in stored.items() if name.endswith(short))}
    return idle if model.get_output_embeddings() is not None else idle | (names & {"lm_head.weight"})


def _is_mask(shape: tuple[int, ...]) -> bool:
    """Whether a shape is that of a mask over two positions, or of the single value that fills masks."""
    return shape == () or (len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3])


def folder_of(source: str) -> Path:
    """The folder of a model that was loaded from `source`, a directory or a hub id."""
    if Path(source).is_dir():
        return Path(source)
    return Path(cached_file(source, "config.json", local_files_only=True)).parent


def require_whole_files(files: ModelFiles) -> None:
    """`InvalidInput` if the headers of a model's files show that something is missing, cut off or misnumbered."""
    if files.config and files.tensors.files:  # weights of another format have their own errors
        wrong = faults(files.tensors, files.config)
        if found := [Problem("error", "model-tensors", fault.message, fault.fix, "model_name") for fault in wrong]:
            raise InvalidInput(found)


def require_finite(model: nn.Module, what: str, folder: Path) -> None:
    """`InvalidInput` with the tensors of a model, loaded from `folder`, that hold NaN or infinity.

    They have their names in safetensors files, although transformers may have joined them.
    """
    tensors: dict[str, Tensor | None] = dict(model.named_parameters()) | _buffers(model)
    has_4bit = False
    for name, parameter in model.named_parameters():
        tensors[f"{name} (scale of a row)"] = getattr(parameter, "SCB", None)  # 8-bit weights of bitsandbytes
        has_4bit |= getattr(parameter, "quant_state", None) is not None  # 4 bits turn a NaN into a number
    broken = _not_finite(tensors)
    files = TensorFiles(folder).files if broken or has_4bit else []
    in_files = [name for file in files for name in _not_finite_in(folder / file)]
    _refuse_numbers(in_files or broken, what)


def _not_finite_in(file: Path) -> list[str]:
    with safe_open(file, "pt") as held:
        return [name for name in held.keys() if not _is_finite(held.get_tensor(name))]  # noqa: SIM118 - it is not a mapping


def _buffers(model: nn.Module) -> dict[str, Tensor | None]:
    """The buffers in a model's files; some other buffers, such as masks, hold infinity."""
    return {
        f"{place}.{name}": buffer
        for place, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if name not in module._non_persistent_buffers_set
    }


def _not_finite(tensors: Mapping[str, Tensor | None]) -> list[str]:
    return [name for name, tensor in tensors.items() if tensor is not None and not _is_finite(tensor)]


def _refuse_numbers(broken: list[str], what: str) -> None:
    if broken:
        message = f"{what} holds NaN or infinity in {count(broken)}"
        fix = "download it again, or train it again with a lower learning_rate: these weights are unusable"
        raise invalid("weights-not-finite", message, fix, "model_name")


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel() or tensor.is_meta:
        return True
    if tensor.dtype.itemsize < 2:  # FP8 has no minimum
        return bool(torch.isfinite(tensor.float()).all())
    return all(bool(torch.isfinite(end)) for end in torch.aminmax(tensor.detach()))  # both return a NaN


def with_adapter(
    base: PreTrainedModel | PeftModel,
    folder: Path,
    name: str,
    label: str,
    is_trainable: bool = False,
    dropout: float = 0.0,
) -> PeftModel:
    """`base` with the adapter in `folder`, called `name`, whole; `label` names the base in messages.

    Its dropout is that of this training, not its own. A further adapter is added to those of `base`.
    Raises `InvalidInput` for an adapter of another model, for tensors that are missing or have no place, and for a kind of
    adapter whose base is not the reference.
    """
    network = base.get_base_model() if isinstance(base, PeftModel) else base
    written = _weights_of(folder, network, label)
    options: dict[str, Any] = {"adapter_name": name, "is_trainable": is_trainable}
    try:
        wanted = LoraConfig.from_pretrained(str(folder))
        wanted.lora_dropout, wanted.inference_mode = dropout, not is_trainable
        if isinstance(base, PeftModel):
            base.add_adapter(name, wanted)
            base.load_adapter(str(folder), **options)
            model = base
        else:
            model = cast(PeftModel, PeftModel.from_pretrained(base, str(folder), config=wanted, **options))
        result = set_peft_model_state_dict(model, dict(written), adapter_name=name)
    except (
        RuntimeError,
        ValueError,
        KeyError,
        AttributeError,
    ) as error:  # other shapes, missing layers
        if is_out_of_memory(error):
            raise
        shapes = [_written(key, name) for key in re.findall(r"size mismatch for (\S+):", str(error))]
        refuse(f"the adapter in {folder}, put on {label},", (), (), shapes, OTHER_BASE, "model_name")
        message = f"{folder} is not an adapter of {label}: {' '.join(str(error).split())[:300]}"
        raise invalid("adapter-other-base", message, OTHER_BASE, "model_name") from error
    missing = [_written(key, name) for key in result.missing_keys if name in key.split(".")]
    unexpected = [_written(key, name) for key in result.unexpected_keys]
    fix = OTHER_BASE if unexpected else AGAIN
    refuse(f"the adapter in {folder}, put on {label},", missing, unexpected, (), fix, "model_name")
    return model


def _weights_of(folder: Path, network: PreTrainedModel, label: str) -> dict[str, Tensor]:
    """The tensors of an adapter for `network`; `InvalidInput` if its files show that it does not fit."""
    adapter = Adapter(ModelFiles(folder))
    if fault := adapter.fault_for(CAUSAL if head_of(network) is None else CLASSIFIER):
        message = f"the adapter in {folder} {fault.message}"
        raise invalid("adapter-unsupported", message, fault.fix, "model_name")
    try:
        header = adapter.files.tensors.header(WEIGHTS)
        written = load_file(folder / WEIGHTS)
    except (SafetensorError, ValueError) as error:
        fix = PULL if isinstance(error, PointerError) else AGAIN
        raise invalid("adapter-damaged", f"{folder / WEIGHTS}: {error}", fix, "model_name") from error
    if fault := lora_fault(header.shapes, header.dtypes, adapter.config):
        message = f"the adapter in {folder} {fault.message}"
        raise invalid("tensors-unaccounted", message, fault.fix, "model_name")
    _refuse_numbers(_not_finite(written), str(folder))
    if gap := expert_gap(written):
        raise invalid("tensors-unaccounted", f"the adapter in {folder} {gap}", AGAIN, "model_name")
    _require_same_base(network, written, adapter.config, folder, label)
    return written


def _written(key: str, name: str) -> str:
    """The name of a tensor in the file of an adapter, from its name in the model, without the common prefix."""
    return key.removeprefix("base_model.model.").replace(f".{name}", "")


def _require_same_base(
    network: PreTrainedModel, written: dict[str, Tensor], config: Mapping[str, object], folder: Path, label: str
) -> None:
    """`InvalidInput` if the file holds a tensor of the base with other values: PEFT would replace the tensor of the base.

    PEFT saves embeddings in this way if they were resized or adapted.
    """
    tensors = (*network.named_parameters(remove_duplicate=False), *network.named_buffers(remove_duplicate=False))
    own = {place_of(name): tensor.detach() for name, tensor in tensors if ".modules_to_save." not in name}
    shapes = ({name: tuple(tensor.shape) for name, tensor in tensors.items()} for tensors in (written, own))
    if difference := resized(*shapes):
        message = f"the adapter in {folder} {difference}"
        raise invalid("adapter-resized", message, RESIZED_FIX, "model_name")
    held = [(place_of(key), written[key]) for key in of_base(written, names_in(config.get("modules_to_save")))]
    if other := [name for name, tensor in held if name in own and not _is_same(own[name], tensor)]:
        message = f"{folder} holds {count(other)} of its base, with other values than in {label}: it was made on another model"
        raise invalid("adapter-other-base", message, OTHER_BASE, "model_name")


def _is_same(there: Tensor, tensor: Tensor) -> bool:
    return there.shape == tensor.shape and torch.equal(there.cpu(), tensor.to(there.dtype))


def merged(model: PeftModel, name: str, label: str, dtype: torch.dtype) -> PreTrainedModel:
    """The base with the adapter `name` merged into it; compares the log-probs of the base, with the adapter, and merged.

    In float32, because the rounding of bf16 may hide what an adapter adds. A head that is tied to the embedding is untied first
    if either is adapted; else the merge would change both. Raises `InvalidInput` if the merged model computes something else,
    or is nearer to the base, and for weights that are not finite.
    """
    model.set_adapter(name)
    ids = _probe(model)
    adapted = _log_probs(model, ids)
    with model.disable_adapter():
        base = _log_probs(model, ids)
    _untie(model.get_base_model())
    try:
        whole = cast(PreTrainedModel, model.merge_and_unload(safe_merge=True, adapter_names=[name]))
    except (RuntimeError, ValueError) as error:  # NaN in the merged weights; a kind of adapter that cannot be merged
        if is_out_of_memory(error):
            raise
        message, fix = f"the adapter on {label} cannot be merged: {error}", "use it as it is, or train another one"
        raise invalid("merge-differs", message, fix, "model_name") from error
    _require_same(_log_probs(whole, ids), adapted, base, label, dtype)
    return whole.requires_grad_(True)  # as for any loaded model: PEFT has frozen it


def _require_same(whole: Tensor, adapted: Tensor, base: Tensor, label: str, dtype: torch.dtype) -> None:
    """`InvalidInput` if a merge differs from the adapter on its base, by log-probs; `dtype` is that of the merged weights."""
    apart, lost, effect = (float(one.abs().mean()) for one in (whole - adapted, whole - base, adapted - base))
    rounding = max(MERGE_ALLOWANCE, torch.finfo(dtype).eps)
    allowed = max(MERGE_ALLOWANCE, 16 * torch.finfo(dtype).eps)
    if apart <= allowed and (apart < lost or effect <= rounding):
        return
    message = f"merged into {label}, the adapter computes something else: log-probs differ by {apart:.2g} nats per token"
    message = f"{message} ({allowed:.2g} allowed), where the adapter changes them by {effect:.2g}"
    fix = "use the adapter as it is, or train it again without what PEFT cannot merge"
    raise invalid("merge-differs", message, fix, "model_name")


def _untie(network: PreTrainedModel) -> None:
    """Give the head its own weight if it shares that of the embedding and one of them has an adapter."""
    parts = network.get_output_embeddings(), network.get_input_embeddings()
    head, table = (getattr(part, "base_layer", part) for part in parts)
    if head is None or (head, table) == parts or head.weight is not table.weight:
        return
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    network.config.tie_word_embeddings = network.config.get_text_config().tie_word_embeddings = False


def _probe(model: PeftModel) -> Tensor:
    """Token ids across the vocabulary, (rows, tokens): the same for the same model."""
    rows = model.get_base_model().get_input_embeddings().weight.shape[0]
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, rows, (PROBE_ROWS, PROBE_TOKENS), generator=draw).to(model.device)


def _log_probs(model: nn.Module, ids: Tensor) -> Tensor:
    """Log-probs of each next token in `ids`, by the model's own logits, computed in float32."""
    model.eval()
    with torch.no_grad():
        try:
            with in_float32(model):
                logits = model(input_ids=ids, use_cache=False).logits
        except RuntimeError as error:  # a block that reads a weight itself mixes dtypes: then the model's own dtype is used
            if is_out_of_memory(error):
                raise
            logits = model(input_ids=ids, use_cache=False).logits
    log_probs: Tensor = logits[:, :-1].float().log_softmax(dim=-1).gather(-1, ids[:, 1:, None])[..., 0]
    return log_probs

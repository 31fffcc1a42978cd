"""The memory bill: bytes by component at the peak of a training step, from the shape of a model alone. No torch.

What lies in memory the whole time (weights, adapter, gradients, optimizer) is counted from the model's shape. What comes and
goes with a micro-batch of T tokens is the largest of the moments of a step:

    the head             all that the blocks keep for the backward pass + one chunk of logits
    the reference        the same + the widest moment of one block's forward, its adapter off   (dpo and rlhf)
    a block's backward   the same + that block, recomputed when it was checkpointed, with its gradients

The bytes a token are those of the tensors that autograd saves in a step of this program. benchmarks/step_memory.py measures
what is alive at the peak of such a step, and tests/test_memory.py holds the bill to it. GB are 2^30 bytes.
Names: h hidden, i intermediate, q and kv the widths of queries and of keys or values, L the longest sequence, w bytes a value.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from dpo_cli.hardware.facts import Linear, ModelFacts
from dpo_cli.hardware.probe import GIB

# Bytes per 4-bit weight: half a byte; a one-byte scale per block of 64; a float32 per 256 of those (QLoRA, arXiv:2305.14314
# section 3, double quantisation).
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
PLAIN_4BIT_BYTES = 0.5 + 4 / 64  # without it: a float32 scale per block
# Bytes of optimizer state a trained weight, where it is not two moments of the weight's own width (AdamW): in 8 bits with
# their scales; Adafactor keeps a row and a column; SGD nothing. Paged states can leave the GPU, but are there at the step.
MOMENTS = {"paged_adamw_32bit": 8.0, "adamw_8bit": 2.0, "paged_adamw_8bit": 2.0, "adafactor": 0.0, "sgd": 0.0}
CUDA_CONTEXT_BYTES = 0.5 * GIB  # driver context and the workspaces of cuBLAS; fitcheck-llm 0.3 assumes the same
ALLOCATOR_SLACK = 0.05  # share of the rest lost to fragmentation; likewise
CHUNK_BYTES = 1 << 26  # float32 logits that the head makes at a time (training/head.py, CHUNK_ELEMENTS)
FULL_LOGITS_COPIES = 3.5  # float32 copies of logits in a loss that makes them whole; fitcheck-llm 0.3 measured 3.5 to 4
LIBRARIES_BYTES = 0.5 * GIB  # resident size of this program's imports on a CPU: `make memory` prints it


@dataclass(frozen=True)
class Settings:
    """What of a run decides its memory. The last group is what other tools do: it is there to compare bills."""

    batch: int  # pairs a forward pass (sft: sequences; rlhf: prompts with two samples each)
    length: int  # tokens of the longest sequence
    rank: int  # 0 trains every weight
    bytes_per_value: int  # of the compute dtype: 2 for bf16 and fp16, 4 for float32
    checkpointing: bool
    strategy: str = "dpo"
    bits: int | None = None  # 4 or 8 for quantised weights of the frozen linear layers
    nested_quantisation: bool = True
    optimizer: str = "adamw_torch_fused"
    target_modules: str | tuple[str, ...] = "all-linear"
    fp16: bool = False
    dropout: bool = False  # on the inputs of the adapter
    on_gpu: bool = True
    from_gguf: bool = False
    pair_tokens: int | None = None  # of the longest pair, its prompt counted once, where prompts are shared and lengths known
    response_tokens: int | None = None  # scored tokens of the longest pair, where lengths are known

    full_logits: bool = False  # padded rows whose logits are made whole
    reference: str = "off"  # the adapter off; "adapter": a frozen one; "copy": a second model; "cache": computed before
    fused_attention: bool = True  # false: the probabilities are kept, as eager attention does

    @property
    def sequences(self) -> int:
        return self.batch * (1 if self.strategy == "sft" else 2)

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch as they go through the model."""
        padded = self.sequences * self.length
        return padded if self.pair_tokens is None else min(self.batch * self.pair_tokens, padded)

    @property
    def scored(self) -> int:
        """Tokens of a micro-batch that meet the head."""
        return self.tokens if self.response_tokens is None else min(self.batch * self.response_tokens, self.tokens)

    @property
    def copies_inputs(self) -> bool:
        """Whether each adapted layer keeps its own copy of its input.

        PEFT hands the input in the adapter's float32, and autocast casts it back to 16 bits, once a layer. Adapters on
        quantised weights are in bf16 (TRL 1.15, DPOTrainer; training/dpo.py but for fp16), and in float32 nothing is cast: then
        layers share what they read, unless dropout makes another of it for each.
        """
        return self.rank > 0 and (self.dropout or (self.bytes_per_value < 4 and (self.bits is None or self.fp16)))


@dataclass(frozen=True)
class Bill:
    """Bytes by component; `budget_gb` is what the hardware offers, when known, and `host_gb` what loading takes of the RAM."""

    components: dict[str, float]
    budget_gb: float | None
    host_gb: float = 0.0
    largest_change: str | None = None

    @property
    def total_gb(self) -> float:
        return sum(self.components.values()) / GIB

    @property
    def fits(self) -> bool | None:
        return None if self.budget_gb is None else self.total_gb <= self.budget_gb

    def to_json(self) -> dict[str, Any]:
        return {
            "total_gb": round(self.total_gb, 3),
            "components": {name: round(size / GIB, 3) for name, size in self.components.items()},
            "budget_gb": self.budget_gb,
            "fits": self.fits,
            "largest_change": self.largest_change,
        }


def bill(facts: ModelFacts, settings: Settings, budget_gb: float | None) -> Bill:
    """What these settings take."""
    return Bill(components(facts, settings), budget_gb, host_bytes(facts, settings) / GIB)


def components(facts: ModelFacts, settings: Settings) -> dict[str, float]:
    """Bytes by component at the peak of a step."""
    trained, width = trained_parameters(facts, settings), _trained_width(settings)
    frozen = weight_bytes(facts, settings)
    parts = {"weights": frozen, "adapter": trained * width if settings.rank else 0.0}
    if settings.strategy != "sft" and settings.reference in ("copy", "adapter"):
        parts["reference"] = frozen if settings.reference == "copy" else parts["adapter"]
    parts["gradients"] = trained * width
    parts["optimizer"] = trained * MOMENTS.get(settings.optimizer, 2 * width)
    parts["activations"], parts["scoring"] = _step_bytes(facts, settings)
    if settings.strategy == "rlhf":
        parts["sampling"] = sampling_bytes(facts, settings)
    if settings.on_gpu:
        parts["cuda_context"] = CUDA_CONTEXT_BYTES
        parts["allocator_slack"] = ALLOCATOR_SLACK * sum(parts.values())
    return parts


def weight_bytes(facts: ModelFacts, settings: Settings) -> float:
    """Bytes of the model's weights.

    bitsandbytes quantises the linear layers of the blocks; embeddings, head and norms keep the compute dtype (transformers
    leaves the head out by itself). 8 bits: a byte a weight and a float32 a row (LLM.int8, arXiv:2208.07339, section 3). Full
    fine-tuning holds float32 weights, since updates are smaller than bf16 can add.
    """
    if settings.rank == 0:
        return 4.0 * facts.parameters
    width: float = settings.bytes_per_value
    if settings.bits == 4:
        width = NF4_BYTES if settings.nested_quantisation else PLAIN_4BIT_BYTES
    rows = sum(linear.outputs for linear in facts.linears) * facts.num_hidden_layers
    scales = 4.0 * rows if settings.bits == 8 else 0.0
    linear_bytes = facts.linear_parameters * (1.0 if settings.bits == 8 else width) + scales
    return linear_bytes + facts.other_parameters * settings.bytes_per_value


def trained_parameters(facts: ModelFacts, settings: Settings) -> int:
    """A LoRA adapter of rank r on an (in, out) layer has r * (in + out) weights (arXiv:2106.09685, section 4.1)."""
    if settings.rank == 0:
        return facts.parameters
    sizes = sum(linear.inputs + linear.outputs for linear in _targets(facts, settings))
    return facts.num_hidden_layers * settings.rank * sizes


def sampling_bytes(facts: ModelFacts, settings: Settings) -> float:
    """Keys and values of the samples that rlhf draws before it trains on them, of all blocks. Provisional, until it exists.

    The reward is taken to be a head on the same model; a reward model of its own would come on top.
    """
    return 2.0 * facts.kv * settings.sequences * settings.length * facts.num_hidden_layers * settings.bytes_per_value


def host_bytes(facts: ModelFacts, settings: Settings) -> float:
    """What the run takes of the machine's own memory.

    transformers maps safetensors and copies a tensor at a time to the GPU, so a GPU run holds the libraries and the largest
    tensor, in the file's 16 bits and once more as it is converted. A run on the CPU holds everything, and the pages of the file
    beside it. A GGUF file is first made a float32 model of, whole.
    """
    if settings.on_gpu:
        loaded = 2 * 2.0 * facts.vocab_size * facts.hidden_size
    else:
        loaded = sum(components(facts, settings).values()) + 2.0 * facts.parameters
    return LIBRARIES_BYTES + max(loaded, 4.0 * facts.parameters if settings.from_gguf else 0.0)


def _trained_width(settings: Settings) -> int:
    """Bytes a trained weight: TRL holds an adapter on quantised weights in bf16, PEFT any other in float32."""
    return 2 if settings.bits and not settings.fp16 else 4


def _targets(facts: ModelFacts, settings: Settings) -> list[Linear]:
    """The layers of a block that an adapter is on; those that a regular expression finds in any block count in all."""
    wanted = settings.target_modules
    if isinstance(wanted, tuple):
        return [linear for linear in facts.linears if linear.name in wanted]
    if wanted == "all-linear":
        return list(facts.linears)
    names = facts.linear_names()
    return [linear for linear in facts.linears if any(re.fullmatch(wanted, name) for name in names[linear.name])]


def _step_bytes(facts: ModelFacts, settings: Settings) -> tuple[float, float]:
    """(activations, scoring) at the fullest moment of a micro-batch."""
    width, tokens = settings.bytes_per_value, settings.tokens
    h, i = facts.hidden_size, facts.intermediate_size
    block = _block_bytes(facts, settings)
    # A checkpointed block keeps what comes into it; and in 8 bits what each of its layers reads, since bitsandbytes 0.50 keeps
    # that as attributes of its autograd function (MatMul8bitLt, `ctx.tensors`), where checkpointing cannot free it.
    checkpoint = h + (sum({linear.reads: linear.inputs for linear in facts.linears}.values()) if settings.bits == 8 else 0)
    kept: float = facts.num_hidden_layers * (tokens * width * checkpoint if settings.checkpointing else block)
    if width < 4 and _trained_width(settings) == 4:  # autocast keeps 16-bit copies of the adapter
        kept += width * trained_parameters(facts, settings)
    kept += _masked(facts, settings)  # the mask itself, a byte for each query and key, which all blocks share
    end = tokens * (4 * h + width * h)  # the final norm's float32 input and its result; gone when the blocks' turn comes
    gathered = settings.scored * h * (width + 4)  # the states that meet the head, and their gradient

    # Gradients of the MLP's product and of what it is made of, and of the float32 copies that adapters on it read.
    has_mlp_copies = settings.copies_inputs and any(linear.reads in ("mlp", "product") for linear in _targets(facts, settings))
    backward: float = tokens * width * ((3 if settings.copies_inputs else 2) * i + (5 if has_mlp_copies else 1) * h)
    backward += block if settings.checkpointing else end
    forward: float = end + tokens * width * (3 * i + 4 * h)
    if settings.bits:  # a layer is dequantised to be multiplied
        one_layer = width * max(linear.parameters for linear in facts.linears)
        backward, forward = backward + one_layer, forward + one_layer
    refers = settings.strategy != "sft" and settings.reference != "cache"
    moments = [(kept + end, gathered + _logits_bytes(facts, settings)), (kept + backward, 0.0)]
    # At the end of the backward pass a micro-batch's gradients stand beside those of the ones before it (training/parts.py).
    new_gradients = trained_parameters(facts, settings) * _trained_width(settings)
    last_block = backward if settings.checkpointing else block + backward - end
    moments.append((last_block + new_gradients, 0.0))
    if refers:
        moments.append((kept + forward, settings.scored * h * width))
    return max(moments, key=sum)


def _logits_bytes(facts: ModelFacts, settings: Settings) -> float:
    """The widest moment of the head: float32 logits and their log-softmax, a chunk at a time."""
    if settings.full_logits:
        return 4.0 * FULL_LOGITS_COPIES * settings.tokens * facts.vocab_size
    return 2.0 * min(CHUNK_BYTES, 4 * settings.scored * facts.vocab_size)


def _block_bytes(facts: ModelFacts, settings: Settings) -> float:
    """What one block keeps for the backward pass of a micro-batch.

    A token: in the compute dtype the attention's q, k, v and output (2q + 2kv), the MLP's gate, up and silu(gate) (3i), and
    of each adapted layer its input and the product with A (r); in float32 the input of each norm (Qwen 3, Gemma 3 and
    OLMo 2 have them on q and k too), and one number a head and norm.
    """
    width, tokens, heads = float(settings.bytes_per_value), settings.tokens, facts.num_attention_heads
    q, kv = facts.q, facts.kv
    targets = _targets(facts, settings) if settings.rank and settings.bits != 8 else list(facts.linears)
    inputs = {linear.reads: linear.inputs for linear in targets}
    is_shared = settings.pair_tokens is not None
    if settings.copies_inputs:
        read = sum(linear.inputs for linear in targets)
    else:  # a padded row's attention output is read as it lies there
        read = sum(size for name, size in inputs.items() if is_shared or name != "attention")
    each = width * (read + settings.rank * len(targets) + 2 * q + 2 * kv + 3 * facts.intermediate_size)
    if settings.rank and settings.dropout:  # what was dropped: a byte on a GPU, a number on a CPU
        each += sum(linear.inputs for linear in targets) * (1.0 if settings.on_gpu else float(_trained_width(settings)))
    each += 4.0 * (facts.norms * (facts.hidden_size + 1) + heads)
    if facts.has_qk_norm:
        each += 4 * (q + kv + heads + facts.num_key_value_heads)
    return tokens * each + _attention_bytes(facts, settings)


def _attention_bytes(facts: ModelFacts, settings: Settings) -> float:
    """What a block's attention keeps beyond its inputs and output.

    With a mask, SDPA takes keys and values repeated to one a query head, and the mask in the compute dtype. Without a fused
    kernel, as with a soft-cap (Gemma 2), each query keeps of each key of its sequence the softmax in float32, the
    probabilities and the capped scores in the compute dtype.
    """
    width, length = float(settings.bytes_per_value), settings.length
    extra = width * _masked(facts, settings)
    if settings.pair_tokens is not None:
        repeated: float = settings.batch * length * 2 * facts.q
        if _slides(facts, settings):  # the chosen response is masked too
            repeated += settings.batch * length * 2 * (facts.q - facts.kv)
    else:
        repeated = settings.tokens * 2 * (facts.q - facts.kv) if _masked(facts, settings) else 0
    extra += width * repeated
    if facts.attn_logit_softcapping is not None or not settings.fused_attention:
        pairs = settings.sequences * length**2
        if settings.pair_tokens is not None:  # of a shared pair the rejected response alone meets all its keys again
            pairs = settings.batch * (length + max(0, settings.pair_tokens - length)) * length
        extra += pairs * facts.num_attention_heads * (2 * width + 4)
    return extra


def _masked(facts: ModelFacts, settings: Settings) -> int:
    """Query-key pairs that a mask has: padded rows are masked whole; of a shared pair only the rejected response is.

    Its r = pair - L queries then meet L keys (training/sharing.py). A window that is shorter than a sequence is a mask too.
    """
    length = settings.length
    if settings.pair_tokens is not None:
        rejected = settings.batch * max(0, settings.pair_tokens - length) * length
        return rejected + (settings.batch * length**2 if _slides(facts, settings) else 0)
    return settings.sequences * length**2 if settings.sequences > 1 or _slides(facts, settings) else 0


def _slides(facts: ModelFacts, settings: Settings) -> bool:
    return facts.sliding_window is not None and settings.length > facts.sliding_window

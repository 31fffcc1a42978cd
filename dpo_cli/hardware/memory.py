"""The estimated memory: bytes by component at the peak of a training step, from the shape of a model. No torch.

Permanent memory (weights, adapter, gradients, optimizer) is counted from the model's shape. The memory of a micro-batch is in
activations.py. GB are 2^30 bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dpo_cli.hardware.activations import CHUNK_BYTES, offloaded_bytes, step_bytes
from dpo_cli.hardware.machine import GIB
from dpo_cli.hardware.memory_inputs import Settings, trained_parameters, trained_width
from dpo_cli.hardware.weights import divided_bytes, pinned_bytes, weight_bytes
from dpo_cli.models.shape import ModelFacts
from dpo_cli.results.validation import BillJson
from dpo_cli.strategies.strategies import STRATEGIES

# Bytes of optimizer state per trained weight, if it is not two moments of the weight's own width (AdamW): 8-bit states include
# their scales; Adafactor keeps a row and a column; SGD nothing. Paged states can leave the GPU, but return for the step.
MOMENTS = {"paged_adamw_32bit": 8.0, "adamw_8bit": 2.0, "paged_adamw_8bit": 2.0, "adafactor": 0.0, "sgd": 0.0}
CUDA_CONTEXT_BYTES = 0.5 * GIB  # driver context and the workspaces of cuBLAS; fitcheck-llm 0.3 assumes the same
ALLOCATOR_SLACK = 0.05  # share of the rest lost to fragmentation; fitcheck-llm 0.3 assumes the same
LIBRARIES_BYTES = 0.5 * GIB  # resident size of this program's imports on a CPU: `make memory` prints it


@dataclass(frozen=True)
class Bill:
    """Bytes by component; `budget_gb` is the memory of the hardware, if known, and `host_gb` the RAM that loading needs."""

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

    def to_json(self) -> BillJson:
        return {
            "total_gb": round(self.total_gb, 3),
            "components": {name: round(size / GIB, 3) for name, size in self.components.items()},
            "budget_gb": self.budget_gb,
            "fits": self.fits,
            "largest_change": self.largest_change,
        }


def bill(facts: ModelFacts, settings: Settings, budget_gb: float | None) -> Bill:
    """The memory that these settings need."""
    return Bill(components(facts, settings), budget_gb, host_bytes(facts, settings) / GIB)


def components(facts: ModelFacts, settings: Settings) -> dict[str, float]:
    """Bytes by component at the peak of a step."""
    trained, width = trained_parameters(facts, settings), trained_width(settings)
    frozen = weight_bytes(facts, settings)
    parts = {
        "weights": divided_bytes(facts, settings) if settings.is_divided else frozen,
        "adapter": trained * width if settings.rank else 0.0,
    }
    if STRATEGIES[settings.strategy].refers and settings.reference in ("copy", "adapter"):
        parts["reference"] = frozen if settings.reference == "copy" else parts["adapter"]
    parts["gradients"] = trained * width
    parts["optimizer"] = trained * MOMENTS.get(settings.optimizer, 2 * width)
    parts["activations"], parts["scoring"], gathered = step_bytes(facts, settings)
    parts |= {"gathered": gathered} if settings.is_divided else {}
    if STRATEGIES[settings.strategy].generates:
        parts["reward_model"] = settings.reward_bytes
        parts["sampling"] = max(0.0, sampling_bytes(facts, settings) - parts["activations"] - parts["scoring"])
    if settings.on_gpu:
        parts["cuda_context"] = CUDA_CONTEXT_BYTES
        parts["allocator_slack"] = ALLOCATOR_SLACK * sum(parts.values())
    return parts


@dataclass(frozen=True)
class EvaluationRoom:
    """The memory that an evaluation has, `free` bytes: what a training step needs and then frees."""

    free: float
    moment: float  # bytes per token at the widest moment of a block
    state: float  # bytes of a token's final state
    logits: float  # bytes of a token's logits in float32
    cached: float  # bytes per token of keys and values in all blocks, with the copy of a block's when a token is added
    layers: float  # bytes of a copy of all linear layers of the blocks

    def holds_rows(self, tokens: int, scored: int) -> bool:
        """Whether rows of so many tokens with padding, of which some are scored, can be scored at once.

        The largest of two moments: the reference in its blocks, and both models' logits, a chunk at a time. Rows that share
        their prompts need less.
        """
        in_blocks = tokens * self.moment + scored * self.state
        in_head = 2 * scored * self.state + 3 * min(CHUNK_BYTES, scored * self.logits)
        return max(in_blocks, in_head) <= self.free

    def holds_answers(self, count: int, width: int, more: float = 0.0) -> bool:
        """Whether so many prompts can be answered at once, each with its answer at most `width` tokens, and `more` bytes."""
        return more + count * (3 * self.logits + width * (self.moment + self.cached)) <= self.free


def freed_gb(components: Mapping[str, float]) -> float:
    """What a step of a bill needs and then frees, from its components in GB, as plan.json holds them, with what sampling needs
    in addition."""
    return components["activations"] + components["scoring"] + components.get("sampling", 0.0)


def evaluation_room(
    facts: ModelFacts, free: float, bytes_per_value: int, copies_head: bool = False, is_quantised: bool = False
) -> EvaluationRoom:
    """The room of an evaluation that has `free` bytes, with so many bytes per value.

    `copies_head`: to more bytes per value, with each layer in its turn, or to the order of a kernel; `is_quantised`: a layer is
    dequantised for its product.
    """
    h, width = facts.hidden_size, float(bytes_per_value)
    # The product of the MLP and its factors, states, keys and values repeated for each head, and a norm in float32.
    moment = width * (3 * facts.intermediate_size + 5 * h + 2 * facts.q) + 4 * h
    cached = width * 2 * facts.kv * (facts.num_hidden_layers + 1)
    layers = width * facts.linear_parameters
    copied = _copied_bytes(facts, width, copies_head, is_quantised)
    return EvaluationRoom(max(0.0, free - copied), moment, width * h, 4.0 * facts.vocab_size, cached, layers)


def _copied_bytes(facts: ModelFacts, width: float, copies_head: bool, is_quantised: bool) -> float:
    """The largest copy of weights that an evaluation makes, of the head or of a layer."""
    head = width * facts.vocab_size * facts.hidden_size if copies_head else 0.0
    layer = width * max(linear.parameters for linear in facts.linears) if is_quantised or copies_head else 0.0
    return max(head, layer)


def sampling_bytes(facts: ModelFacts, settings: Settings) -> float:
    """What it takes to sample as many answers at once as a micro-batch has: keys and values in all blocks, and the prompts.

    More are sampled at once if a training step frees more than this: `EvaluationRoom.holds_answers`.
    """
    width, packs_head = settings.bytes_per_value, not settings.on_gpu and settings.bytes_per_value == 2
    room = evaluation_room(facts, 0.0, width, packs_head, settings.bits is not None)
    copied = _copied_bytes(facts, width, packs_head, settings.bits is not None)
    return copied + settings.sequences * (3 * room.logits + settings.length * (room.moment + room.cached))


def host_bytes(facts: ModelFacts, settings: Settings) -> float:
    """The RAM of the machine that the run needs.

    transformers maps safetensors and copies one tensor at a time to the GPU, so a GPU run holds the libraries and the largest
    tensor twice, in the file's 16 bits and converted. A CPU run holds everything, and the pages of the file. A GGUF file is
    first converted to a whole float32 model. Weights that are divided are whole in the RAM while they are loaded.
    """
    if settings.on_gpu:
        loaded = 2 * 2.0 * facts.vocab_size * facts.hidden_size
        pinned = pinned_bytes(facts, settings) if settings.in_ram else 0.0
        loaded += max(weight_bytes(facts, settings), pinned) if settings.is_divided else 0.0
        loaded += offloaded_bytes(facts, settings)
    else:
        loaded = sum(components(facts, settings).values()) + 2.0 * facts.parameters
    return LIBRARIES_BYTES + max(loaded, 4.0 * facts.parameters if facts.from_gguf else 0.0)

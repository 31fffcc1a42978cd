"""The memory of a micro-batch of T tokens: the largest of the moments of a step. No torch.

    the head             everything that the blocks keep for the backward pass + one chunk of logits
    the reference        the same + the widest moment of one block's forward, its adapter off   (dpo and rlhf)
    a block's backward   the same + that block, recomputed when it was checkpointed, with its gradients

The bytes per token are those of the tensors that autograd saves in a step of this program. benchmarks/step_memory.py
measures the live memory at the peak of such a step, and tests/test_memory.py compares the estimate with it.
Names: h hidden, i intermediate, q and kv the widths of queries and of keys or values, L the longest sequence, w bytes
per value.
"""

from __future__ import annotations

from dpo_cli.hardware.memory_inputs import Settings, targets_of, trained_parameters, trained_width, whole_parameters
from dpo_cli.hardware.weights import gathered_bytes
from dpo_cli.models.shape import ModelFacts
from dpo_cli.strategies.strategies import STRATEGIES

STASHED = 5  # tensors that wait for their copy into the RAM (TRL 1.15, OffloadActivations)
CHUNK_BYTES = 1 << 26  # float32 logits that the head computes at a time (scoring/lm_head.py, CHUNK_ELEMENTS)


def step_bytes(facts: ModelFacts, settings: Settings) -> tuple[float, float, float]:
    """(activations, scoring, whole blocks of divided weights) at the peak of a micro-batch."""
    width, tokens = settings.bytes_per_value, settings.tokens
    h, i = facts.hidden_size, facts.intermediate_size
    block = _block_bytes(facts, settings)
    kept = _kept_bytes(facts, settings) - offloaded_bytes(facts, settings)
    if width < 4 and trained_width(settings) == 4:  # autocast keeps 16-bit copies of the weights it multiplies with
        kept += width * _multiplied(facts, settings)
    kept += _masked(facts, settings)  # the mask, one byte per query and key, shared by all blocks
    end = tokens * (
        4 * h + width * h
    )  # the final norm's float32 input and its result; freed before the backward pass of the blocks
    states = settings.scored * h * (width + 4)  # the states that go through the head, and their gradient

    # Gradients of the MLP's product and its factors, and of the float32 copies that adapters on it read.
    has_mlp_copies = settings.copies_inputs and any(
        linear.reads in ("mlp", "product") for linear in targets_of(facts, settings)
    )
    backward: float = tokens * width * ((3 if settings.copies_inputs else 2) * i + (5 if has_mlp_copies else 1) * h)
    backward += block if settings.checkpointing else end
    forward: float = end + tokens * width * (3 * i + 4 * h)
    if settings.bits:  # a layer is dequantised for its multiplication
        one_layer = width * max(linear.parameters for linear in facts.linears)
        backward, forward = backward + one_layer, forward + one_layer
    refers = STRATEGIES[settings.strategy].refers and settings.reference != "cache"
    head = states + _logits_bytes(facts, settings) + _head_gradient_bytes(facts, settings)
    whole = gathered_bytes(facts, settings)
    moments = [(kept + end, head, 0.0), (kept + backward, 0.0, whole)]
    # At the end of the backward pass a micro-batch's gradients exist next to those of earlier ones (scoring/oom.py). Those of
    # the last block come while its tensors go: at the peak there are about half of both.
    new_gradients: float = trained_parameters(facts, settings) * trained_width(settings)
    if settings.rank:
        new_gradients *= 1 - 0.5 / facts.num_hidden_layers
    last_block = backward if settings.checkpointing else block + backward - end
    moments.append((last_block + new_gradients, 0.0, whole))
    if refers:
        moments.append((forward, settings.scored * h * width, whole))  # before the policy's forward pass, which keeps more
    return max(moments, key=sum)


def _kept_bytes(facts: ModelFacts, settings: Settings) -> float:
    """What all blocks keep for the backward pass.

    A checkpointed block keeps its input. In 8 bits it also keeps the input of each layer, because bitsandbytes 0.50 stores it
    as an attribute of its autograd function (MatMul8bitFp, `ctx.A`), where checkpointing cannot free it.
    """
    if not settings.checkpointing:
        return facts.num_hidden_layers * _block_bytes(facts, settings)
    inputs = {linear.reads: linear.inputs for linear in facts.linears}
    checkpoint = facts.hidden_size + (sum(inputs.values()) if settings.bits == 8 else 0)
    return float(facts.num_hidden_layers * settings.tokens * settings.bytes_per_value * checkpoint)


def offloaded_bytes(facts: ModelFacts, settings: Settings) -> float:
    """What blocks keep in the RAM: all but what waits for its copy, and for the backward pass of the last block."""
    if not settings.offloads:
        return 0.0
    widest = facts.hidden_size if settings.checkpointing else max(facts.hidden_size, facts.intermediate_size)
    waiting = STASHED * settings.tokens * settings.bytes_per_value * widest
    last = 0.0 if settings.checkpointing else _block_bytes(facts, settings)
    return max(0.0, _kept_bytes(facts, settings) - waiting - last)


def _logits_bytes(facts: ModelFacts, settings: Settings) -> float:
    """The peak of the head: float32 logits and their log-softmax, a chunk at a time; a score head has neither."""
    if STRATEGIES[settings.strategy].gives_rewards:
        return 0.0
    return 2.0 * min(CHUNK_BYTES, 4 * settings.scored * facts.vocab_size)


def _multiplied(facts: ModelFacts, settings: Settings) -> int:
    """Trained float32 weights that autocast casts for a block; recomputed blocks of a whole model cast them again.

    A fused layer casts its adapter for each product.
    """
    if settings.rank:
        return whole_parameters(facts, settings) if settings.is_fused else trained_parameters(facts, settings)
    return 0 if settings.checkpointing else facts.linear_parameters


def _head_gradient_bytes(facts: ModelFacts, settings: Settings) -> float:
    """If the head is trained: its gradient in float32, the gradient of a chunk, and its copy in 16 bits."""
    if settings.rank and "lm_head" not in settings.whole_modules:
        return 0.0
    width = settings.bytes_per_value
    return float(facts.vocab_size * facts.hidden_size * (4 + (2 * width if width < 4 else width)))


def _block_bytes(facts: ModelFacts, settings: Settings) -> float:
    """The bytes that one block keeps for the backward pass of a micro-batch.

    Per token: in the compute dtype the attention's q, k, v and output (2q + 2kv), the MLP's gate, up and silu(gate) (3i), and
    for each adapted layer its input and the product with A (r); in float32 the input of each norm (Qwen 3, Gemma 3 and
    OLMo 2 also have norms on q and k), and one number per head and norm.
    """
    width, tokens, heads = float(settings.bytes_per_value), settings.tokens, facts.num_attention_heads
    q, kv = facts.q, facts.kv
    targets = targets_of(facts, settings) if settings.rank and settings.bits != 8 else list(facts.linears)
    inputs = {linear.reads: linear.inputs for linear in targets}
    is_shared = settings.pair_tokens is not None
    if settings.copies_inputs:
        read = sum(linear.inputs for linear in targets)
    else:  # the attention output of a padded row is read without a copy
        read = sum(size for name, size in inputs.items() if is_shared or name != "attention")
    each = width * (read + settings.rank * len(targets) + 2 * q + 2 * kv + 3 * facts.intermediate_size)
    if settings.rank and settings.dropout:  # the dropout mask: a byte per value on a GPU, a number on a CPU
        each += sum(linear.inputs for linear in targets) * (1.0 if settings.on_gpu else float(trained_width(settings)))
    if settings.dora:  # the outputs of the base layer and the adapter, which the magnitude scales
        each += 2 * width * sum(linear.outputs for linear in targets)
    each += 4.0 * (facts.norms * (facts.hidden_size + 1) + heads)
    if not settings.rank:  # the norms are trained too, and keep their normalised inputs
        each += 4.0 * facts.norms * facts.hidden_size
    if facts.has_qk_norm:
        each += 4 * (q + kv + heads + facts.num_key_value_heads)
    return tokens * each + _attention_bytes(facts, settings)


def _attention_bytes(facts: ModelFacts, settings: Settings) -> float:
    """The bytes that a block's attention keeps in addition to its inputs and output.

    With a mask, SDPA needs keys and values repeated for each query head, and the mask in the compute dtype. Without a fused
    kernel, as with a soft-cap (Gemma 2), each pair of query and key keeps the softmax in float32, and the probabilities and
    the capped scores in the compute dtype.
    """
    width, length = float(settings.bytes_per_value), settings.length
    extra = width * _masked(facts, settings)
    if settings.pair_tokens is not None:
        repeated: float = max(settings.batch * length, settings.row_tokens) * 2 * facts.q
        if _slides(facts, settings):  # the chosen response has a mask too
            repeated += settings.batch * length * 2 * (facts.q - facts.kv)
    else:
        repeated = settings.tokens * 2 * (facts.q - facts.kv) if _masked(facts, settings) else 0
    extra += width * repeated
    if facts.attn_logit_softcapping is not None or not settings.fused_attention:
        pairs = settings.sequences * length**2
        if settings.pair_tokens is not None:  # in a shared pair only the rejected response reads all its keys again
            pairs = settings.batch * (length + max(0, settings.pair_tokens - length)) * length
        extra += pairs * facts.num_attention_heads * (2 * width + 4)
    return extra


def _masked(facts: ModelFacts, settings: Settings) -> int:
    """The query-key pairs with a mask: whole padded rows; in a shared pair only the rejected response.

    Its r = pair - L queries then read L keys (scoring/shared_prompts.py). A window shorter than a sequence needs a mask too.
    """
    length = settings.length
    if settings.pair_tokens is not None:
        rejected = settings.batch * max(0, settings.pair_tokens - length) * length
        return rejected + (settings.batch * length**2 if _slides(facts, settings) else 0)
    return settings.sequences * length**2 if settings.sequences > 1 or _slides(facts, settings) else 0


def _slides(facts: ModelFacts, settings: Settings) -> bool:
    return facts.sliding_window is not None and settings.length > facts.sliding_window

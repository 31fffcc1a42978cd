"""The settings that decide the memory of a run, and the number of trained weights. No torch."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from dpo_cli.config.division_rules import divides_weights, obstacle_to_division
from dpo_cli.config.options import Config
from dpo_cli.config.rules import compares_pairs, fuses_adapter
from dpo_cli.models import target_layers
from dpo_cli.models.shape import Linear, ModelFacts
from dpo_cli.strategies.strategies import STRATEGIES


@dataclass(frozen=True)
class Longest:
    """Tokens of the longest rows of a training, if known."""

    sequence: int | None = None
    pair: int | None = None  # its prompt counted once, if prompts are shared
    responses: int | None = None  # of both responses of a pair together
    prompt: int | None = None  # the longest prompt to train on


# A row takes more pairs than a micro-batch names, up to this many tokens: small products leave a processor idle.
ROW_TOKENS = {"cpu": 512}


@dataclass(frozen=True)
class Settings:
    """The settings that decide the memory of a run. The last group is for comparisons with other tools."""

    batch: int  # pairs per forward pass (sft: sequences; rlhf: samples)
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
    dora: bool = False  # the adapter has a magnitude for each output too (arXiv:2402.09353)
    fuses: bool = True  # the layers that can be: see `is_fused`
    whole_modules: tuple[str, ...] = ()  # trained in addition to the adapter: "modules_to_save"
    on_gpu: bool = True
    pair_tokens: int | None = None  # of the longest pair, its prompt counted once, if prompts are shared and lengths known
    response_tokens: int | None = None  # scored tokens of the longest pair, if lengths are known
    row_tokens: int = 0  # tokens up to which a row takes more pairs than `batch`
    is_whole: bool = False  # the loss compares the pairs of a micro-batch, which is then never split
    reward_bytes: float = 0.0  # of the weights of a reward model

    shards: int = 1  # processes over which the frozen weights are divided
    in_ram: bool = False  # the frozen weights of the blocks wait in the RAM
    can_divide: bool = True  # nothing needs the frozen weights whole
    offloads: bool = False  # activations wait in the RAM

    reference: str = "off"  # the adapter off; "adapter": a frozen one; "copy": a second model; "cache": computed before
    fused_attention: bool = True  # false: the probabilities are kept, as in eager attention

    @classmethod
    def of(cls, config: Config, facts: ModelFacts, longest: Longest) -> Settings:
        """The settings of a config with decided device and precision, with the real lengths if they are known."""
        targets, values = config.target_modules, config.to_json()
        if STRATEGIES[config.strategy].generates:
            longest = Longest(longest_sample(config, longest.prompt or longest.sequence), None, config.max_new_tokens)
        # Flash attention needs 16 bits and a card with bf16, and SDPA's other kernel does not support grouped keys.
        is_unfused = config.device == "cuda" and not config.bf16 and facts.q != facts.kv
        settings = cls(
            batch=config.per_device_train_batch_size,
            length=min(config.max_seq_length, longest.sequence or config.max_seq_length),
            pair_tokens=longest.pair,
            response_tokens=longest.responses,
            rank=config.lora_r,
            target_modules=targets if isinstance(targets, str) else tuple(targets),
            strategy=config.strategy,
            reference="adapter" if config.reference == "adapter" else "off" if config.lora_r else "copy",
            bits=4 if config.use_4bit else 8 if config.use_8bit else None,
            nested_quantisation=config.use_nested_quant,
            optimizer=config.optim,
            bytes_per_value=2 if config.bf16 or config.fp16 else 4,
            checkpointing=config.gradient_checkpointing is True,
            fp16=bool(config.fp16),
            dropout=config.lora_dropout > 0 and not STRATEGIES[config.strategy].generates,
            dora=config.use_dora,
            fuses=fuses_adapter(config.provider),
            whole_modules=tuple(config.modules_to_save or ()),
            on_gpu=config.device == "cuda",
            is_whole=compares_pairs(config),
            shards=int(config.num_processes) if divides_weights(values) else 1,
            in_ram=config.cpu_offload,
            can_divide=obstacle_to_division(values) is None,
            offloads=config.activation_offloading and config.device == "cuda",
            fused_attention=not is_unfused,
        )
        if settings.is_whole:
            return settings
        pairs = config.per_device_train_batch_size * config.gradient_accumulation_steps
        of_step = pairs * replace(settings, batch=1).tokens
        return replace(settings, row_tokens=min(ROW_TOKENS.get(config.device, 0), of_step))

    @property
    def is_divided(self) -> bool:
        """Whether a block of the model is whole on the device only while it runs (providers/sharding.py)."""
        return self.shards > 1 or self.in_ram

    @property
    def sequences(self) -> int:
        return self.batch * STRATEGIES[self.strategy].sequences

    @property
    def tokens(self) -> int:
        """Tokens of a row of the model: of a micro-batch, or of the pairs that fill it."""
        padded = self.sequences * self.length
        named = padded if self.pair_tokens is None else min(self.batch * self.pair_tokens, padded)
        return max(named, self.row_tokens)

    @property
    def scored(self) -> int:
        """Tokens of a row that go through the head: of a reward model the last one of each response."""
        if STRATEGIES[self.strategy].gives_rewards:
            return self.sequences
        if self.response_tokens is None:
            return self.tokens
        return min(max(self.batch * self.response_tokens, self.row_tokens), self.tokens)

    @property
    def is_fused(self) -> bool:
        """Whether an adapted layer runs as one function (scoring/lora_linear.py), and not PEFT's way."""
        return self.fuses and self.rank > 0 and not (self.dropout or self.dora or self.bits == 8)

    @property
    def copies_inputs(self) -> bool:
        """Whether each adapted layer keeps its own copy of its input.

        Layers that are fused share the input that they read. PEFT casts the input to the adapter's float32, and autocast casts
        it back to 16 bits, once per layer. Adapters on quantised weights are in bf16 (TRL 1.15, DPOTrainer;
        training/dpo_trainer.py, except for fp16), and in float32 nothing is cast: then layers share their input as well,
        unless dropout gives each its own.
        """
        casts = self.bytes_per_value < 4 and (self.bits is None or self.fp16) and not self.is_fused
        return self.rank > 0 and (self.dropout or casts)


def longest_sample(config: Config, prompt: int | None) -> int:
    """Tokens of the longest prompt, which is cut where it leaves no room, with the longest answer that is sampled to it."""
    return min(config.max_seq_length, prompt + config.max_new_tokens) if prompt else config.max_seq_length


def trained_parameters(facts: ModelFacts, settings: Settings) -> int:
    """A LoRA adapter of rank r on an (in, out) layer has r * (in + out) weights (arXiv:2106.09685, section 4.1)."""
    if settings.rank == 0:
        return facts.parameters
    counts = _target_counts(facts, settings.target_modules)
    linears = [linear for linear in facts.linears if linear.name not in settings.whole_modules]  # these get no adapter
    sizes = settings.rank * sum(counts[linear.name] * (linear.inputs + linear.outputs) for linear in linears)
    magnitudes = sum(counts[linear.name] * linear.outputs for linear in linears) if settings.dora else 0
    return sizes + magnitudes + whole_parameters(facts, settings)


def whole_parameters(facts: ModelFacts, settings: Settings) -> int:
    """Weights that are trained in addition to an adapter."""
    whole = sum(linear.parameters for linear in facts.linears if linear.name in settings.whole_modules)
    tables = len({"embed_tokens", "lm_head"} & set(settings.whole_modules)) * facts.vocab_size * facts.hidden_size
    return facts.num_hidden_layers * whole + tables


def trained_width(settings: Settings) -> int:
    """Bytes per trained weight: TRL holds an adapter on quantised weights in bf16, PEFT any other in float32."""
    return 2 if settings.bits and not settings.fp16 else 4


def targets_of(facts: ModelFacts, settings: Settings) -> list[Linear]:
    """The layers of a block with an adapter; a layer that a regular expression matches in one block counts for all."""
    counts = _target_counts(facts, settings.target_modules)
    return [linear for linear in facts.linears if counts[linear.name]]


@functools.cache
def _target_counts(facts: ModelFacts, wanted: str | tuple[str, ...]) -> dict[str, int]:
    """For each linear layer, the number of blocks with an adapter on it."""
    return {name: sum(target_layers.names(wanted, whole) for whole in each) for name, each in facts.linear_names().items()}

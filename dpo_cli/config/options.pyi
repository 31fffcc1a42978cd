# Written by `make reference` from schema.json.
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

@dataclass(frozen=True)
class Config:
    strategy: Literal['dpo', 'kto', 'sft', 'reward', 'rlhf', 'qlora']
    task: Literal['text-generation']
    model_name: str
    revision: str | None
    dataset: str | list[Any]
    eval_dataset: str | list[Any] | None
    provider: Literal['huggingface', 'unsloth']
    compute_specs: Literal['low_end', 'mid_range', 'high_end'] | None
    output_dir: str | None
    seed: int
    full_determinism: bool
    device: Literal['auto', 'cpu', 'cuda', 'mps']
    num_processes: int | str
    ddp_timeout: int
    stages: list[Any] | None
    compare: dict[str, Any]
    num_train_epochs: float
    max_steps: int | None
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    learning_rate: float
    lr_scheduler_type: Literal['linear', 'cosine', 'polynomial', 'constant', 'constant_with_warmup']
    warmup_ratio: float
    warmup_steps: int | None
    optim: Literal['adamw_torch_fused', 'adamw_torch', 'adamw_8bit', 'paged_adamw_32bit', 'paged_adamw_8bit', 'adafactor', 'sgd']
    weight_decay: float
    max_grad_norm: float
    group_by_length: bool
    packing: bool
    beta: float
    loss_type: str | list[Any]
    desirable_weight: float
    undesirable_weight: float
    loss_weights: list[Any] | None
    f_divergence_type: Literal['reverse_kl', 'forward_kl', 'js_divergence', 'alpha_divergence']
    f_alpha_divergence_coef: float
    ld_alpha: float | None
    use_weighting: bool
    label_smoothing: float
    reference: Literal['auto', 'base', 'adapter', 'first']
    prompt_sharing: Literal[True, False, 'auto']
    reward_model: str | None
    reward_functions: list[Any]
    prompts_file: str | None
    rl_algorithm: Literal['rloo', 'grpo']
    num_generations: int
    temperature: float
    num_iterations: int
    epsilon: float
    max_kl: float | None
    kl_prompts: int
    max_new_tokens: int
    stop_on: list[Any]
    lora_r: int
    lora_alpha: int | None
    lora_dropout: float
    target_modules: str | list[Any]
    modules_to_save: list[Any] | None
    use_rslora: bool
    use_dora: bool
    use_4bit: bool
    use_8bit: bool
    bnb_4bit_compute_dtype: Literal['bfloat16', 'float16', 'float32'] | None
    bnb_4bit_quant_type: Literal['nf4', 'fp4']
    use_nested_quant: bool
    bf16: bool | None
    fp16: bool | None
    gradient_checkpointing: Literal[True, False, 'auto']
    activation_offloading: bool
    fsdp: Literal[True, False, 'auto']
    cpu_offload: bool
    max_seq_length: int
    eval_split: float
    split_seed: int | None
    columns: dict[str, Any] | None
    quality: dict[str, Any]
    on_bad_rows: Literal['stop', 'skip']
    use_chat_template: Literal[True, False, 'auto']
    augment: dict[str, Any]
    rounds: int | None
    eval_steps: int | None
    per_device_eval_batch_size: int
    logging_steps: int
    save_steps: int | None
    early_stopping_patience: int | None
    report_to: str | list[Any]
    push_to_hub: bool
    hub_model_id: str | None

    def replaced(self, values: Mapping[str, object]) -> Config: ...
    def to_json(self) -> dict[str, Any]: ...

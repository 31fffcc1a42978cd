"""Rules between options. Each rule is one function that yields problems; `RULES` at the end lists them.

A rule receives the values that passed the schema, with defaults filled in, and the values that the user gave.
It reads with `.get`, because a value that failed the schema is absent.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from dpo_cli.config import augment_rules, compare_rules, division_rules, rating_rules, reward_rules
from dpo_cli.config.division_rules import is_shared
from dpo_cli.config.options import Config
from dpo_cli.config.other_tools import as_here
from dpo_cli.config.schema import Values, names_where, options, same
from dpo_cli.errors import Problem
from dpo_cli.strategies.strategies import STRATEGIES

Rule = Callable[[Values, Values], Iterator[Problem]]

POLYNOMIAL_END = 1e-7  # transformers 5.17, get_polynomial_decay_schedule_with_warmup: lr_end
NAME_BYTES, PATH_BYTES = 255, 4096 - 256  # a file name on nearly all disks; a path on Linux, less the files inside a run
SMOOTHED_LOSSES = ("robust", "exo_pair", "aot", "aot_unpaired")  # TRL 1.15, DPOTrainer: the others ignore label_smoothing
# Those of which f_divergence_type changes the scores (TRL 1.15, DPOTrainer).
DIVERGING_LOSSES = ("sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm")


def default_model(values: Values, given: Values) -> Iterator[Problem]:
    if "model_name" not in given and "model_name" in values:
        message = f'"model_name" is missing: the default is {values["model_name"]}, the model of the documented examples'
        yield Problem("warning", "default-model", message, 'name your model in "model_name"', "model_name")


def qlora_is_sft(values: Values, given: Values) -> Iterator[Problem]:
    if given.get("strategy") != "qlora":
        return
    fix = 'write "strategy": "sft", "use_4bit": true; for preference pairs "strategy": "dpo", "use_4bit": true'
    if given.get("use_4bit") is False:
        yield Problem("error", "qlora-without-4bit", "qlora means 4-bit weights, but use_4bit is false", fix, "use_4bit")
    else:
        yield Problem("hint", "qlora", "qlora is read as sft with use_4bit", fix, "strategy")


def belongs_to_strategy(values: Values, given: Values) -> Iterator[Problem]:
    strategy = values.get("strategy")
    for name in sorted(given.keys() & options().keys()):
        option = options()[name]
        if strategy and strategy not in option.strategies and not same(given[name], option.default()):
            message = f'"{name}" has no effect with strategy {strategy}: it belongs to {" and ".join(option.strategies)}'
            yield Problem("warning", "other-strategy", message, "remove the key", name)


def has_an_effect(values: Values, given: Values) -> Iterator[Problem]:
    """Check what an option needs from other options (x-needs in the schema)."""
    for name in sorted(given.keys() & options().keys() & values.keys()):
        option = options()[name]
        if same(values[name], option.default()):
            continue
        for other, wanted in option.needs.items():
            if other in values and not any(same(values[other], value) for value in wanted):
                message = f'"{name}" has no effect: "{other}" is {json.dumps(values[other])}'
                choices = " or ".join(json.dumps(value) for value in wanted)
                yield Problem("warning", "no-effect", message, f'write "{other}": {choices}, or remove "{name}"', name)


def stages_stand_in_the_file(values: Values, given: Values) -> Iterator[Problem]:
    """stages.py splits the stages of a file before its configs are checked; none may remain."""
    if values.get("stages") is not None:
        message = "stages cannot be given inside a stage or on the command line"
        yield Problem("error", "stages-within", message, "write one list of stages into the config file", "stages")


def one_precision(values: Values, given: Values) -> Iterator[Problem]:
    if values.get("bf16") and values.get("fp16"):
        yield Problem(
            "error",
            "two-precisions",
            "bf16 and fp16 are both true",
            "keep one of them: bf16 if the hardware supports it",
            "fp16",
        )


def one_quantisation(values: Values, given: Values) -> Iterator[Problem]:
    if values.get("use_4bit") and values.get("use_8bit"):
        fix = "keep one of them: use_4bit needs half the memory"
        yield Problem("error", "two-quantisations", "use_4bit and use_8bit are both true", fix, "use_8bit")


def one_warmup(values: Values, given: Values) -> Iterator[Problem]:
    if values.get("warmup_steps") and values.get("warmup_ratio"):
        message = "warmup_steps and warmup_ratio both set the length of the warm-up"
        yield Problem("error", "two-warmups", message, "remove one of them", "warmup_ratio")


def decay_goes_down(values: Values, given: Values) -> Iterator[Problem]:
    rate = values.get("learning_rate")
    if values.get("lr_scheduler_type") == "polynomial" and rate is not None and rate <= POLYNOMIAL_END:
        message = f"polynomial decays to {POLYNOMIAL_END:g}, but learning_rate is only {rate:g}"
        yield Problem("error", "rate-below-end", message, 'write "lr_scheduler_type": "linear"', "lr_scheduler_type")


def columns_agree(values: Values, given: Values) -> Iterator[Problem]:
    columns = values.get("columns") or {}
    responses, scores, labels = (columns.get(name) for name in ("responses", "scores", "labels"))

    def problem(message: str, fix: str) -> Problem:
        return Problem("error", "columns-disagree", message, fix, "columns")

    if responses is not None and {"chosen", "rejected"} & columns.keys():
        fix = 'name the label with "preferred" instead of "chosen", or remove "responses"'
        yield problem('"columns" names both responses and chosen or rejected', fix)
    if isinstance(responses, list) and scores is not None and (isinstance(scores, str) or len(scores) != len(responses)):
        yield problem(
            'the number of scores in "columns" differs from the number of responses',
            "name a column of scores for each response",
        )
    if labels is not None and isinstance(responses, list) and not 0 <= len(labels) - len(responses) <= 1:
        message = f'"columns" gives {len(labels)} labels for {len(responses)} responses'
        yield problem(message, "give the label value of each response, in their order, and optionally one more for a tie")


def one_length_of_training(values: Values, given: Values) -> Iterator[Problem]:
    steps = values.get("max_steps")
    if steps is not None and "num_train_epochs" in given:
        message = f"max_steps is {steps}, so num_train_epochs has no effect"
        yield Problem("hint", "epochs-ignored", message, "remove one of them", "num_train_epochs")


def one_evaluation_set(values: Values, given: Values) -> Iterator[Problem]:
    if values.get("eval_dataset") is not None and values.get("eval_split"):
        message = "eval_dataset and eval_split both set the evaluation data"
        yield Problem("error", "two-evaluation-sets", message, "remove one of them", "eval_split")


def evaluation_set_is_another(values: Values, given: Values) -> Iterator[Problem]:
    if "dataset" in values and _same_place(values.get("eval_dataset"), values["dataset"]):
        message = "eval_dataset is also the training dataset, so its figures would only measure memorisation"
        yield Problem("error", "eval-is-train", message, 'hold out a share with "eval_split": 0.1 instead', "eval_dataset")


def some_set_is_whole(values: Values, given: Values) -> Iterator[Problem]:
    dataset = values.get("dataset")
    entries = dataset if isinstance(dataset, list) else []
    weights = [entry.get("weight", 1) if isinstance(entry, dict) else 1 for entry in entries]
    if weights and max(weights) < 1:
        message = f"every dataset has a weight below 1, so an epoch uses at most {max(weights):.0%} of each"
        fix = "a weight is how often a pair is used in an epoch: write 1 to use every pair once"
        yield Problem("hint", "weights-below-one", message, fix, "dataset")


def weights_are_of_training(values: Values, given: Values) -> Iterator[Problem]:
    entries = values.get("eval_dataset")
    if isinstance(entries, list) and any(isinstance(entry, dict) and entry.get("weight", 1) != 1 for entry in entries):
        message = "a weight in eval_dataset has no effect: each of its pairs is evaluated once"
        yield Problem("warning", "no-effect", message, "remove the weight", "eval_dataset")


def evaluation_has_data(values: Values, given: Values) -> Iterator[Problem]:
    if values.get("eval_split") != 0 or values.get("eval_dataset") is not None:
        return
    for name in names_where(lambda option: option.needs_held_out):
        if given.get(name) is not None:
            message = f"{name} has no effect: nothing is held out"
            yield Problem("warning", "nothing-to-evaluate", message, 'write "eval_split": 0.1, for example', name)


def best_checkpoint_is_judged(values: Values, given: Values) -> Iterator[Problem]:
    """Early stopping returns to the best evaluation, so each needs a checkpoint (transformers requires it too)."""
    save, judge = values.get("save_steps"), values.get("eval_steps")
    if values.get("early_stopping_patience") is not None and save and judge and save % judge:
        message = f"save_steps {save} is not a multiple of eval_steps {judge}, as early stopping needs"
        yield Problem("error", "save-eval-steps", message, f'write "save_steps": {(save // judge + 1) * judge}', "save_steps")


def losses(values: Values) -> list[str]:
    """The losses of loss_type, which is one name or a list."""
    named = values.get("loss_type", [])
    return [named] if isinstance(named, str) else list(named)


def compares_pairs(config: Config) -> bool:
    """Whether the loss of a config compares the pairs of a micro-batch; `loss_type` may be one that its strategy has not."""
    return config.strategy in options()["loss_type"].strategies and sorts_pairs(config.loss_type)


def sorts_pairs(loss_type: str | Sequence[str]) -> bool:
    """Whether a loss compares the sorted pairs of a micro-batch (AOT, arXiv:2406.05882), so that splitting it changes it.

    In TRL 1.15 no other does. The token mean of `sft` is over the whole step (training/dpo_trainer.py).
    """
    return any(name.startswith("aot") for name in ([loss_type] if isinstance(loss_type, str) else loss_type))


def several_processes_can_share(values: Values, given: Values) -> Iterator[Problem]:
    if not is_shared(values):
        return
    reasons = {
        "provider": (values.get("provider") == "unsloth", "Unsloth's own kernels are made for one GPU", '"huggingface"'),
        "loss_type": (
            sorts_pairs(values.get("loss_type", ())),
            "its loss compares the pairs of a whole micro-batch, which cannot be divided",
            '"sigmoid"',
        ),
        "rounds": (values.get("rounds") is not None, "the answers of a round are sampled in one process", "null"),
    }
    for name, (stops, why, other) in reasons.items():
        if stops:
            message = f'"{name}": {json.dumps(values[name])} trains in one process: {why}'
            yield Problem("error", "one-process", message, f'write "num_processes": 1, or "{name}": {other}', "num_processes")


def processes_have_pairs(values: Values, given: Values) -> Iterator[Problem]:
    names = ("num_processes", "per_device_train_batch_size", "gradient_accumulation_steps")
    processes, batch, accumulation = (values.get(name) for name in names)
    if isinstance(processes, int) and batch and accumulation and processes > batch * accumulation:
        rows = batch * accumulation
        message = f"a step has {rows} pairs or rows, so that {processes - rows} of {processes} processes have nothing to do"
        larger = f'"gradient_accumulation_steps": {math.ceil(processes / batch)}'
        fix = f'write "num_processes": {rows}, or, for larger and fewer steps, {larger}'
        yield Problem("warning", "idle-processes", message, fix, "num_processes")


# What the number of processes decides, which may be known only when they start.
OF_PROCESSES: tuple[Rule, ...] = (
    several_processes_can_share,
    processes_have_pairs,
    *division_rules.RULES,
)


def fuses_adapter(provider: str) -> bool:
    """Whether dpo runs an adapted layer as one function (scoring/lora_linear.py): Unsloth has kernels of its own."""
    return provider != "unsloth"


def smoothing_needs_its_loss(values: Values, given: Values) -> Iterator[Problem]:
    named, smoothing = losses(values), values.get("label_smoothing")
    if named and smoothing and not set(named) & set(SMOOTHED_LOSSES):
        message = f"the loss {' + '.join(named)} ignores label_smoothing {smoothing:g}"
        fix = f'write "loss_type": "robust" ({", ".join(SMOOTHED_LOSSES[1:])} support it too), or remove label_smoothing'
        yield Problem("error", "label-smoothing-ignored", message, fix, "label_smoothing")


def loss_needs_its_smoothing(values: Values, given: Values) -> Iterator[Problem]:
    if values.get("label_smoothing") != 0:
        return
    if "exo_pair" in losses(values):
        message, fix = (
            "the loss exo_pair needs label_smoothing above 0",
            'write "label_smoothing": 0.001, the value of its paper',
        )
        yield Problem("error", "loss-needs-smoothing", message, fix, "loss_type")
    elif "robust" in losses(values):
        message = "the loss robust with label_smoothing 0 is plain DPO"
        fix = 'write the expected share of flipped labels, for example "label_smoothing": 0.1'
        yield Problem("warning", "loss-needs-smoothing", message, fix, "loss_type")


def divergence_needs_its_loss(values: Values, given: Values) -> Iterator[Problem]:
    named, divergence = losses(values), values.get("f_divergence_type")
    if named and divergence not in (None, "reverse_kl") and not set(named) & set(DIVERGING_LOSSES):
        message = f"the loss {' + '.join(named)} ignores f_divergence_type {divergence}"
        fix = f'write "loss_type": "sigmoid" ({", ".join(DIVERGING_LOSSES[1:])} use it too), or remove f_divergence_type'
        yield Problem("error", "divergence-ignored", message, fix, "f_divergence_type")


def weighting_is_of_pairs(values: Values, given: Values) -> Iterator[Problem]:
    """WPO multiplies the loss of each pair: of a sum over tokens, or of sorted pairs, that is another loss than the paper's."""
    others = [name for name in losses(values) if name == "sft" or sorts_pairs(name)]
    if values.get("use_weighting") and others:
        message = f"use_weighting weighs the loss of each pair, and {others[0]} is not a loss of single pairs"
        fix = f'write "use_weighting": false, or "loss_type": "sigmoid" instead of {others[0]}'
        yield Problem("error", "weighting-of-pairs", message, fix, "use_weighting")


def stopping_watches_the_plain_loss(values: Values, given: Values) -> Iterator[Problem]:
    weighs = [name for name in ("ld_alpha", "use_weighting") if values.get(name) not in (None, False)]
    if weighs and values.get("early_stopping_patience") is not None:
        message = f"with {weighs[0]} an evaluation has no trained loss, and early stopping watches the plain one, `loss`"
        yield Problem(
            "hint", "stopping-plain-loss", message, f"remove {weighs[0]}, or remove early_stopping_patience", weighs[0]
        )


def one_weight_a_loss(values: Values, given: Values) -> Iterator[Problem]:
    named, weights = losses(values), values.get("loss_weights")
    if named and weights is not None and len(weights) != len(named):
        message = f"loss_weights has {len(weights)} weights for {len(named)} losses ({', '.join(named)})"
        yield Problem("error", "loss-weights", message, "write one weight for each loss in loss_type", "loss_weights")


def sorted_loss_has_a_batch(values: Values, given: Values) -> Iterator[Problem]:
    """AOT (arXiv:2406.05882) sorts the log-ratios of a micro-batch; a single pair is sorted already."""
    sorting = [name for name in losses(values) if sorts_pairs(name)]
    batch, accumulation = values.get("per_device_train_batch_size"), values.get("gradient_accumulation_steps")
    if sorting and batch == 1:
        message = f"{sorting[0]} compares the sorted pairs of one forward pass; with one pair it equals plain DPO"
        fix = "increase per_device_train_batch_size, and lower gradient_accumulation_steps"
        yield Problem("warning", "loss-needs-batch", message, fix, "per_device_train_batch_size")
    elif sorting and batch and accumulation and accumulation > 1:
        pairs = batch * accumulation
        message = f"{sorting[0]} compares the sorted pairs of one forward pass: {batch} pairs, not the {pairs} of a step"
        fix = f'write "per_device_train_batch_size": {pairs}, "gradient_accumulation_steps": 1; such a step is never split'
        yield Problem("warning", "loss-needs-batch", message, fix, "gradient_accumulation_steps")


def whole_model_is_not_quantised(values: Values, given: Values) -> Iterator[Problem]:
    for name in ("use_4bit", "use_8bit"):
        if values.get("lora_r") == 0 and values.get(name):
            message = f"lora_r 0 trains every weight, but weights quantised by {name} cannot be trained"
            yield Problem("error", "full-quantised", message, f'remove "{name}", or train an adapter: "lora_r": 16', name)


def whole_model_has_no_adapter(values: Values, given: Values) -> Iterator[Problem]:
    adapter = [name for name, option in options().items() if option.group == "Adapter" and name != "lora_r" and name in given]
    if values.get("lora_r") == 0 and adapter:
        message = f"{', '.join(adapter)} has no effect: lora_r 0 trains every weight, without an adapter"
        yield Problem("warning", "no-effect", message, "remove it, or increase lora_r", adapter[0])


def one_compute_dtype(values: Values, given: Values) -> Iterator[Problem]:
    """With two dtypes each layer casts back and forth, and fp16 overflows."""
    wanted = values.get("bnb_4bit_compute_dtype")
    training = "bfloat16" if values.get("bf16") else "float16" if values.get("fp16") else None
    if values.get("use_4bit") and wanted and training and wanted != training:
        message = f"4-bit weights would be multiplied in {wanted}, but the training computes in {training}"
        fix = f'write "bnb_4bit_compute_dtype": "{training}", or remove the key'
        yield Problem("warning", "two-compute-dtypes", message, fix, "bnb_4bit_compute_dtype")


def no_head_adapter(values: Values, given: Values) -> Iterator[Problem]:
    modules = values.get("target_modules")
    if (isinstance(modules, list) and "lm_head" in modules) or (isinstance(modules, str) and _takes_head(modules)):
        message = "an adapter on lm_head would not be trained: the log-probs use the weight of lm_head directly"
        yield Problem("error", "lm-head-adapter", message, "remove lm_head from target_modules", "target_modules")
    if isinstance(modules, list) and (
        words := [name for name in modules if as_here(options()["target_modules"], name) == "all-linear"]
    ):
        fix = 'write "target_modules": "all-linear"'
        yield Problem("error", "all-linear-in-list", f"no layer is called {words[0]}", fix, "target_modules")


def _takes_head(pattern: str) -> bool:
    """Whether a pattern matches the whole name of the head; an invalid pattern is reported elsewhere (bad-regex)."""
    try:
        return pattern != "lm_head" and re.fullmatch(pattern, "lm_head") is not None
    except re.error:
        return False


def targets_are_a_pattern(values: Values, given: Values) -> Iterator[Problem]:
    """PEFT 0.21 matches a text with whole names, so a short name matches nothing."""
    modules = values.get("target_modules")
    if not isinstance(modules, str) or modules == "all-linear":
        return
    if not same(here := as_here(options()["target_modules"], modules), modules):
        message = f'"{modules}" is read as a regular expression for whole layer names, and matches none'
        yield Problem("error", "target-is-name", message, f'write "target_modules": {json.dumps(here)}', "target_modules")
        return
    try:
        re.compile(modules)
    except re.error as error:
        fix = r'for example "target_modules": ".*\\.self_attn\\.(q|v)_proj"'
        yield Problem("error", "bad-regex", f"target_modules is not a regular expression: {error}", fix, "target_modules")


def _same_place(one: object, other: object) -> bool:
    """Whether two values name the same file or folder, also if they are written differently."""
    if isinstance(one, str) and isinstance(other, str):
        return one == other or os.path.realpath(one) == os.path.realpath(other)
    return one == other is not None


def output_is_no_input(values: Values, given: Values) -> Iterator[Problem]:
    place = values.get("output_dir")
    for name in names_where(lambda option: option.place in ("model", "data")):
        if _same_place(place, values.get(name)):
            message = f"output_dir is the {name} itself"
            yield Problem("error", "output-is-input", message, "name a new folder, for example runs/my-run", "output_dir")


def first_reference_is_below_an_adapter(values: Values, given: Values) -> Iterator[Problem]:
    if values.get("reference") == "first" and values.get("lora_r") == 0:
        message = '"reference" is "first", the model with the adapter off, but lora_r 0 trains no adapter'
        yield Problem("error", "reference-first", message, 'remove "reference"', "reference")


def upload_has_a_place(values: Values, given: Values) -> Iterator[Problem]:
    if values.get("push_to_hub") and "hub_model_id" in values and values["hub_model_id"] is None:
        fix = 'write "hub_model_id": "me/my-adapter", with your hub user name'
        yield Problem("error", "hub-id-missing", "push_to_hub needs a hub_model_id", fix, "push_to_hub")


def paths_are_written_as_meant(values: Values, given: Values) -> Iterator[Problem]:
    """JSON reads "C:\\temp\\new", a Windows path, with a tab and a line break."""
    for name in names_where(lambda option: option.place):
        value = values.get(name)
        if isinstance(value, str) and any(ord(char) < 32 for char in value):
            message = f'"{name}" holds a control character: {json.dumps(value)}'
            yield Problem("error", "path-control-character", message, "write / or \\\\ between the folders", name)


def paths_fit_the_disk(values: Values, given: Values) -> Iterator[Problem]:
    for name in names_where(lambda option: option.place in ("model", "output")):
        value = values.get(name)
        if not isinstance(value, str):
            continue
        longest = max((len(part.encode("utf-8", "surrogatepass")) for part in Path(value).parts), default=0)
        if longest > NAME_BYTES or len(str(Path(value).absolute()).encode("utf-8", "surrogatepass")) > PATH_BYTES:
            message = f"{name} is too long for a file system: a name has {longest} bytes, and the maximum is {NAME_BYTES}"
            if longest <= NAME_BYTES:
                message = f"{name} is too long for a file system: the path has more than {PATH_BYTES} bytes"
            yield Problem("error", "path-too-long", message, "write a shorter path", name)


def unsloth_has_limits(values: Values, given: Values) -> Iterator[Problem]:
    """Unsloth drops the mask that separates the responses of a pair; the other limits are not tested."""
    limits = {
        "prompt_sharing": (True, "cannot share prompts", '"auto"'),
        "lora_r": (0, "can train adapters here, but not a whole model", "16"),
        "use_8bit": (True, "can load 16-bit or 4-bit weights here, but not 8-bit", "false"),
    }
    for key, (value, what, instead) in limits.items():
        if values.get("provider") == "unsloth" and key in values and same(values[key], value):
            fix = f'write "{key}": {instead}, or "provider": "huggingface"'
            yield Problem("error", "not-with-unsloth", f"unsloth {what}", fix, key)


def reward_model_has_limits(values: Values, given: Values) -> Iterator[Problem]:
    """A reward model is an adapter and a score head, on a model that the Hugging Face provider loads."""
    strategy = STRATEGIES.get(str(values.get("strategy")))
    if strategy is None or not strategy.gives_rewards:
        return
    limits = {
        "lora_r": (0, "is trained as an adapter with a score head, not as a whole model", "16"),
        "provider": ("unsloth", "cannot be trained with unsloth, which has only language models here", '"huggingface"'),
    }
    for key, (value, what, instead) in limits.items():
        if key in values and same(values[key], value):
            yield Problem("error", "not-a-reward-model", f"a reward model {what}", f'write "{key}": {instead}', key)


RULES: Sequence[Rule] = (
    paths_are_written_as_meant,
    paths_fit_the_disk,
    default_model,
    qlora_is_sft,
    belongs_to_strategy,
    has_an_effect,
    stages_stand_in_the_file,
    one_precision,
    one_quantisation,
    one_warmup,
    decay_goes_down,
    columns_agree,
    one_length_of_training,
    one_evaluation_set,
    evaluation_set_is_another,
    some_set_is_whole,
    weights_are_of_training,
    evaluation_has_data,
    best_checkpoint_is_judged,
    smoothing_needs_its_loss,
    loss_needs_its_smoothing,
    divergence_needs_its_loss,
    weighting_is_of_pairs,
    stopping_watches_the_plain_loss,
    one_weight_a_loss,
    sorted_loss_has_a_batch,
    whole_model_is_not_quantised,
    whole_model_has_no_adapter,
    one_compute_dtype,
    no_head_adapter,
    targets_are_a_pattern,
    output_is_no_input,
    unsloth_has_limits,
    reward_model_has_limits,
    *OF_PROCESSES,
    *augment_rules.RULES,
    *reward_rules.RULES,
    *rating_rules.RULES,
    *compare_rules.RULES,
    first_reference_is_below_an_adapter,
    upload_has_a_place,
)


def check(values: Values, given: Values, rules: Sequence[Rule] = RULES) -> list[Problem]:
    """Every problem that the rules report. Options of other strategies are reported once, and no other rule sees them."""
    strategy = str(values.get("strategy", options()["strategy"].default()))
    own = {name: value for name, value in values.items() if strategy in options()[name].strategies}
    return [problem for rule in rules for problem in rule(own, given)]

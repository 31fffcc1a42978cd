"""Rules between options. Each rule is one function that yields problems; `RULES` at the end lists them.

A rule receives the values (defaults filled in, only those that passed the schema on their own) and what the user gave.
It reads with `.get`, because a value that failed the schema is absent.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from dpo_cli.config.schema import inner_defaults, options, same
from dpo_cli.errors import Problem

Values = Mapping[str, Any]
Rule = Callable[[Values, Values], Iterator[Problem]]

SMOOTHED_LOSSES = ("robust", "exo_pair", "aot", "aot_unpaired")  # TRL 1.15, DPOTrainer: the others ignore label_smoothing

# What a rank of `augment` needs, and no other does.
RANK_PARTS = {"regex": ("pattern",), "reward": ("reward_model",), "judge": ("judge_url", "judge_model", "criterion")}


def default_model(values: Values, given: Values) -> Iterator[Problem]:
    if "model_name" not in given and "model_name" in values:
        message = f'"model_name" is missing: {values["model_name"]}, the model of the documented examples, is taken'
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
    """The schema says what an option needs of others (x-needs)."""
    for name in sorted(given.keys() & options().keys() & values.keys()):
        option = options()[name]
        if same(values[name], option.default()):
            continue
        for other, wanted in option.needs.items():
            if other in values and not any(same(values[other], value) for value in wanted):
                message = f'"{name}" has no effect: "{other}" is {json.dumps(values[other])}'
                choices = " or ".join(json.dumps(value) for value in wanted)
                yield Problem("warning", "no-effect", message, f'write "{other}": {choices}, or remove "{name}"', name)


def one_precision(values: Values, given: Values) -> Iterator[Problem]:
    if values.get("bf16") and values.get("fp16"):
        yield Problem("error", "two-precisions", "bf16 and fp16 are both true", "keep one: bf16 where there is it", "fp16")


def one_quantisation(values: Values, given: Values) -> Iterator[Problem]:
    if values.get("use_4bit") and values.get("use_8bit"):
        fix = "keep one: use_4bit takes half the memory"
        yield Problem("error", "two-quantisations", "use_4bit and use_8bit are both true", fix, "use_8bit")


def one_warmup(values: Values, given: Values) -> Iterator[Problem]:
    if values.get("warmup_steps") and values.get("warmup_ratio"):
        message = "warmup_steps and warmup_ratio both say how long to warm up"
        yield Problem("error", "two-warmups", message, "remove one of them", "warmup_ratio")


def one_length_of_training(values: Values, given: Values) -> Iterator[Problem]:
    steps = values.get("max_steps")
    if steps is not None and "num_train_epochs" in given:
        message = f"max_steps is {steps}, so num_train_epochs has no effect"
        yield Problem("hint", "epochs-ignored", message, "remove one of them", "num_train_epochs")


def one_evaluation_set(values: Values, given: Values) -> Iterator[Problem]:
    if values.get("eval_dataset") is not None and values.get("eval_split"):
        message = "eval_dataset and eval_split both say what to judge on"
        yield Problem("error", "two-evaluation-sets", message, "remove one of them", "eval_split")


def evaluation_set_is_another(values: Values, given: Values) -> Iterator[Problem]:
    if "dataset" in values and _same_place(values.get("eval_dataset"), values["dataset"]):
        message = "eval_dataset is the dataset that is trained on: its figures would say nothing"
        yield Problem("error", "eval-is-train", message, 'hold a share out with "eval_split": 0.1 instead', "eval_dataset")


def some_set_is_whole(values: Values, given: Values) -> Iterator[Problem]:
    dataset = values.get("dataset")
    entries = dataset if isinstance(dataset, list) else []
    weights = [entry.get("weight", 1) if isinstance(entry, dict) else 1 for entry in entries]
    if weights and max(weights) < 1:
        message = f"every dataset has a weight below 1, so an epoch sees {max(weights):.0%} of each at most"
        fix = "a weight is how often a pair is seen in an epoch: write 1 for what is to be seen whole"
        yield Problem("hint", "weights-below-one", message, fix, "dataset")


def evaluation_has_data(values: Values, given: Values) -> Iterator[Problem]:
    if values.get("eval_split") != 0 or values.get("eval_dataset") is not None:
        return
    for name in ("eval_steps", "early_stopping_patience"):
        if values.get(name) is not None:
            message = f"{name} has no effect: nothing is held out"
            yield Problem("warning", "nothing-to-evaluate", message, 'set "eval_split", for example to 0.1', name)


def best_checkpoint_is_judged(values: Values, given: Values) -> Iterator[Problem]:
    """Early stopping goes back to the best evaluation, which must then have a checkpoint (transformers demands it too)."""
    save, judge = values.get("save_steps"), values.get("eval_steps")
    if values.get("early_stopping_patience") is not None and save and judge and save % judge:
        message = f"early stopping needs a checkpoint at an evaluation: save_steps {save} is no multiple of eval_steps {judge}"
        yield Problem("error", "save-eval-steps", message, f'write "save_steps": {(save // judge + 1) * judge}', "save_steps")


def smoothing_needs_its_loss(values: Values, given: Values) -> Iterator[Problem]:
    loss, smoothing = values.get("loss_type"), values.get("label_smoothing")
    if loss is not None and smoothing and loss not in SMOOTHED_LOSSES:
        message = f"the loss {loss} ignores label_smoothing {smoothing:g}"
        fix = f'write "loss_type": "robust" (it and {", ".join(SMOOTHED_LOSSES[1:])} know it), or remove label_smoothing'
        yield Problem("error", "label-smoothing-ignored", message, fix, "label_smoothing")


def loss_needs_its_smoothing(values: Values, given: Values) -> Iterator[Problem]:
    loss = values.get("loss_type")
    if values.get("label_smoothing") != 0:
        return
    if loss == "exo_pair":
        message, fix = "the loss exo_pair needs label_smoothing above 0", 'write "label_smoothing": 0.001, its paper\'s value'
        yield Problem("error", "loss-needs-smoothing", message, fix, "loss_type")
    elif loss == "robust":
        message = "the loss robust with label_smoothing 0 is plain DPO"
        fix = 'write the share of labels that you think are flipped, "label_smoothing": 0.1 for example'
        yield Problem("warning", "loss-needs-smoothing", message, fix, "loss_type")


def one_compute_dtype(values: Values, given: Values) -> Iterator[Problem]:
    """4-bit weights are multiplied in one dtype, the rest in another: each layer then casts to and fro, and fp16 overflows."""
    wanted = values.get("bnb_4bit_compute_dtype")
    training = "bfloat16" if values.get("bf16") else "float16" if values.get("fp16") else None
    if values.get("use_4bit") and wanted and training and wanted != training:
        message = f"4-bit weights would be multiplied in {wanted}, the rest computed in {training}"
        fix = f'write "bnb_4bit_compute_dtype": "{training}", or leave it out'
        yield Problem("warning", "two-compute-dtypes", message, fix, "bnb_4bit_compute_dtype")


def no_head_adapter(values: Values, given: Values) -> Iterator[Problem]:
    modules = values.get("target_modules")
    if isinstance(modules, list) and "lm_head" in modules:
        message = "an adapter on lm_head would never be trained: the log-probs use its weight directly"
        yield Problem("error", "lm-head-adapter", message, "remove lm_head from target_modules", "target_modules")
    if isinstance(modules, list) and "all-linear" in modules:
        fix = 'write "target_modules": "all-linear"'
        yield Problem("error", "all-linear-in-list", "no layer is called all-linear", fix, "target_modules")


def _same_place(one: Any, other: Any) -> bool:
    """Whether two values name the same file or folder, however they are written."""
    both = isinstance(one, str) and isinstance(other, str)
    return one == other is not None or (both and os.path.realpath(one) == os.path.realpath(other))


def output_is_no_input(values: Values, given: Values) -> Iterator[Problem]:
    place = values.get("output_dir")
    for name in ("model_name", "dataset", "eval_dataset"):
        if _same_place(place, values.get(name)):
            message = f"output_dir is the {name} itself"
            yield Problem(
                "error", "output-is-input", message, "name a folder of its own, for example runs/my-run", "output_dir"
            )


def paths_are_written_as_meant(values: Values, given: Values) -> Iterator[Problem]:
    """In "C:\\temp\\new" as Windows shows it, JSON reads a tab and a line break."""
    for name in ("model_name", "dataset", "eval_dataset", "output_dir"):
        value = values.get(name)
        if isinstance(value, str) and any(ord(char) < 32 for char in value):
            message = f'"{name}" holds a control character: {json.dumps(value)}'
            yield Problem("error", "path-control-character", message, "write / or \\\\ between the folders", name)


def _augment(values: Values, given: Values) -> Values | None:
    """The parts of `augment` with their defaults, None where it is not used."""
    return {**inner_defaults("augment"), **values["augment"]} if "augment" in given and "augment" in values else None


def rank_has_its_parts(values: Values, given: Values) -> Iterator[Problem]:
    if (augment := _augment(values, given)) is None:
        return
    rank = augment["rank"]
    if missing := [name for name in RANK_PARTS.get(rank, ()) if augment[name] is None]:
        message = f'"augment": the rank {rank} needs {" and ".join(missing)}'
        yield Problem("error", "rank-incomplete", message, f'add "{missing[0]}": "..." to "augment"', "augment")
    for other, names in RANK_PARTS.items():
        for name in values["augment"].keys() & {*names} if other != rank else ():
            message, fix = f'"augment": "{name}" has no effect: it belongs to the rank {other}', f'write "rank": "{other}"'
            yield Problem("warning", "no-effect", message, f'{fix}, or remove "{name}"', "augment")


def pattern_is_one(values: Values, given: Values) -> Iterator[Problem]:
    augment = _augment(values, given)
    try:
        re.compile((augment and augment["pattern"]) or "")
    except re.error as error:
        message = f'"augment": the pattern is no regular expression: {error}'
        yield Problem("error", "pattern-invalid", message, "write a regular expression as Python's re knows it", "augment")


def judge_is_a_plain_url(values: Values, given: Values) -> Iterator[Problem]:
    """The URL is written into every row, so nothing secret may be in it."""
    augment = _augment(values, given)
    if (
        augment
        and augment["judge_url"]
        and not re.fullmatch(r"https?://[\w.:\[\]-]+(/[\w./~%-]*)?", augment["judge_url"], re.ASCII)
    ):
        message = '"augment": judge_url is not http(s)://HOST/PATH, without user and query'
        fix = 'for example "judge_url": "http://localhost:8000/v1"; a key stands in the environment, as OPENAI_API_KEY'
        yield Problem("error", "judge-url", message, fix, "augment")


def answers_make_pairs(values: Values, given: Values) -> Iterator[Problem]:
    if (augment := _augment(values, given)) is None:
        return
    responses, pairs, longest = augment["responses"], augment["pairs_per_prompt"], values.get("max_seq_length")
    if pairs > math.comb(responses, 2):
        message = f'"augment": {responses} responses make {math.comb(responses, 2)} pairs, not {pairs}'
        yield Problem(
            "error", "too-few-responses", message, f'raise "responses", or lower "pairs_per_prompt" {pairs}', "augment"
        )
    if longest is not None and augment["max_new_tokens"] >= longest:
        message = (
            f'"augment": max_new_tokens {augment["max_new_tokens"]} leaves no room for a prompt in max_seq_length {longest}'
        )
        yield Problem("error", "augment-too-long", message, 'raise "max_seq_length", or lower "max_new_tokens"', "augment")


RULES: Sequence[Rule] = (
    paths_are_written_as_meant,
    default_model,
    qlora_is_sft,
    belongs_to_strategy,
    has_an_effect,
    one_precision,
    one_quantisation,
    one_warmup,
    one_length_of_training,
    one_evaluation_set,
    evaluation_set_is_another,
    some_set_is_whole,
    evaluation_has_data,
    best_checkpoint_is_judged,
    smoothing_needs_its_loss,
    loss_needs_its_smoothing,
    one_compute_dtype,
    no_head_adapter,
    output_is_no_input,
    rank_has_its_parts,
    pattern_is_one,
    judge_is_a_plain_url,
    answers_make_pairs,
)


def check(values: Values, given: Values, rules: Sequence[Rule] = RULES) -> list[Problem]:
    """Every problem that every rule finds. An option of another strategy is told of once, and is then out of sight."""
    own = {name: value for name, value in values.items() if values.get("strategy", "dpo") in options()[name].strategies}
    return [problem for rule in rules for problem in rule(own, given)]

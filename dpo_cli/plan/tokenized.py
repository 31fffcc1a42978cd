"""Before a model is loaded: rows to token ids, their counts, and the plan on the screen."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_cli.data.encoded import Encoded, EncodedRows
from dpo_cli.data.tokenizer import Tokenizer
from dpo_cli.data.tokens import encode_all
from dpo_cli.errors import Problem, invalid
from dpo_cli.models.model_files import TOKENIZER_CONFIG
from dpo_cli.plan.plan import Counts, Plan
from dpo_cli.plan.preflight import Data
from dpo_cli.ui.console import Console

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Rows:
    """The rows that a run trains on and is evaluated on, and their tokenizer."""

    train: EncodedRows
    held_out: EncodedRows
    tokenizer: PreTrainedTokenizerBase

    @property
    def extremes(self) -> list[Encoded]:
        """The shortest and the longest of all rows."""
        sizes = [(size.length, side, place) for side in (self.train, self.held_out) for place, size in enumerate(side.sizes())]
        by_length = [min(sizes, key=itemgetter(0)), max(sizes, key=itemgetter(0))]
        return [side[place] for _, side, place in by_length]


def show_plan(plan: Plan, console: Console) -> None:
    config, counts = plan.config, plan.counts
    assert counts is not None
    batch, accumulation, noun = config.per_device_train_batch_size, config.gradient_accumulation_steps, plan.noun
    longest = counts.longest_pair if plan.scoring.shared else len(plan.strategy.rows.responses) * counts.longest
    all_rows = counts.train_pairs + counts.eval_pairs
    held_out = f"{counts.eval_pairs} {noun} of {counts.eval_prompts} prompts"
    trained = f"LoRA rank {config.lora_r}" if config.lora_r else "every weight"
    beta = f"beta {config.beta:g}, " if plan.takes("beta") else ""
    base = "4-bit base" if config.use_4bit else "8-bit base" if config.use_8bit else ""
    rows = [
        ("strategy", config.strategy),
        ("model", plan.model_label),
        ("data", f"{counts.train_pairs} {noun} of {counts.train_prompts} prompts"),
        ("bad rows", f"{counts.bad_rows} are not {noun}, and are skipped"),
        ("longest", f"{counts.longest} tokens ({counts.longest_at})"),
        ("tokens", f"{counts.train_tokens:,} per epoch; {counts.shared_tokens:,} with each prompt once"),
        ("held out", held_out if counts.eval_pairs else "nothing, so there is nothing to measure (see eval_split)"),
        ("date", f"{plan.day:%Y-%m-%d}, the day of the run: the chat template writes the date"),
        ("cut", f"{counts.cut} {noun} ({counts.cut / all_rows:.0%}) lose the start of their prompt to max_seq_length"),
        ("skipped", f"{counts.too_long} {noun} whose responses are longer than max_seq_length {config.max_seq_length}"),
        ("template", f"{counts.parted} prompts are rendered differently before a response: see the first"),
        ("steps", f"{plan.total_steps} of {batch * accumulation} {noun} ({batch} x {accumulation})"),
        ("rows", f"{noun} of a step share rows of up to {plan.row_budget(longest):,} tokens"),
        ("learning", f"rate {config.learning_rate:g}, {beta}{trained}"),
        ("trains", plan.adapted.words if plan.adapted else ""),
        ("scoring", plan.scoring.why),
        ("runs on", ", ".join(filter(None, (config.device, plan.dtype, base)))),
        ("writes to", str(plan.run_dir)),
    ]
    conditions = {
        "trains": plan.adapted,
        "date": plan.writes_date,
        "rows": plan.fills_rows,
        "bad rows": counts.bad_rows,
        "cut": counts.cut,
        "skipped": counts.too_long,
        "template": counts.parted,
    }
    console.table("plan", [row for row in rows if conditions.get(row[0], True)])
    for note in plan.notes:
        console.line(f"note: {note}")


@dataclass(frozen=True)
class Prepared:
    """The rows of a run as token ids, their counts, and their problems."""

    train: EncodedRows
    held_out: EncodedRows
    counts: Counts
    problems: tuple[Problem, ...]


def prepare(data: Data, tokenizer: PreTrainedTokenizerBase, plan: Plan, token_rows: int | None) -> Prepared:
    """Split by prompt, tokenise, cut prompts to length, skip rows that are still too long.

    `token_rows` is the number of rows of the model's embedding, if known. Raises `InvalidInput` for rows that cannot be used.
    """
    config, made = plan.config, Tokenizer.loaded(tokenizer, plan.day, plan.model.generation)
    require_padding(made, tokenizer, token_rows)
    skip, template = config.on_bad_rows == "skip", made.template
    encoded = encode_all(data.sides(config), made, config.use_chat_template, config.max_seq_length, token_rows, skip).require()
    sides = encoded.sides
    train, held_out = kept = [side.where(lambda size: size.length <= config.max_seq_length) for side in sides]
    _require_rows(sides[0], train, plan)
    sizes = [(size, row) for side in kept for size, row in zip(side.sizes(), side.rows, strict=True)]
    longest, longest_row = max(sizes, key=lambda sized: sized[0].length)
    counts = Counts(
        train_pairs=len(train),
        eval_pairs=len(held_out),
        train_prompts=len({row.prompt_key for row in train.rows}),
        eval_prompts=len({row.prompt_key for row in held_out.rows}),
        cut=sum(side.cut for side in kept),
        too_long=sum(map(len, sides)) - sum(map(len, kept)),
        parted=sum(side.parted for side in kept),
        bad_rows=encoded.refused
        + sum(data_set.rows - data_set.pairs for data_set in (data.train, data.held_out) if data_set is not None),
        longest=longest.length,
        longest_at=f"{Path(longest_row.file).name}:{longest_row.line}",
        longest_pair=max(size.shared_length for size, _ in sizes),
        longest_responses=max(size.response_length for size, _ in sizes),
        train_tokens=sum(size.response_length + len(size.responses) * size.prompt for size in train.sizes()),
        shared_tokens=sum(size.shared_length for size in train.sizes()),
        digest=_digest(kept),
        writes_date=template is not None and template.writes_date and config.use_chat_template is not False,
    )
    return Prepared(train, held_out, counts, encoded.problems)


def prepare_judged(
    data: Data, tokenizer: PreTrainedTokenizerBase, plan: Plan, token_rows: int | None, all_rows: bool
) -> tuple[EncodedRows, tuple[Problem, ...]]:
    """The rows to evaluate, held out or all, prepared like in `prepare`; the training rows are not tokenised."""
    config, made = plan.config, Tokenizer.loaded(tokenizer, plan.day, plan.model.generation)
    require_padding(made, tokenizer, token_rows)
    train, held_out = data.sides(config)
    side = train if all_rows else held_out
    skip = config.on_bad_rows == "skip"
    encoded = encode_all([side], made, config.use_chat_template, config.max_seq_length, token_rows, skip).require()
    kept = encoded.sides[0].where(lambda size: size.length <= config.max_seq_length)
    if all_rows:
        _require_rows(encoded.sides[0], kept, plan)
    return kept, encoded.problems


def _require_rows(rows: EncodedRows, kept: EncodedRows, plan: Plan) -> None:
    """`InvalidInput` if no row is left to train on."""
    if not rows:
        fix = f"increase the weights in dataset, or add {plan.noun}"
        raise invalid("nothing-to-train", f"none of the {plan.noun} is left to train on", fix, "dataset")
    if not kept:
        limit = f"max_seq_length {plan.config.max_seq_length}"
        message = f"the responses of all {len(rows)} {plan.noun} to train on are longer than {limit}"
        shortest = min(size.length for size in rows.sizes())
        fix = f"increase max_seq_length: the shortest has {shortest} tokens"
        raise invalid("nothing-to-train", message, fix, "max_seq_length")


def require_padding(made: Tokenizer, tokenizer: PreTrainedTokenizerBase, token_rows: int | None) -> None:
    """`InvalidInput` if the model's embedding has no row for the padding token."""
    padding = int(tokenizer.pad_token_id)
    if token_rows is None or padding < token_rows:
        return
    message = (
        f"the padding token {tokenizer.pad_token} ({padding}) has no row in the model's embedding: {made.against(token_rows)}"
    )
    fix = f"name another pad_token in {TOKENIZER_CONFIG}, or {made.resize}"
    raise invalid("tokens-outside", message, fix, "model_name")


def _digest(sides: Sequence[Sequence[Encoded]]) -> str:
    """The digest of all rows: any change of dataset, split, tokenizer or template changes it."""
    digest = hashlib.sha256()
    for side in sides:
        digest.update(f"{len(side)} rows\n".encode())
        for row in side:
            digest.update(f"{row.prompt_ids} {row.responses}\n".encode())
    return digest.hexdigest()


def first_row(row: Encoded, tokenizer: PreTrainedTokenizerBase) -> str:
    """Prompt and responses decoded with their special tokens; the scored text is after the bar."""
    parts = zip(row.row.kind.responses, row.responses, strict=True)
    responses = [f"{name:<8} | {tokenizer.decode(ids)!r}" for name, ids in parts]
    return "\n".join([tokenizer.decode(row.prompt_ids), *responses])


def tell_scoring(plan: Plan, console: Console) -> None:
    console.line(f"scoring: {plan.scoring.why}")
    logging.getLogger("dpo").info("scoring: %s", plan.scoring.why)

"""Before a model is loaded: rows to token ids, their counts, and the plan on the screen."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_cli.config.options import Config
from dpo_cli.config.reward_rules import reward_functions
from dpo_cli.data.encoded import Encoded, EncodedRows, Growing
from dpo_cli.data.prompts import read_prompts
from dpo_cli.data.ratings import BAD, GOOD
from dpo_cli.data.rows import Question, Rating, question_of
from dpo_cli.data.token_cache import key_of, known_or_made
from dpo_cli.data.tokenizer import Tokenizer
from dpo_cli.data.tokens import Encoder, Encodings, encode_questions, encoded_into
from dpo_cli.errors import InvalidInput, Problem, invalid
from dpo_cli.hardware.machine import GIB
from dpo_cli.models.model_files import TOKENIZER_CONFIG
from dpo_cli.plan.cost import passes_of
from dpo_cli.plan.examination import Data, digests_of, large_files
from dpo_cli.plan.plan import Counts, Plan
from dpo_cli.results.durations import in_words
from dpo_cli.storage.log import Tell
from dpo_cli.ui.console import Console

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DIGEST = "2-"  # of token ids: older plans have a digest that was made in another way
# Options that decide the tokens of a row, or the side that it is on.
TOKEN_OPTIONS = ("columns", "on_bad_rows", "eval_split", "split_seed", "use_chat_template", "max_seq_length")


@dataclass(frozen=True)
class SampledPrompt:
    """A prompt to sample answers to, with its token ids."""

    question: Question
    ids: list[int]


@dataclass(frozen=True)
class Rows:
    """The rows that a run trains on and is evaluated on, and their tokenizer."""

    train: EncodedRows
    held_out: EncodedRows
    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[SampledPrompt] = ()  # to sample answers to, for a strategy that generates

    @property
    def extremes(self) -> list[Encoded]:
        """The shortest and the longest of all rows."""
        found = []
        for extreme in (min, max):
            sides = (self.train, self.held_out)
            sizes = ((size.length, side, place) for side in sides for place, size in enumerate(side.sizes()))
            _, side, place = extreme(sizes, key=itemgetter(0))
            found.append(side[place])
        return found


def sampled_prompts(
    train: EncodedRows, held_out: EncodedRows, made: Tokenizer, plan: Plan, token_rows: int | None, tell: Tell
) -> list[SampledPrompt]:
    """The prompts to sample answers to, each once, with their token ids, cut so that an answer has room.

    Those of the rows to train on, or of a file of prompts without those of held-out rows. `InvalidInput` if none is left.
    """
    config, context = plan.config, plan.model.facts.max_position_embeddings if plan.model.facts else None
    longest = min(config.max_seq_length, context or config.max_seq_length)
    room, known = longest - config.max_new_tokens, dict[str, SampledPrompt]()
    questions, judged = _prompts_of_file(config, held_out) if config.prompts_file else ([], 0)
    if not config.prompts_file:
        for place, (row, size) in enumerate(zip(train.rows, train.sizes(), strict=True)):
            if row.prompt_key in known:
                continue
            if size.prompt > room:
                questions.append(question_of(row))
            else:  # the token ids of the pair
                known[row.prompt_key] = SampledPrompt(question_of(row), train.ids(place)[0])
    if questions:
        encoded, counts = encode_questions(questions, made, config.use_chat_template, room, token_rows)
        known |= {question.prompt_key: SampledPrompt(question, ids) for question, ids in encoded}
        left = {"cut": f"lose their start, so that an answer of {config.max_new_tokens} tokens fits {longest}"}
        left["too_long"] = "leave no room for an answer, and are skipped"
        for name, words in left.items():
            if counts[name]:
                tell(f"note: {counts[name]} prompts {words}")
    if judged:
        tell(f"note: {judged} prompts of {config.prompts_file} are those of held-out pairs, and are left out")
    if not known:
        if judged and not questions:
            raise invalid(
                "nothing-to-train", f"every prompt of {config.prompts_file} is held out", "add prompts", "prompts_file"
            )
        fix = "raise max_seq_length, lower max_new_tokens, or add prompts"
        raise invalid("nothing-to-train", "there is no prompt to sample an answer to", fix, "max_seq_length")
    return list(known.values())


def _prompts_of_file(config: Config, held_out: EncodedRows) -> tuple[list[Question], int]:
    """The questions of the file of prompts, and the number of those that are left out because they are held out."""
    prompts = read_prompts(str(config.prompts_file), config.columns, config.on_bad_rows == "skip")
    if any(problem.severity == "error" for problem in prompts.problems):
        raise InvalidInput(prompts.problems)
    judged = {row.prompt_key for row in held_out.rows}
    asked = [question for question in prompts.questions if question.prompt_key not in judged]
    return asked, len(prompts.questions) - len(asked)


def show_plan(plan: Plan, console: Console, speed: float, copies: float | None = None) -> None:
    """Print the plan.

    `speed` is that of large products on this machine, in operations a second, and `copies` that of copies from the RAM to the
    GPU, in bytes a second, if weights wait in the RAM.
    """
    config, counts = plan.config, plan.counts
    assert counts is not None
    batch, accumulation, noun = config.per_device_train_batch_size, config.gradient_accumulation_steps, plan.noun
    unit = "samples" if plan.strategy.generates else noun
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
        ("steps", f"{plan.total_steps} of {batch * accumulation} {unit} ({batch} x {accumulation})"),
        ("samples", _samples(plan)),
        ("processes", f"{plan.processes}, which share the {unit} of each step; each has {plan.held_words}"),
        ("weights", _weights(plan, copies)),
        ("rows", f"{unit} of a step share rows of up to {plan.row_budget(plan.longest_unit):,} tokens"),
        ("learning", f"rate {config.learning_rate:g}, {beta}{trained}"),
        ("trains", plan.adapted.words if plan.adapted else ""),
        ("scoring", plan.scoring.why),
        ("takes", _takes(plan, speed, copies)),
        ("runs on", ", ".join(filter(None, (config.device, plan.dtype, base)))),
        ("writes to", str(plan.run_dir)),
    ]
    conditions = {
        "samples": plan.strategy.generates,
        "takes": plan.adapted and plan.strategy.is_trained,
        "trains": plan.adapted,
        "date": plan.writes_date,
        "rows": plan.fills_rows,
        "processes": plan.processes > 1,
        "weights": plan.is_divided and (config.device == "cuda" or plan.processes > 1),
        "bad rows": counts.bad_rows,
        "cut": counts.cut,
        "skipped": counts.too_long,
        "template": counts.parted,
    }
    console.table("plan", [row for row in rows if conditions.get(row[0], True)])
    for note in plan.notes:
        console.line(f"note: {note}")


def _samples(plan: Plan) -> str:
    """What a step samples, and what scores it."""
    config = plan.config
    ranks = [function["rank"] for function in reward_functions(config.reward_functions)]
    scored = [*([Path(config.reward_model).name] if config.reward_model else []), *ranks]
    words = (
        f"{config.num_generations} answers of at most {config.max_new_tokens} tokens to each of {plan.prompts_a_step} prompts"
    )
    again = f", used for {config.num_iterations} steps" if config.num_iterations > 1 else ""
    return f"{words}{again}; {config.rl_algorithm}, scored by {' and '.join(scored)}"


def _weights(plan: Plan, copies: float | None) -> str:
    """How the weights of the blocks come to the device, where they do not stay there."""
    moved = plan.moved_bytes
    if moved is not None and plan.config.cpu_offload:  # each process copies its part, and the parts are exchanged
        moved /= plan.processes
    size = "all of them"
    if moved is not None:
        size = f"{moved / GIB:.3g} GB of them" if moved >= GIB else f"{moved / 2**20:.3g} MB of them"
    times = "twice, and at the first visit once more for the reference" if plan.strategy.refers else "twice"
    if not plan.config.cpu_offload:
        return f"each process holds a part of every block; for a row {size} are exchanged {times}, which `takes` leaves out"
    if copies is None or moved is None:
        return f"in the RAM; for a row {size} are copied to the device {times}"
    return f"in the RAM; for a row {size} are copied to the GPU {times}, {moved / copies:.2f} s each"


def _takes(plan: Plan, speed: float, copies: float | None) -> str:
    """The expected times, and the answers that an evaluation samples if the plan decided their number."""
    assert plan.adapted is not None and plan.counts is not None
    times = [seconds / plan.processes for seconds in plan.cost.seconds(plan.adapted.weights, speed)]
    if copies is not None and plan.moved_bytes is not None:
        tokens = plan.counts.shared_tokens / plan.counts.train_pairs * plan.pairs_a_step / plan.processes
        rows = plan.total_steps * math.ceil(tokens / plan.row_budget(plan.longest_unit))
        passes = passes_of(plan.config, plan.counts, plan.total_steps, plan.strategy, rows)
        a_pass = plan.moved_bytes / plan.processes / copies
        times = [times[0] + passes[0] * a_pass, times[1] + passes[1] / plan.processes * a_pass]
    training, evaluation = map(in_words, times)
    words = f"about {training} of training, then {evaluation} of evaluation"
    if plan.sources["kl_prompts"] != "measured":
        return words
    why = "so that it takes a quarter of the training" if plan.cost.is_within_share else "the fewest, unless kl_prompts says so"
    return f"{words}, which samples answers to {plan.config.kl_prompts} prompts: {why}"


@dataclass(frozen=True)
class Prepared:
    """The rows of a run as token ids, their counts, and their problems."""

    train: EncodedRows
    held_out: EncodedRows
    counts: Counts
    problems: tuple[Problem, ...]
    prompts: Sequence[SampledPrompt] = ()


def prepare(data: Data, tokenizer: PreTrainedTokenizerBase, plan: Plan, token_rows: int | None, tell: Tell) -> Prepared:
    """Split by prompt, tokenise, cut prompts to length, skip rows that are still too long.

    `token_rows` is the number of rows of the model's embedding, if known. Raises `InvalidInput` for rows that cannot be used.
    """
    config, made = plan.config, Tokenizer.loaded(tokenizer, plan.day, plan.model.generation)
    require_padding(made, tokenizer, token_rows)
    template = made.template
    encoded = _encodings(data, made, plan, token_rows, (False, True), tell)
    train, held_out = encoded.sides
    _require_rows(train, encoded.dropped[0], plan)
    sizes = ((size.length, side, place) for side in encoded.sides for place, size in enumerate(side.sizes()))
    longest, its_side, place = max(sizes, key=itemgetter(0))
    prompts = sampled_prompts(train, held_out, made, plan, token_rows, tell) if plan.strategy.generates else []
    longest_row = its_side.rows[place]
    counts = Counts(
        train_pairs=len(train),
        eval_pairs=len(held_out),
        train_prompts=len(prompts) or train.prompts,
        eval_prompts=held_out.prompts,
        cut=train.cut + held_out.cut,
        too_long=sum(map(len, encoded.dropped)),
        parted=train.parted + held_out.parted,
        bad_rows=encoded.refused + sum(data_set.unusable for data_set in (data.train, data.held_out) if data_set is not None),
        longest=longest,
        longest_at=f"{Path(longest_row.file).name}:{longest_row.line}",
        longest_pair=max(size.shared_length for side in encoded.sides for size in side.sizes()),
        longest_prompt=max(len(prompt.ids) for prompt in prompts) if prompts else max(size.prompt for size in train.sizes()),
        longest_responses=max(size.response_length for side in encoded.sides for size in side.sizes()),
        train_tokens=sum(size.response_length + len(size.responses) * size.prompt for size in train.sizes()),
        shared_tokens=sum(size.shared_length for size in train.sizes()),
        digest=DIGEST + hashlib.sha256(json.dumps([side.token_digests for side in encoded.sides]).encode()).hexdigest(),
        writes_date=template is not None and template.writes_date and config.use_chat_template is not False,
    )
    return Prepared(train, held_out, counts, encoded.problems, prompts)


def prepare_judged(
    data: Data, tokenizer: PreTrainedTokenizerBase, plan: Plan, token_rows: int | None, all_rows: bool, tell: Tell
) -> tuple[EncodedRows, tuple[Problem, ...]]:
    """The rows to evaluate, held out or all, prepared like in `prepare`; the training rows are not tokenised."""
    made = Tokenizer.loaded(tokenizer, plan.day, plan.model.generation)
    require_padding(made, tokenizer, token_rows)
    encoded = _encodings(data, made, plan, token_rows, (not all_rows,), tell)
    if all_rows:
        _require_rows(encoded.sides[0], encoded.dropped[0], plan)
    return encoded.sides[0], encoded.problems


def _encodings(data: Data, made: Tokenizer, plan: Plan, token_rows: int | None, sides: Sequence[bool], tell: Tell) -> Encodings:
    """The tokens of these sides (whether they are held out), without rows that are too long; those of large data are cached."""
    config, skip = plan.config, plan.config.on_bad_rows == "skip"
    encoder = Encoder.of(made, config.use_chat_template, config.max_seq_length, token_rows)

    total = data.count if len(sides) == 2 else None

    def make(growing: Sequence[Growing]) -> Encodings:
        data.require_unchanged()
        rows = ((sides.index(is_held_out), row) for is_held_out, row in data.rows(config) if is_held_out in sides)
        encoded = encoded_into(growing, rows, encoder, total, skip, config.max_seq_length).require()
        data.require_unchanged()
        return encoded

    given = {key: value for key, value in (("dataset", config.dataset), ("eval_dataset", config.eval_dataset)) if value}
    tokenizer = made.digest
    if large_files(given) is None or tokenizer is None:
        return make([Growing() for _ in sides])
    decides = {
        "files": digests_of(given),
        "sides": sides,
        "values": {name: getattr(config, name) for name in TOKEN_OPTIONS},
        "rows": plan.strategy.rows.noun,
        "tokenizer": [tokenizer, token_rows],
    }
    data.require_unchanged()
    return known_or_made(key_of(decides), f"{data.train.name}, {plan.model_label}", len(sides), make, tell)


def _require_rows(kept: EncodedRows, dropped: Sequence[int], plan: Plan) -> None:
    """`InvalidInput` if no row is left to train on; `dropped` are the lengths of those that are too long."""
    if not kept and not dropped:
        fix = f"increase the weights in dataset, or add {plan.noun}"
        raise invalid("nothing-to-train", f"none of the {plan.noun} is left to train on", fix, "dataset")
    if not kept:
        limit = f"max_seq_length {plan.config.max_seq_length}"
        message = f"the responses of all {len(dropped)} {plan.noun} to train on are longer than {limit}"
        fix = f"increase max_seq_length: the shortest has {min(dropped)} tokens"
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


def first_row(row: Encoded, tokenizer: PreTrainedTokenizerBase) -> str:
    """Prompt and responses decoded with their special tokens; the scored text is after the bar."""
    parts = zip(row.row.kind.responses, row.responses, strict=True)
    responses = [f"{name:<8} | {tokenizer.decode(ids)!r}" for name, ids in parts]
    rating = [f"{'rating':<8} | {GOOD if row.row.is_good else BAD}"] if isinstance(row.row, Rating) else []
    return "\n".join([tokenizer.decode(row.prompt_ids), *responses, *rating])


def tell_scoring(plan: Plan, console: Console) -> None:
    console.line(f"scoring: {plan.scoring.why}")
    logging.getLogger("dpo").info("scoring: %s", plan.scoring.why)

"""Answers of a model to prompts, in batches: greedy or sampled, and those of a base and its adapter side by side."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import StoppingCriteria

from dpo_cli.data.encoded import Encoded
from dpo_cli.data.messages import Text
from dpo_cli.data.rows import Question
from dpo_cli.evaluation.bootstrap import Array, Intervals, mean
from dpo_cli.evaluation.decoding import Drawing, fast_decoding, is_roomy, place_states, points_for, roomy_cache
from dpo_cli.hardware.memory import EvaluationRoom
from dpo_cli.plan.cost import AT_ONCE
from dpo_cli.providers.out_of_memory import free_memory, is_out_of_memory
from dpo_cli.providers.policy import Policy
from dpo_cli.providers.sharding import is_sharded
from dpo_cli.results.intervals import Interval
from dpo_cli.results.judgement import Answers
from dpo_cli.scoring.oom import in_halves, list_halves
from dpo_cli.scoring.packing import filled
from dpo_cli.storage.progress import Work, working
from dpo_cli.storage.world import ALONE, World


@dataclass(frozen=True)
class Answer:
    """What a model wrote: the text, its tokens without the end token, and whether that token came."""

    text: str
    tokens: int
    finished: bool
    ids: tuple[int, ...] = ()  # including the end token

    @property
    def is_missing(self) -> bool:
        """Whether the prompt left no room: an answer has at least one token or an end."""
        return not self.tokens and not self.finished


Rank = Callable[[Question, Sequence[Answer]], list[float]]  # scores of answers; a larger one is better


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; without a temperature, always the most likely one."""

    max_new_tokens: int
    temperature: float | None = None
    top_p: float = 1.0


class Watch(StoppingCriteria):
    """Sees the tokens of a single answer as they are chosen, and may end it after each."""

    def __init__(self, see: Callable[[int], bool]) -> None:
        """`see` gets each token, also an end token; an answer for which it returns True ends there."""
        self.see, self.has_ended = see, False

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        """Whether each row of `input_ids` (1, tokens) ends with its last token: (1,), bool."""
        self.has_ended = self.has_ended or self.see(int(input_ids[0, -1]))
        return torch.full((len(input_ids),), self.has_ended, device=input_ids.device)


PART = 16  # tokens of each row, after which the rows that have ended leave the batch
LANES = 16  # keys


@dataclass(frozen=True)
class Sample:
    """A prompt, and the answers of both models to it."""

    prompt: Text
    base: Answer
    adapter: Answer

    @property
    def is_missing(self) -> bool:
        """Whether the prompt left no room for answers."""
        return self.base.is_missing and self.adapter.is_missing

    @property
    def texts(self) -> Answers:
        """The answers to the last message of the prompt."""
        last = self.prompt if isinstance(self.prompt, str) else str(self.prompt[-1]["content"])
        return {"prompt": last, "base": self.base.text, "adapter": self.adapter.text}


def generate(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    dtype: torch.dtype,
    count: int = 1,
    work: Work | None = None,
    memory: EvaluationRoom | None = None,
    points: Tensor | None = None,
    watch: Watch | None = None,
) -> list[list[Answer]]:
    """`count` answers to each prompt (token ids), in evaluation mode; empty ones for a prompt that fills the model's context.

    Prompts with the same room for an answer form one batch: nearly always all of them. A long prompt takes no room from others.
    Sampled answers follow `points` (prompts * count, tokens, 2), or torch's random state, and through rounding the batch.
    `work` gets the number of answers as they end, `watch` the tokens of an answer to a single prompt. Layers are copied for
    speed if `memory` has room for that.

    Raises `RunFailed` if a token is to be drawn from scores that are not finite.
    """
    model.eval()
    # Learned positions end with the context; other positions are also limited to what the model was made for.
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    rooms = [int(min(sampling.max_new_tokens, context - len(prompt))) for prompt in prompts]
    results = [[Answer("", 0, False)] * count for _ in prompts]
    if sampling.temperature is not None and points is None:
        points = points_for(len(prompts) * count, sampling.max_new_tokens)
    for room in sorted({room for room in rooms if room > 0}, reverse=True):
        places = [place for place, own in enumerate(rooms) if own == room]
        asked, limited = [prompts[place] for place in places], replace(sampling, max_new_tokens=room)
        own = None
        if points is not None:
            own = torch.cat([points[place * count : (place + 1) * count] for place in places])
        batch = _batch(model, tokenizer, asked, limited, dtype, count, work, memory, own, watch)
        for place, answers_to_one in zip(places, batch, strict=True):
            results[place] = answers_to_one
    return results


def _batch(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    dtype: torch.dtype,
    count: int,
    work: Work | None,
    memory: EvaluationRoom | None,
    points: Tensor | None,
    watch: Watch | None,
) -> list[list[Answer]]:
    """`count` answers to each prompt, made as one batch of left-padded rows.

    If the copies of layers are out of memory, the batch is made without them: to the same answers.
    """
    device, pad = next(model.parameters()).device, int(tokenizer.pad_token_id)
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)  # (prompts, width)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    ids, mask = ids.repeat_interleave(count, 0), mask.repeat_interleave(count, 0)
    ends = _ends(model, tokenizer)

    def rows_of(copies_layers: bool) -> list[list[int]]:
        with (
            _plain(model),
            fast_decoding(model, dtype, copies_layers),
            torch.no_grad(),
            torch.autocast(device.type, dtype, enabled=dtype != torch.float32),
        ):
            return _continued(model, ids, mask, sampling, sorted(ends), pad, work, points, watch)

    copies_layers = memory is not None and memory.holds_answers(len(ids), width + sampling.max_new_tokens, memory.layers)
    copies_layers = copies_layers and not is_sharded(model)
    done = work.done if work is not None else 0
    rows: list[list[int]] | None = None
    try:
        rows = rows_of(copies_layers)
    except RuntimeError as error:
        if not copies_layers or not is_out_of_memory(error):
            raise
    if rows is None:  # here, because the error holds the tensors that fill the memory
        free_memory()
        if work is not None:
            work.done = done
        rows = rows_of(copies_layers=False)
    answers = [_answer(row, ends, tokenizer) for row in rows]
    return [answers[start : start + count] for start in range(0, len(answers), count)]


def _continued(
    model: PreTrainedModel | PeftModel,
    ids: Tensor,
    mask: Tensor,
    sampling: Sampling,
    ends: list[int],
    pad: int,
    work: Work | None = None,
    points: Tensor | None = None,
    watch: Watch | None = None,
) -> list[list[int]]:
    """The tokens that follow each row of `ids` (n, width), up to an end token and perhaps padding.

    transformers' `generate` makes the first token in batches of prompts of similar lengths, and then `PART` tokens at a time of
    all rows. Rows that have ended then leave the batch.
    """
    network = model.get_base_model() if isinstance(model, PeftModel) else model
    left = sampling.max_new_tokens
    drawing, width = Drawing(sampling.temperature, sampling.top_p, points), ids.shape[1]
    cache = roomy_cache(network, ids.shape[1] + left)
    part = PART if cache is not None else left
    rows: list[list[int]] = [[] for _ in ids]
    places = torch.arange(len(ids), device=ids.device)
    batches = _batches(mask.sum(1).tolist(), ids.shape[1]) if cache is not None and is_roomy(cache) else []
    tokens, start = 0, time.monotonic()
    while left and len(places):
        is_first = not tokens and len(batches) > 1
        tokens_at_once = 1 if is_first else min(part, left)
        settings = {
            "generation_config": GenerationConfig(max_new_tokens=tokens_at_once, eos_token_id=ends, pad_token_id=pad),
            "logits_processor": drawing.processors,
            "stopping_criteria": [watch] if watch is not None else [],
        }
        if is_first and cache is not None:
            longer, cache = _with_first_tokens(model, ids, mask, settings, batches, cache, left, drawing)
        else:
            drawing.next_are(places.tolist(), width)
            own = {} if cache is None else {"past_key_values": cache}
            longer = model.generate(input_ids=ids, attention_mask=mask, **settings, **own)
        new = longer[:, ids.shape[1] :]
        for place, of_row in zip(places.tolist(), new.tolist(), strict=True):
            rows[place] += of_row
        goes_on = ~torch.isin(new, torch.tensor(ends, device=new.device)).any(dim=1)
        left = 0 if watch is not None and watch.has_ended else left - new.shape[1]
        tokens += new.numel()
        if work is not None:
            ended = len(new) if not left else len(new) - int(goes_on.sum())
            work.add(ended, f"{tokens / (time.monotonic() - start):,.0f} tokens/s")
        if left and not goes_on.all() and goes_on.any() and cache is not None:
            cache.batch_select_indices(goes_on.nonzero()[:, 0])
        mask = torch.cat([mask, torch.ones_like(new)], dim=1)[goes_on]
        ids, places = longer[goes_on], places[goes_on]
    return rows


Batch = tuple[int, list[int]]  # the width of some prompts, and their places


def _batches(lengths: Sequence[int], width: int) -> list[Batch]:
    """Batches of prompts of similar lengths, which are narrower than the `width` of all.

    Their padding differs from that of all by whole lanes, in which torch's attention on a CPU sums over keys. So a prompt has
    the same states to the bit as in one batch, also in bfloat16.
    """
    places: dict[int, list[int]] = {}
    for place, length in enumerate(lengths):
        places.setdefault(width - (width - length) // LANES * LANES, []).append(place)
    return sorted(places.items())


def _with_first_tokens(
    model: PreTrainedModel | PeftModel,
    ids: Tensor,
    mask: Tensor,
    settings: Mapping[str, Any],
    batches: Sequence[Batch],
    cache: DynamicCache,
    left: int,
    drawing: Drawing,
) -> tuple[Tensor, DynamicCache | None]:
    """`ids` with the first token of each answer, and the empty cache with the states of the prompts.

    Phi 3 drops the cache of prompts that go beyond its first positions. Then it is an empty one: all is computed again.
    """
    network = model.get_base_model() if isinstance(model, PeftModel) else model
    longer, width = torch.cat([ids, ids[:, -1:]], dim=1), ids.shape[1]
    is_whole = True
    for own, places in batches:
        of_batch = roomy_cache(network, own + 1)
        assert of_batch is not None
        mine, seen = (each[places, width - own :] for each in (ids, mask))
        drawing.next_are(places, own)
        made = model.generate(input_ids=mine, attention_mask=seen, **settings, past_key_values=of_batch)
        longer[places, width:] = made[:, own:]
        is_whole = is_whole and of_batch.get_seq_length() > 0
        if is_whole:
            place_states(of_batch, cache, places, len(ids), width)
    return longer, cache if is_whole else roomy_cache(network, width + left)


@contextmanager
def _plain(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Within, the model has no generation_config: `generate` would take missing arguments from it.

    An answer then depends only on the model, as the log-probs of a figure do: no token is forced, suppressed or penalised.
    """
    holders = [model, model.get_base_model()] if isinstance(model, PeftModel) else [model]
    own = [holder.generation_config for holder in holders]
    for holder in holders:
        holder.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for holder, config in zip(holders, own, strict=True):
            holder.generation_config = config


def _ends(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end an answer: the tokenizer's EOS, and those of the model (Llama 3 has two more)."""
    of_model = model.generation_config.eos_token_id
    return {int(tokenizer.eos_token_id), *(of_model if isinstance(of_model, list) else [] if of_model is None else [of_model])}


def _answer(row: Sequence[int], ends: set[int], tokenizer: PreTrainedTokenizerBase) -> Answer:
    tokens = next((i for i, token in enumerate(row) if token in ends), None)
    text = str(tokenizer.decode(row[:tokens], skip_special_tokens=True)).strip()
    own_ids = row if tokens is None else row[: tokens + 1]
    return Answer(text, len(row) if tokens is None else tokens, finished=tokens is not None, ids=tuple(own_ids))


def first_of_each_prompt(rows: Sequence[Encoded], count: int) -> list[Encoded]:
    """The first row of each of the first `count` different prompts; rows without a prompt are skipped."""
    return list({row.row.prompt_key: row for row in reversed(rows) if row.row.prompt}.values())[::-1][:count]


def side_by_side(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Encoded],
    count: int,
    max_new_tokens: int,
    dtype: torch.dtype,
    room: EvaluationRoom | None = None,
) -> list[Sample]:
    """Greedy answers of the reference and the policy to the first `count` different prompts, in the batches of `answers`.

    The answers to the first prompts do not depend on `count`, as far as they fill batches.
    """
    first, greedy = first_of_each_prompt(rows, count), Sampling(max_new_tokens)
    prompts = [row.prompt_ids for row in first]
    adapter = answers(policy.network, tokenizer, prompts, greedy, dtype, room, "answering as the adapter", policy.world)
    with policy.as_reference() as reference:
        base = answers(reference, tokenizer, prompts, greedy, dtype, room, "answering as the base", policy.world)
    return [Sample(row.row.prompt, *both) for row, *both in zip(first, base, adapter, strict=True)]


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    dtype: torch.dtype,
    room: EvaluationRoom | None = None,
    what: str = "sampling",
    world: World = ALONE,
) -> list[Answer]:
    """An answer to each prompt, in batches of at most `AT_ONCE` that `room` holds; a batch that is out of memory is divided.

    Each process of a `world` answers a part of each batch. Sampled answers do not depend on their number, except for rounding.
    """

    def fits(batch: Sequence[int]) -> bool:
        width = max(len(prompts[place]) for place in batch) + sampling.max_new_tokens
        return len(batch) <= AT_ONCE and (room is None or room.holds_answers(len(batch), width))

    points = points_for(len(prompts), sampling.max_new_tokens) if sampling.temperature is not None else None
    batches = [batch[world.rank :: world.size] for batch in filled(range(len(prompts)), fits)]
    own = [batch for batch in batches if batch]

    def of_process() -> dict[int, Answer]:
        written: dict[int, Answer] = {}
        with working(what, sum(map(len, own)), "prompts") as work:

            def answered(batch: list[int]) -> list[list[Answer]]:
                work.done = len(written)  # a batch that was out of memory has counted too
                asked = [prompts[place] for place in batch]
                drawn = torch.stack([points[place] for place in batch]) if points is not None else None
                return generate(model, tokenizer, asked, sampling, dtype, work=work, memory=room, points=drawn)

            for batch, of_batch in in_halves(own, answered, list_halves):
                written |= {place: answer for place, (answer,) in zip(batch, of_batch, strict=True)}
        return written

    written = {place: answer for part in world.each(of_process) for place, answer in part.items()}
    return [written[place] for place in range(len(prompts))]


def answer_tokens(samples: Sequence[Sample]) -> dict[str, Interval] | None:
    """Mean tokens of the answers of `base` and of `policy`, and `gain`, their paired difference, with intervals.

    An unfinished answer counts with its tokens; a missing one does not count.
    """
    samples = [sample for sample in samples if not sample.is_missing]
    if not samples:
        return None
    base, policy = (
        np.array([float(answer.tokens) for answer in side])
        for side in ([sample.base for sample in samples], [sample.adapter for sample in samples])
    )
    return paired(base, policy)


def paired(base: Array, policy: Array) -> dict[str, Interval]:
    """The means of two figures of the same prompts, both (n,), and `gain`, their difference, with intervals over prompts."""
    intervals = Intervals([str(i) for i in range(len(base))])
    figures = {"base": base, "policy": policy, "gain": policy - base}
    return {name: intervals.of(mean(values)) for name, values in figures.items()}

"""Answers in batches: padding changes nothing, sampling follows its seed, and answers are counted with intervals."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import made_row, tiny_model
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dpo_cli.data.rows import to_pair
from dpo_cli.data.tokens import encode
from dpo_cli.evaluation import generation
from dpo_cli.evaluation.generation import Answer, Sample, Sampling, answer_tokens, answers, generate, side_by_side
from dpo_cli.hardware.memory import EvaluationRoom
from dpo_cli.providers.policy import Policy

SAMPLED = Sampling(24, temperature=1.5)
GREEDY = Sampling(8)


def talker() -> PreTrainedModel:
    """A tiny model that ends some of its answers within a few tokens."""
    model = tiny_model("llama", torch.float32)
    with torch.no_grad():
        model.lm_head.weight[2] *= 3
    return model


def prompts(tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    return [tokenizer("the cat " * count)["input_ids"] for count in (1, 5, 3)]


def test_a_batch_answers_as_each_prompt_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    model, asked = talker(), prompts(tokenizer)
    batch = generate(model, tokenizer, asked, Sampling(24), torch.float32)
    assert batch == [generate(model, tokenizer, [ids], Sampling(24), torch.float32)[0] for ids in asked]
    for ids, (answer,) in zip(asked, batch, strict=True):  # and as arguments of the plain forward
        for _ in range(answer.tokens):
            ids = [*ids, int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
        assert answer.text == tokenizer.decode(ids[-answer.tokens :], skip_special_tokens=True).strip()


def test_sampling_follows_its_seed_and_not_the_models_own_settings(tokenizer: PreTrainedTokenizerFast) -> None:
    model, asked = talker(), prompts(tokenizer)

    def sampled(seed: int) -> list[list[Answer]]:
        torch.manual_seed(seed)
        return generate(model, tokenizer, asked, SAMPLED, torch.float32, count=4)

    first = sampled(1)
    assert [len(answers) for answers in first] == [4, 4, 4]
    assert len({answer.text for answers in first for answer in answers}) > 6
    assert sampled(1) == first != sampled(2)
    own = {"temperature": 0.01, "top_k": 1, "top_p": 0.1, "repetition_penalty": 5.0, "min_p": 0.9, "do_sample": False}
    own |= {"suppress_tokens": list(range(0, 300, 2)), "forced_eos_token_id": 7, "no_repeat_ngram_size": 1}
    own |= {"min_new_tokens": 20, "bad_words_ids": [[5], [9]], "renormalize_logits": True, "num_beams": 3}
    greedy = generate(model, tokenizer, asked, GREEDY, torch.float32)
    model.generation_config.update(**own)
    assert sampled(1) == first
    assert generate(model, tokenizer, asked, GREEDY, torch.float32) == greedy
    assert model.generation_config.suppress_tokens == own["suppress_tokens"]  # as it is saved


def test_an_answer_ends_with_any_of_the_models_ends(tokenizer: PreTrainedTokenizerFast) -> None:
    model, asked = talker(), prompts(tokenizer)
    torch.manual_seed(1)
    answers = [answer for row in generate(model, tokenizer, asked, SAMPLED, torch.float32, count=8) for answer in row]
    assert {answer.finished for answer in answers} == {True, False}
    assert all((answer.tokens == 24) >= (not answer.finished) and answer.tokens <= 24 for answer in answers)
    assert all(not answer.finished for answer in answers if answer.tokens == 24)
    model.generation_config.eos_token_id = list(range(150))  # nearly every token is one now
    torch.manual_seed(1)
    sooner = [answer for row in generate(model, tokenizer, asked, SAMPLED, torch.float32, count=8) for answer in row]
    assert sum(answer.tokens for answer in sooner) < 0.5 * sum(answer.tokens for answer in answers)


def test_a_long_prompt_takes_no_room_from_others(tokenizer: PreTrainedTokenizerFast) -> None:
    """Of these prompts one leaves 4 tokens of a context of 40, one leaves 1, and two fill it. The others answer as alone."""
    model, short = talker(), prompts(tokenizer)
    model.config.max_position_embeddings = 40
    lengths = {36: 4, 39: 1, 40: 0, 44: 0}
    long = {length: [5] * length for length in lengths}
    asked = [long[40], short[0], long[36], short[1], long[44], short[2], long[39]]
    alone = generate(model, tokenizer, short, GREEDY, torch.float32)
    made = generate(model, tokenizer, asked, GREEDY, torch.float32)
    assert [made[1], made[3], made[5]] == alone and all(not answer.is_missing for (answer,) in alone)
    for place, length in ((0, 40), (2, 36), (4, 44), (6, 39)):
        (answer,) = made[place]
        assert len(answer.ids) <= lengths[length] and answer.is_missing == (lengths[length] == 0)

    def drawn() -> list[list[Answer]]:
        torch.manual_seed(1)
        return generate(model, tokenizer, asked, SAMPLED, torch.float32, count=3)

    assert drawn() == drawn() and [len(answers) for answers in drawn()] == [3] * 7
    both = [Sample("p", answer, answer) for (answer,) in made]
    assert answer_tokens(both) == answer_tokens([sample for sample in both if not sample.is_missing])


def test_side_by_side_answers_different_prompts_in_halves_too(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six rows over three prompts, of which two are asked for; without memory for both they are answered one by one."""
    model = get_peft_model(talker(), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    pairs = encode([to_pair(made_row(i), i + 1) for i in range(6)], tokenizer)
    policy = Policy(model)
    whole = side_by_side(policy, tokenizer, pairs, 2, 128, torch.float32)
    assert [sample.prompt for sample in whole] == ["question 0", "question 1"]
    assert all(sample.base != sample.adapter for sample in whole)
    assert side_by_side(policy, tokenizer, [], 2, 128, torch.float32) == []

    def small(
        model: object, tokenizer: object, prompts: list[list[int]], *rest: object, **options: object
    ) -> list[list[Answer]]:
        if len(prompts) > 1:
            raise torch.OutOfMemoryError("none left")
        return generate(model, tokenizer, prompts, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(generation, "generate", small)
    assert side_by_side(policy, tokenizer, pairs, 2, 128, torch.float32) == whole
    monkeypatch.undo()
    monkeypatch.setattr(generation, "AT_ONCE", 1)
    assert side_by_side(policy, tokenizer, pairs, 2, 128, torch.float32) == whole


def test_prompts_are_answered_as_many_at_once_as_there_is_room_for(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the widest prompt of a batch, in their order; one that is too long for the room is alone."""
    batches: list[list[int]] = []

    def seen(
        model: object, tokenizer: object, prompts: list[list[int]], *rest: object, **options: object
    ) -> list[list[Answer]]:
        batches.append([len(prompt) for prompt in prompts])
        return [[Answer("", 0, True)] for _ in prompts]

    monkeypatch.setattr(generation, "generate", seen)
    room = EvaluationRoom(free=100.0, moment=1.0, state=0.0, logits=0.0, cached=1.0, layers=0.0)  # 50 tokens
    asked = [[5] * length for length in (6, 7, 20, 60, 5, 5, 5, 5)]
    made = answers(talker(), tokenizer, asked, Sampling(10), torch.float32, room)
    assert batches == [[6, 7], [20], [60], [5, 5, 5], [5]] and len(made) == len(asked)
    batches.clear()
    answers(talker(), tokenizer, [[5]] * 70, Sampling(10), torch.float32)
    assert [len(batch) for batch in batches] == [64, 6]


@pytest.mark.parametrize(("layers", "copied"), [(4.0, [True, True]), (5.0, [False, True])])
def test_layers_are_copied_for_each_batch_that_leaves_memory(
    layers: float, copied: list[bool], tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, own = list[bool](), generation.fast_decoding

    def watched(model: Any, dtype: torch.dtype, copies_layers: bool = False) -> Any:
        seen.append(copies_layers)
        return own(model, dtype, copies_layers)

    monkeypatch.setattr(generation, "fast_decoding", watched)
    room = EvaluationRoom(free=100.0, moment=1.0, state=0.0, logits=0.0, cached=1.0, layers=layers)
    answers(talker(), tokenizer, [[5] * 6] * 4, Sampling(10), torch.float32, room)  # 3 and 1, of 16 tokens each
    assert seen == copied
    answers(talker(), tokenizer, [[5] * 6], Sampling(10), torch.float32)
    assert seen[2:] == [False]  # the room is unknown


def test_answers_are_the_same_where_copies_of_layers_are_out_of_memory(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch is not divided: that would change what is sampled."""
    model, asked, own, seen = talker(), prompts(tokenizer), generation.fast_decoding, list[int]()
    room = EvaluationRoom(free=1e9, moment=1.0, state=0.0, logits=0.0, cached=1.0, layers=1.0)

    @contextmanager
    def watched(model: Any, dtype: torch.dtype, copies_layers: bool = False) -> Iterator[None]:
        seen.append(copies_layers)
        with own(model, dtype):
            yield
        if copies_layers:
            torch.rand(3)
            torch.empty(1 << 60)

    torch.manual_seed(1)
    expected = answers(model, tokenizer, asked, SAMPLED, torch.float32)
    monkeypatch.setattr(generation, "fast_decoding", watched)
    torch.manual_seed(1)
    assert answers(model, tokenizer, asked, SAMPLED, torch.float32, room) == expected and seen == [True, False]


def test_a_sample_keeps_the_conversation_and_shows_its_last_message() -> None:
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    sample = Sample(prompt, Answer("So.", 2, True), Answer("Because.", 3, True))
    assert sample.prompt == prompt
    assert sample.texts == {"prompt": "Why?", "base": "So.", "adapter": "Because."}


def test_answer_tokens_by_hand() -> None:
    """Base 10, 20, 60: mean 30. Adapter 5, 10, 30: mean 15. Differences -5, -10, -30: mean -15, each resampled mean below 0."""
    both = [(10, 5), (20, 10), (60, 30)]
    made = answer_tokens([Sample("p", Answer("", base, True), Answer("", adapter, True)) for base, adapter in both])
    assert made is not None and list(made) == ["base", "policy", "gain"]
    assert [made[name].value for name in made] == pytest.approx([30, 15, -15])
    assert (made["gain"].low, made["gain"].high) == pytest.approx((-30, -5))
    assert answer_tokens([]) is None

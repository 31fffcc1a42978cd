"""Ranks several answers to a prompt by a rule, a reward model or a judge, and makes pairs of them.

Each way to rank gives every answer a score; a larger one is better:

shorter, longer   tokens, negative for `shorter`
regex             1 if the pattern is found, else 0
reference         overlap of the words with the reference, 0 to 100, in any order
reward            the reward model's one output
judge             wins minus losses against the other answers (`dpo_cli/preferences/judge.py`)
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

import torch
from rapidfuzz import fuzz, utils
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo_cli.data.chat_template import ChatTemplate
from dpo_cli.data.messages import Message, flat
from dpo_cli.data.rows import Question
from dpo_cli.data.transcripts import as_messages
from dpo_cli.evaluation.generation import Answer, Rank
from dpo_cli.models.source import ModelSource
from dpo_cli.preferences.judge import Judge
from dpo_cli.providers.huggingface import HuggingFace
from dpo_cli.runs.reward_run import RewardModel, reward_run

RELATIVE = ("judge",)  # their scores compare an answer with the others of its prompt: their mean is always 0


def ranking(options: Mapping[str, Any], device: str, dtype: torch.dtype, day: date) -> Rank:
    """The way to rank of the option `augment`, with its model loaded if it has one; `day` is the date of the template."""
    pattern = re.compile(options["pattern"] or "")
    rules: dict[str, Callable[[], Rank]] = {
        "shorter": lambda: lambda _, answers: [-float(answer.tokens) for answer in answers],
        "longer": lambda: lambda _, answers: [float(answer.tokens) for answer in answers],
        "regex": lambda: lambda _, answers: [float(pattern.search(answer.text) is not None) for answer in answers],
        "reference": lambda: by_reference,
        "reward": lambda: Reward(options["reward_model"], device, dtype, day),
        "judge": lambda: Judge(options["judge_url"], options["judge_model"], options["criterion"]),
    }
    return rules[options["rank"]]()


def by_reference(question: Question, answers: Sequence[Answer]) -> list[float]:
    """Normalised similarity of the sorted words, without case and punctuation."""
    reference = question.reference
    if not reference:  # empty texts are alike
        return [0.0 for _ in answers]
    return [fuzz.token_sort_ratio(answer.text, reference, processor=utils.default_process) for answer in answers]


class Reward:
    """A reward model: a run of `"strategy": "reward"` or its adapter folder, which scores as its evaluation does; or a sequence
    classifier with one label, a local directory or a hub id: safetensors only, and its code is not run."""

    def __init__(self, name: str, device: str, dtype: torch.dtype, day: date) -> None:
        run = reward_run(name)
        self.rewards = RewardModel.of_run(run, device, dtype) if run else Classifier.named(name, device, dtype, day)
        self.model = self.rewards.network

    def __call__(self, question: Question, answers: Sequence[Answer]) -> list[float]:
        """One forward pass per answer, so that no score depends on the other answers."""
        return self.rewards(question, [answer.text for answer in answers])


@dataclass(frozen=True)
class Classifier:
    """A sequence classifier with one label, which reads a conversation that ends with the answer."""

    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate | None

    @classmethod
    def named(cls, name: str, device: str, dtype: torch.dtype, day: date) -> Classifier:
        model, tokenizer = HuggingFace(ModelSource.of(name)).reward_model(device, dtype)
        return cls(model, tokenizer, ChatTemplate.of(tokenizer, day))

    def __call__(self, question: Question, texts: Sequence[str]) -> list[float]:
        return [self._score(question, text) for text in texts]

    def _score(self, question: Question, text: str) -> float:
        if self.template is None:
            inputs = self.tokenizer(flat(question.prompt), text, return_tensors="pt")
        else:
            messages: list[Message] = [*as_messages(question.prompt, "user"), {"role": "assistant", "content": text}]
            tools = [dict(tool) for tool in question.tools] or None
            inputs = self.tokenizer(self.template.render(messages, tools), add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            return float(self.network(**inputs.to(self.network.device)).logits[0, 0])


@dataclass(frozen=True)
class Ranked:
    """Two answers of a prompt, by their indices, and their scores."""

    chosen: int
    rejected: int
    scores: tuple[float, float]


def best_pairs(answers: Sequence[Answer], scores: Sequence[float], count: int, min_distance: float) -> list[Ranked]:
    """Up to `count` pairs whose scores are at least `min_distance` apart, and differ.

    The first pair has the largest distance; then each answer is used in as few pairs as possible. An unfinished answer is
    never chosen.
    """
    places = range(len(answers))
    possible = [
        Ranked(one, other, (scores[one], scores[other]))
        for one in places
        for other in places
        if answers[one].finished and scores[one] > scores[other] and scores[one] - scores[other] >= min_distance
    ]
    uses: Counter[int] = Counter()
    pairs: list[Ranked] = []
    while possible and len(pairs) < count:
        best = max(possible, key=lambda pair: (-uses[pair.chosen] - uses[pair.rejected], pair.scores[0] - pair.scores[1]))
        possible.remove(best)
        uses.update((best.chosen, best.rejected))
        pairs.append(best)
    return pairs

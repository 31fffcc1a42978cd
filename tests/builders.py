"""Made up for tests and benchmarks: conversations of several turns with two answers, a tokenizer; exact norms."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from dpo_cli.commands.eval import evaluate
from dpo_cli.commands.requests import Request
from dpo_cli.results.codec import to_json
from dpo_cli.results.summary import Line
from dpo_cli.ui.console import Console

WORDS = """
the a this that my your one some cat dog house river mountain bread letter garden winter morning train city friend song idea
question answer reason color window runs likes sees makes keeps finds opens follows asks tells under over near before after
while because slowly quickly often never again tomorrow really quite small large green old new warm
"""
VOCABULARY = 300
IDS = torch.tensor([[1, 7, 30, 299, 12, 150, 66, 5]])
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def judged_json(asked: Request, console: Console) -> dict[str, Any]:
    """What `eval --json` prints, without its thresholds."""
    evaluation, compared = evaluate(asked, console)
    return {**evaluation.shown, "side_by_side": to_json(compared) if compared else None}


def line_of(**values: Any) -> Line:
    """A line of metrics.jsonl; of the first step and epoch where nothing is said."""
    return Line.of_json({"split": "train", "step": 1, "epoch": 0.0, **values})


def conversation_pairs(count: int, turn_words: int, answer_words: int, seed: int = 0) -> list[dict[str, object]]:
    """Rows of `count` pairs: three, five or seven messages, then two answers; each text half to one and a half as long."""
    draw, words = random.Random(seed), WORDS.split()

    def text(length: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(length // 2, length * 3 // 2))).capitalize() + "."

    def row() -> dict[str, object]:
        turns = draw.choice((3, 5, 7))
        roles = ["user" if turn % 2 == 0 else "assistant" for turn in range(turns)]
        prompt = [{"role": role, "content": text(turn_words)} for role in roles]
        answers = {name: [{"role": "assistant", "content": text(answer_words)}] for name in ("chosen", "rejected")}
        return {"prompt": prompt, **answers}

    return [row() for _ in range(count)]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a ChatML template; pad = eos = <|im_end|>, as in SmolLM2."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        ["the cat sat on the mat; the answer is"] * 3,
        trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet),
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    made.chat_template = CHATML
    return made


def norms_in_float64(model: torch.nn.Module) -> None:
    """transformers computes RMS norms in float32, which alone would cost nine digits."""

    def exact(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        eps = getattr(module, "variance_epsilon", None) or module.eps
        offset = 1 if "Gemma" in type(module).__name__ else 0
        return lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (module.weight + offset)

    for module in model.modules():
        if "RMSNorm" in type(module).__name__:
            module.forward = exact(module)  # type: ignore[method-assign]


def log_probs(model: nn.Module) -> Tensor:
    """Of each token of `IDS` after the first: (1, 7)."""
    with torch.no_grad():
        logits: Tensor = model.eval()(input_ids=IDS, use_cache=False).logits
    return logits[:, :-1].log_softmax(dim=-1).gather(-1, IDS[:, 1:, None])[..., 0]


def randomised(model: nn.Module) -> None:
    """Move the trained weights, so that they do something; norms stay as they are."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad and "norm" not in name:
                weight.add_(torch.randn_like(weight) * 0.2)

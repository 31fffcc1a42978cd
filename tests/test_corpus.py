"""Generated conversations through published chat templates: every part of a response is trained on, or its row is named."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import trl
from builders import tiny_tokenizer
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpo_cli.data.chat_template import ChatTemplate
from dpo_cli.data.messages import BadRow
from dpo_cli.data.rows import to_pair
from dpo_cli.data.tokenizer import Tokenizer
from dpo_cli.data.tokens import encode_all
from dpo_cli.models.model_files import ModelFiles
from dpo_cli.models.tokenizer_files import tokenizer_of

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "15"))
FAMILIES = """llama3 llama3_1 llama3_2 qwen2_5 qwen3 qwen3_8 gemma gemma3 phi3_5 cohere2 deepseekv3 deepseek_r1_distill glm4moe
gptoss lfm2 nemotron_3_nano"""
TEMPLATES = Path(trl.__file__).parent / "chat_templates"
OWN = ROOT / "models" / "tokenizers"  # `make tokenizers`


class Words:
    """Texts of words that stand nowhere else, so that each can be looked for."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw, self.numbers = draw, count()

    def text(self) -> str:
        words = [f"w{next(self.numbers)}x" for _ in range(self.draw(st.integers(1, 3)))]
        return self.draw(st.sampled_from(["", " ", "\n"])) + self.draw(st.sampled_from([" ", "\n", "\n\n"])).join(words)


def call(words: Words) -> dict[str, Any]:
    draw = words.draw
    arguments: Any = {"city": words.text().strip(), "days": draw(st.integers(0, 9))}
    if draw(st.booleans()):
        arguments["unit"] = None
    if draw(st.booleans()):
        arguments = json.dumps({name: value for name, value in arguments.items() if value is not None})
    own = draw(st.sampled_from([{}, {"id": "call12345"}, {"id": None}]))
    return {**own, "type": "function", "function": {"name": "weather", "arguments": arguments}}


def answer(words: Words, calls: bool) -> dict[str, Any]:
    """An assistant's message: text, with reasoning in a key or between tags, or tool calls; keys that are null."""
    draw = words.draw
    message: dict[str, Any] = {"role": "assistant", "content": words.text()}
    match draw(st.sampled_from(["text", "text", "key", "tags", "call" if calls else "text"])):
        case "key":
            message["reasoning_content"] = words.text()
        case "tags":
            message["content"] = f"<think>{words.text()}</think>{message['content']}"
        case "call":
            message["tool_calls"] = [call(words) for _ in range(draw(st.integers(1, 2)))]
            message["content"] = draw(st.sampled_from([None, "", message["content"]]))
    for key in draw(st.sets(st.sampled_from(["tool_calls", "name", "refusal", "reasoning_content"]))):
        message.setdefault(key, None)
    return message


@st.composite
def rows(draw: st.DrawFn) -> dict[str, Any]:
    words = Words(draw)
    prompt: list[dict[str, Any]] = []
    if draw(st.booleans()):
        prompt.append({"role": "system", "content": words.text()})
    has_tools = draw(st.booleans())
    for _ in range(draw(st.integers(0, 2))):
        prompt += [{"role": "user", "content": words.text()}, answer(words, has_tools)]
        for one in prompt[-1].get("tool_calls") or ():
            prompt.append({"role": "tool", "tool_call_id": one.get("id"), "name": "weather", "content": words.text()})
    prompt.append({"role": "user", "content": words.text()})
    schema = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer", "default": None}}}
    tool = {"type": "function", "function": {"name": "weather", "description": words.text(), "parameters": schema}}
    row: dict[str, Any] = {"prompt": prompt, "chosen": [answer(words, has_tools)], "rejected": [answer(words, has_tools)]}
    return {**row, "tools": [tool]} if has_tools else row


def words_of(message: dict[str, Any]) -> set[str]:
    """The words of a response, those of its tool calls too."""
    return set(re.findall(r"w\d+x", json.dumps(message)))


@pytest.mark.parametrize("family", FAMILIES.split())
def test_every_part_of_a_response_is_trained_on_or_named(family: str) -> None:
    source = (TEMPLATES / f"{family}.jinja").read_text(encoding="utf-8")
    template = ChatTemplate(source, {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"})
    require_every_part(replace(Tokenizer.loaded(tiny_tokenizer()), template=template))


@pytest.mark.parametrize("family", ["llama3_1", "qwen3", "gemma3", "mistral"])
def test_the_same_with_the_own_tokenizer_of_a_model(family: str) -> None:
    made = tokenizer_of(ModelFiles(OWN / family))
    if made is None:
        pytest.skip("`make tokenizers` fetches the tokenizers of Llama 3.1, Qwen 3, Gemma 3 and Mistral")
    require_every_part(made)


def require_every_part(made: Tokenizer) -> None:
    seen = [0, 0]

    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(rows())
    def check(row: dict[str, Any]) -> None:
        try:
            pair = to_pair(row, 7)
        except BadRow as error:
            assert error.code == "row-empty"
            return
        encoded = encode_all([[pair]], made, skip=True)
        named = {problem.code for problem in encoded.problems} & {"template-refuses", "template-fails", "template-leaves-out"}
        seen[0] += 1
        if not encoded.sides[0]:
            assert encoded.problems and encoded.refused == 1
            return
        (one,) = encoded.sides[0]
        for key, ids in (("chosen", one.chosen_ids), ("rejected", one.rejected_ids)):
            text = made.decode(ids)
            missing = {word for word in words_of(row[key][0]) if word not in text}
            assert not missing or "template-leaves-out" in named, (missing, text)
            seen[1] += not missing
            assert '\\"city' not in text and "'city'" not in text and "None" not in text

    check()
    assert seen[1] >= seen[0] / 4  # rows are not merely named

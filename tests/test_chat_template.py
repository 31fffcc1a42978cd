"""Chat templates: rendered as transformers renders them, with every part of a message, or the part is named."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import trl
from builders import CHATML, tiny_tokenizer
from jinja2 import TemplateError
from tokenizers import processors
from transformers.utils.chat_template_utils import render_jinja_template

from dpo_cli.data.chat_template import ChatTemplate
from dpo_cli.data.rows import Pair
from dpo_cli.data.tokenizer import Tokenizer
from dpo_cli.data.tokens import Encodings, encode_all
from dpo_cli.errors import InvalidInput
from dpo_cli.models.model_files import ModelFiles
from dpo_cli.models.tokenizer_files import tokenizer_of

TEMPLATES = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
TOKENS = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Its name"}},
            "required": ["city"],
        },
    },
}
USER = {"role": "user", "content": "Is it warm in Oslo?"}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}],
}
RESULT = {"role": "tool", "name": "weather", "tool_call_id": "call00001", "content": "12 degrees"}
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], list[Any] | None]] = {
    "answer": ([USER, {"role": "assistant", "content": "No."}], None),
    "system": ([{"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "content": "No."}], None),
    "turns": ([USER, {"role": "assistant", "content": "No."}, {"role": "user", "content": "And in Rome?"}], None),
    "reasoning": ([USER, {"role": "assistant", "content": "No.", "reasoning_content": "12 degrees are cold."}], None),
    "tools": ([USER, CALL, RESULT, {"role": "assistant", "content": "No."}], [TOOL]),
    "call": ([USER, CALL], [TOOL]),
}


@pytest.mark.parametrize("file", TEMPLATES, ids=lambda file: file.stem)
def test_templates_render_as_in_transformers(file: Path) -> None:
    """The templates that TRL ships, on conversations with arguments as objects; what one refuses the other refuses."""
    source = file.read_text(encoding="utf-8")
    template = ChatTemplate(source, TOKENS, date.today())
    for name, (messages, tools) in CONVERSATIONS.items():
        for asks in (True, False):
            try:
                (theirs,), _ = render_jinja_template(
                    [messages], tools, chat_template=source, add_generation_prompt=asks, **TOKENS
                )
            except Exception as error:
                if name in ("tools", "call") and "can only concatenate" in str(error):  # it joins texts: tested below
                    continue
                with pytest.raises(TemplateError):
                    template.render(messages, tools, add_generation_prompt=asks)
                continue
            assert template.render(messages, tools, add_generation_prompt=asks) == theirs, name


@pytest.mark.parametrize("file", TEMPLATES, ids=lambda file: file.stem)
@pytest.mark.parametrize("given", [{"city": "Oslo"}, '{"city": "Oslo"}'], ids=["object", "text"])
def test_arguments_come_out_once(file: Path, given: Any) -> None:
    call = {**CALL, "tool_calls": [{**CALL["tool_calls"][0], "function": {"name": "weather", "arguments": given}}]}
    template = ChatTemplate(file.read_text(encoding="utf-8"), TOKENS)
    try:
        text = template.render([USER, call, RESULT], [TOOL])
    except TemplateError:
        return  # it has no tools, which other tests see
    said = text.rpartition("weather")[0] if "12 degrees" in text else text
    if "Oslo" not in said.replace(USER["content"], ""):
        return
    assert '\\"city' not in text and "{'city" not in text
    assert text == template.render([USER, CALL, RESULT], [TOOL])


def test_the_clock_stands_at_the_day_of_the_run() -> None:
    source = "{{ strftime_now('%d %b %Y') }}"
    assert ChatTemplate(source, {}, date(2026, 3, 1)).render([USER]) == "01 Mar 2026"
    assert ChatTemplate(source, {}).writes_date and not ChatTemplate("{{ messages }}", {}).writes_date


def test_text_arguments_stay_as_they_are_written() -> None:
    source = "{% for m in messages %}{% for c in m.tool_calls %}{{ 'CALL ' + c.function.arguments }}{% endfor %}{% endfor %}"
    for given in ('{"city":"Oslo"}', '{"city": "Oslo"}'):
        call = {**CALL, "tool_calls": [{"function": {"name": "weather", "arguments": given}}]}
        assert ChatTemplate(source, {}).render([USER, call]) == f"CALL {given}"
    assert json.loads(ChatTemplate(source, {}).render([USER, CALL])[5:]) == {"city": "Oslo"}


R1 = """{% for m in messages %}{% if m.role == 'user' %}U {{ m.content }}{% else
%}A {{ m.content.split('</think>')[-1] }}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}A {% endif %}"""
NO_REASONING = CHATML.replace("message['content']", "(message['content'] | trim)")
JOINS = "{% for m in messages %}{{ m.role + ': ' + m.content + (m.thoughts or '') + '<|im_end|>' }}{% endfor %}"


def encoded(source: str, *pairs: Pair, skip: bool = False, **options: Any) -> Encodings:
    loaded = Tokenizer.loaded(tiny_tokenizer())
    return encode_all([pairs], replace(loaded, template=ChatTemplate(source, TOKENS)), skip=skip, **options)


def pair(line: int, chosen: dict[str, Any], rejected: dict[str, Any], *before: dict[str, Any]) -> Pair:
    said = ({"role": "assistant", "content": "", **message} for message in (chosen, rejected))
    return Pair([*before, USER], [next(said)], [next(said)], line, "pairs.jsonl")


def problems(found: Encodings) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(one.severity, one.code, one.lines or (one.line or 0,)) for one in found.problems]


def test_what_a_template_leaves_out_is_named_with_its_rows() -> None:
    found = encoded(
        R1,
        pair(3, {"content": "<think>cold</think>No."}, {"content": "<think>warm</think>Yes."}),
        pair(5, {"content": "No."}, {"content": "Yes."}),
        pair(8, {"content": "I see: cold</think>No."}, {"content": "Yes."}),
    )
    assert problems(found) == [("warning", "template-leaves-out", (3,)), ("warning", "template-leaves-out", (8,))]
    assert ["between <think> and </think>" in found.problems[0].message, "before </think>" in found.problems[1].message] == [
        True
    ] * 2


def test_pairs_of_the_same_tokens_are_identical_rows() -> None:
    same = pair(4, {"content": "<think>cold</think>No."}, {"content": "<think>warm</think>No."})
    found = encoded(R1, same)
    assert ("error", "row-identical", (4,)) in problems(found)
    with pytest.raises(InvalidInput):
        found.require()
    skipped = encoded(R1, same, pair(5, {"content": "No."}, {"content": "Yes."}), skip=True).require()
    assert (len(skipped.sides[0]), skipped.refused) == (1, 1)


def test_a_response_of_which_nothing_is_rendered_is_an_error() -> None:
    found = encoded(R1, pair(2, {"content": "<think>cold</think>"}, {"content": "No."}))
    assert ("error", "template-leaves-out", (2,)) in problems(found)


@pytest.mark.parametrize("key", ["reasoning_content", "thinking"])
def test_reasoning_in_a_key_that_the_template_does_not_read(key: str) -> None:
    found = encoded(NO_REASONING, pair(2, {"content": " No.", key: "It is cold."}, {"content": "Yes."}))
    assert problems(found) == [("warning", "template-leaves-out", (2,))] and f'"{key}"' in found.problems[0].message


def test_a_system_message_that_is_left_out_is_named() -> None:
    source = CHATML.replace("{% for message in messages %}", "{% for message in messages if message.role != 'system' %}")
    found = encoded(source, pair(2, {"content": "No."}, {"content": "Yes."}, {"role": "system", "content": "Be brief."}))
    assert problems(found) == [("warning", "template-leaves-out", (2,))] and "system message" in found.problems[0].message


def test_an_error_inside_a_template_names_the_part_that_it_comes_from() -> None:
    found = encoded(JOINS, pair(2, {"content": "No."}, {"content": "Yes.", "thoughts": 7}))
    ((severity, code, lines),) = problems(found)
    assert (severity, code, lines) == ("error", "template-fails", (2,))
    assert '"thoughts" of message 2 (assistant)' in found.problems[0].message and "TypeError" in found.problems[0].message
    assert "roles" not in (found.problems[0].fix or "")


def test_a_response_without_eos_is_a_problem_with_its_rows() -> None:
    source = CHATML.replace("<|im_end|>", "<|end|>")
    assert problems(encoded(source, *(pair(i, {"content": "No."}, {"content": "Yes."}) for i in (2, 4)))) == [
        ("warning", "no-eos", (2, 4))
    ]
    assert not encoded(CHATML, pair(2, {"content": "No."}, {"content": "Yes."})).problems


def test_a_token_beyond_the_embedding_is_an_error_of_its_row() -> None:
    found = encoded(CHATML, pair(2, {"content": "No."}, {"content": "Yes."}), token_rows=2)
    assert problems(found) == [("error", "tokens-outside", (2,))] and "model 2 rows" in found.problems[0].message


def test_a_rendered_text_gets_no_second_bos_or_eos(tiny_model_dir: Path) -> None:
    """Of a tokenizer that adds BOS by itself, with and without it in the text."""
    fast = tiny_tokenizer()
    backend = fast.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing("<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    made = replace(Tokenizer.loaded(fast), template=None)
    rows = [
        Pair(f"{start}the cat", f" sat{end}", " no", 1)
        for start in ("", "<|im_start|>")
        for end in ("", "<|im_end|>", "<|im_end|>\n")
    ]
    for row in encode_all([rows], made).sides[0]:
        assert row.prompt_ids.count(1) == 1 and row.prompt_ids[0] == 1
        assert row.chosen_ids.count(fast.eos_token_id) == 1


def test_a_response_of_which_only_the_call_is_rendered_is_no_empty_one() -> None:
    source = (TEMPLATES[0].parent / "llama3_1.jinja").read_text(encoding="utf-8")
    called = {"content": "Let me look.", "tool_calls": CALL["tool_calls"]}
    found = problems(encoded(source, pair(2, called, {"content": "No."})))
    assert ("warning", "template-leaves-out", (2,)) in found and "error" not in [severity for severity, *_ in found]


def test_earlier_reasoning_is_left_out_as_the_template_means_it() -> None:
    before = [USER, {"role": "assistant", "content": "<think>cold</think>No."}]
    found = encoded(
        (TEMPLATES[0].parent / "qwen3.jinja").read_text(encoding="utf-8"), pair(2, {"content": "A"}, {"content": "B"}, *before)
    )
    assert ("hint", "earlier-reasoning", (2,)) in problems(found)
    assert not [one for one in problems(found) if one[1] == "template-leaves-out"]


def test_metadata_that_no_template_reads_is_no_part_of_a_message() -> None:
    found = encoded(
        CHATML, pair(2, {"content": "No.", "timestamp": "2023-04-09 00:02:53", "name": "Bob Smith"}, {"content": "Yes."})
    )
    assert not found.problems


def test_a_name_that_a_template_lacks_is_an_error_inside_it() -> None:
    source = "{% for m in messages %}{{ m.content.text }}{{ missing.name }}{% endfor %}"
    assert ("error", "template-fails", (2,)) in problems(encoded(source, pair(2, {"content": "No."}, {"content": "Yes."})))


def test_many_lines_that_a_template_changes_cost_a_rendering() -> None:
    rendered = []

    class Counted(ChatTemplate):
        def render(self, *arguments: Any, **options: Any) -> str:
            rendered.append(1)
            return super().render(*arguments, **options)

    source = CHATML.replace("message['content']", "(message['content'] | upper)")
    text = "\n".join(f"line number {i} of many" for i in range(2000))
    loaded = replace(Tokenizer.loaded(tiny_tokenizer()), template=Counted(source, TOKENS))
    found = encode_all([[pair(2, {"content": text}, {"content": "Yes."})]], loaded)
    assert len(rendered) <= 8 and found.sides[0]


def test_half_a_character_in_a_tool_is_an_error_of_its_row() -> None:
    tool = {"type": "function", "function": {"name": "weather", "description": "\ud800"}}
    row = replace(pair(2, {"content": "No."}, {"content": "Yes."}), tools=(tool,))
    found = encoded("{{ tools | tojson }}" + CHATML, row)
    assert ("error", "row-surrogate", (2,)) in problems(found)


def test_the_limits_of_a_tokenizer_file_are_those_of_its_last_user(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    limited = json.loads(file.read_text(encoding="utf-8"))
    limited["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    file.write_text(json.dumps(limited), encoding="utf-8")
    made = tokenizer_of(ModelFiles(tmp_path))
    assert made is not None and len(made.encode("the cat sat on the mat " * 9, False)) > 9


def test_tokens_that_only_files_beside_the_tokenizer_name_are_known(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": config.pop("eos_token")}), encoding="utf-8")
    config["added_tokens_decoder"] = {**config.get("added_tokens_decoder", {}), "300": {"content": "<ex>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    made = tokenizer_of(ModelFiles(tmp_path))
    assert made is not None and made.eos == "<|im_end|>" and len(made.encode("<ex>", False)) == 1

"""Every shape and format of pairs, and every bad row of a file found by its line."""

from __future__ import annotations

import csv
import io
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bad_rows import BAD_ROWS
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_cli.config.schema import inner_defaults
from dpo_cli.data import transcripts
from dpo_cli.data.dataset import Bad, Dataset, read, sources_of, stream
from dpo_cli.data.files import READERS
from dpo_cli.data.lint import Quality
from dpo_cli.data.messages import BadRow
from dpo_cli.data.rows import Pair, to_demonstration, to_pair
from dpo_cli.data.text_features import compiled
from dpo_cli.data.transcripts import from_last_turn, turns_of
from dpo_cli.errors import Problem

USER = [{"role": "user", "content": "q"}]
YES, NO = [{"role": "assistant", "content": "yes"}], [{"role": "assistant", "content": "no"}]
SYSTEM = [{"role": "system", "content": "s"}]
SHARED = ROOT.parent / "shared" / "data"


@pytest.mark.parametrize(
    ("row", "prompt", "chosen"),
    [
        ({"prompt": "q", "chosen": "yes", "rejected": "no"}, "q", "yes"),
        ({"prompt": USER, "chosen": YES, "rejected": NO}, USER, YES),
        ({"prompt": USER, "chosen": "yes", "rejected": "no"}, USER, YES),
        ({"prompt": "q", "chosen": YES, "rejected": NO}, USER, YES),
        ({"prompt": "q", "chosen": USER + YES, "rejected": USER + NO}, USER, YES),
        ({"chosen": SYSTEM + USER + YES, "rejected": SYSTEM + USER + NO}, SYSTEM + USER, YES),
        ({"chosen": "q? yes", "rejected": "q? no"}, "q?", " yes"),
        ({"system": "s", "question": "q", "chosen": "yes", "rejected": "no"}, SYSTEM + USER, YES),
        ({"system": "", "question": "q", "chosen": "yes", "rejected": "no"}, "q", "yes"),
        ({"instruction": "q", "input": "", "chosen": "yes", "rejected": "no"}, "q", "yes"),
        ({"instruction": "q", "input": "i", "chosen": "yes", "rejected": "no"}, "q\ni", "yes"),
        (
            {
                "conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}],
                "chosen": {"from": "gpt", "value": "yes"},
                "rejected": {"from": "gpt", "value": "no"},
            },
            SYSTEM + USER,
            YES,
        ),
        ({"messages": USER, "chosen": YES, "rejected": NO}, USER, YES),
        (
            {"prompt": "q", "messages": USER + YES, "chosen": USER + YES, "rejected": USER + NO},
            USER,
            YES,
        ),  # UltraFeedback, binarized
        ({"system": "s", "prompt": "q", "chosen": "yes", "rejected": "no"}, SYSTEM + USER, YES),
        (
            {"system": "s", "conversations": [{"from": "human", "value": "q"}], "chosen": YES, "rejected": NO},
            SYSTEM + USER,
            YES,
        ),
        ({"system": "s", "conversations": SYSTEM + USER, "chosen": YES, "rejected": NO}, SYSTEM + USER, YES),
        ({"prompt": [{"role": "system", "content": ""}, *USER], "chosen": YES, "rejected": NO}, USER, YES),
        ({"input": "q", "chosen": "The yes", "rejected": "The no"}, "q", "The yes"),
        ({"conversations": USER, "chosen": "yes", "rejected": "no"}, USER, YES),
    ],
)
def test_shapes(row: dict[str, Any], prompt: object, chosen: object) -> None:
    pair = to_pair(row, 7)
    assert [_bare(pair.prompt), _bare(pair.chosen), pair.line] == [prompt, chosen, 7]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": [{"role": "User", "content": "q"}, *YES], "rejected": [{"from": "Human", "value": "q"}, *NO]},
        {"messages": USER + YES, "rejected_messages": [{"role": "model", "content": "no"}]},
        {
            "messages": USER + YES,
            "rejected_messages": [{"role": "HUMAN", "content": "q"}, {"role": "Assistant", "content": "no"}],
        },
    ],
)
def test_roles_are_known_by_every_name_in_every_shape(row: dict[str, Any]) -> None:
    pair = to_pair(row, 1)
    assert [_bare(text) for text in (pair.prompt, pair.chosen, pair.rejected)] == [USER, YES, NO]


@pytest.mark.parametrize(
    "text",
    [
        '[{"role": "user", "content": "q"}]',
        '[{"name": null, "role": "user", "content": "q"}]',
        "array([{'role': 'user', 'content': 'q'}], dtype=object)",
        json.dumps(json.dumps(USER)),
        json.dumps({"messages": USER}),
        "[{'content': 'q', 'role': 'user', 'score': nan, 'at': datetime.datetime(2024, 1, 2, 3, 4)}]",
        '[["user", "q"]]',
        "[('human', 'q')]",
    ],
)
def test_messages_that_are_stored_as_text_are_read(text: str) -> None:
    pair = to_pair({"prompt": text, "chosen": "yes", "rejected": "no"}, 1)
    assert _bare(pair.prompt) == USER


@pytest.mark.parametrize(
    "text",
    [
        '["Ann", "Bob"]',
        '{"model": "m", "messages": [{"role": "user", "content": "q"}]}',
        '{"role": "engineer", "content": "a"}',
        '[{"from": "Oslo", "to": "Rome"}]',
        r"[\frac{1}{2}, 'user']",
        '[{"role": "user", "content": "q"}] is how it is written',
        '"role" is a key, as is "from"',
    ],
)
def test_other_json_and_code_stay_text(text: str) -> None:
    assert to_pair({"prompt": "q", "chosen": text, "rejected": "no"}, 1).chosen == text


@pytest.mark.parametrize(
    "text",
    [
        '[{"role": "user", "content": "a cell that is c',
        "[{'role': 'user', 'content': 'q'} ... {'role': 'assistant', 'content': 'a'}]",
        '[{"content": "q", "role": }]',
        '[{"role": "user", "content": "q"}, {"role": "narrator", "content": "x"}]',
    ],
)
def test_what_begins_like_messages_is_never_learned_as_text(text: str) -> None:
    with pytest.raises(BadRow):
        to_pair({"prompt": "q", "chosen": text, "rejected": "no"}, 1)


def test_tools_are_read_in_the_notation_of_python_too() -> None:
    row = {"prompt": "q", "chosen": "yes", "rejected": "no", "tools": "[{'name': 'f', 'strict': True, 'parameters': None}]"}
    assert to_pair(row, 1).tools == ({"name": "f", "strict": True},)


@pytest.mark.parametrize(
    ("value", "content"),
    [
        ("<tool_response>\n5\n</tool_response>", "5"),
        ("<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>", None),
        ("see <tool_response>5</tool_response>", None),
    ],
)
def test_a_tool_result_loses_the_wrapper_that_the_template_writes(value: str, content: str | None) -> None:
    asking = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "one moment"}, {"from": "tool", "value": value}]
    prompt = to_pair({"conversations": asking, "chosen": YES, "rejected": NO}, 1).prompt
    assert prompt[-1] == {"role": "tool", "content": content or value}


CALLS = ({"city": None, "unit": "C"}, '{"city": null, "unit": "C"}', {"unit": "C"}, '{"unit":"C"}')


@pytest.mark.parametrize("arguments", CALLS)
def test_a_null_argument_is_absent_in_every_form(arguments: Any, tmp_path: Path) -> None:
    call = {"name": "weather", "arguments": arguments}
    chosen = [{"role": "assistant", "tool_calls": [{"function": call}]}]
    spoken = [{"from": "function_call", "value": json.dumps(call)}]
    rows = [{"prompt": USER, "chosen": form, "rejected": NO} for form in (chosen, json.dumps(chosen), spoken)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = read(str(tmp_path / "rows.jsonl"))
    for _, pair in data.kept or ():
        kept = pair.responses[0][0]["tool_calls"][0]["function"]["arguments"]  # type: ignore[index]
        assert kept in ({"unit": "C"}, '{"unit":"C"}')
    named = [problem.lines for problem in data.problems if problem.code == "null-arguments"]
    assert named == ([(1, 2, 3)] if arguments in CALLS[:2] else [])


RIVER = "\n\nHuman: Name a river.\n\nAssistant:"


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "cut"),
    [
        (f"{RIVER} One is", " the Rhine.", " Rome.", (RIVER, " One is the Rhine.", " One is Rome.")),
        (RIVER, f"{RIVER} The Rhine.", f"{RIVER} Rome.", (RIVER, " The Rhine.", " Rome.")),
        (f"{RIVER} One is", f"{RIVER} One is Como.", f"{RIVER} One is Rome.", (RIVER, " One is Como.", " One is Rome.")),
        (RIVER, " The Rhine.", " Rome.", (RIVER, " The Rhine.", " Rome.")),
        (
            f"{RIVER} Po.\n\nHuman: More!",
            "\n\nAssistant: Elbe.",
            "\n\nAssistant: No.",
            (f"{RIVER} Po.\n\nHuman: More!\n\nAssistant:", " Elbe.", " No."),
        ),
        ("Name a river.", "The Rhine.", "Rome.", ("Name a river.", "The Rhine.", "Rome.")),
    ],
)
def test_a_transcript_ends_where_the_answers_begin(prompt: str, chosen: str, rejected: str, cut: tuple[str, str, str]) -> None:
    start, answers = from_last_turn(prompt, {"chosen": chosen, "rejected": rejected})
    assert (start, *answers) == cut


def test_rows_with_a_transcript_are_cut_at_its_last_turn() -> None:
    row = {"prompt": f"{RIVER} One is", "chosen": " the Rhine.", "rejected": " Rome."}
    asked = [{"role": "user", "content": "Name a river."}]
    turns = to_pair(row, 1).as_turns()
    answers = ["One is the Rhine.", "One is Rome."]
    assert (turns.prompt, [answer[0]["content"] for answer in turns.responses]) == (asked, answers)  # type: ignore[index]
    assert to_pair({**row, "system": "s"}, 1).prompt == SYSTEM + asked
    shown = to_demonstration({"prompt": f"{RIVER} One is", "completion": " the Rhine."}, 1)
    assert (shown.prompt, shown.completion) == (RIVER, " One is the Rhine.")


Q, THEN = ["user", "River?"], [["assistant", "Elbe."], ["user", "More!"]]


@pytest.mark.parametrize(
    ("row", "turns", "answers"),
    [
        (["User: River?\nAssistant: The Rhine.", "User: River?\nAssistant: The Po."], [Q], ["The Rhine.", "The Po."]),
        (["### Human: River?\n### Assistant: The Po", "### Human: River?\n### Assistant: The"], [Q], ["The Po", "The"]),
        (["USER: River? ASSISTANT: The Rhine.", "USER: River? ASSISTANT: The Po."], [Q], ["The Rhine.", "The Po."]),
        (
            [f"User: River?\n\nAI: Elbe.\n\nUser: More!\n\nAI: The {name}." for name in ("Rhine", "Po")],
            [Q, *THEN],
            ["The Rhine.", "The Po."],
        ),
        ([f"\n\nSystem: s\n\nHuman: River?\n\nAssistant: {x}" for x in ("ab", "ac")], [["system", "s"], Q], ["ab", "ac"]),
        (["River?", "\n\nHuman: River?\n\nAssistant: The Po.", "\n\nHuman: River?\n\nAssistant: No."], [Q], ["The Po.", "No."]),
        (["User: River?\nAssistant:", " The Rhine.", " The Po."], [Q], ["The Rhine.", "The Po."]),
        (["User: River?", "\nAssistant: The Rhine.", "\nAssistant: The Po."], [Q], ["The Rhine.", "The Po."]),
    ],
)
def test_a_transcript_of_any_labels_is_its_turns(row: list[str], turns: list[list[str]], answers: list[str]) -> None:
    names = ("prompt", "chosen", "rejected")[-len(row) :]
    pair = to_pair(dict(zip(names, row, strict=True)), 1).as_turns()
    assert [[turn["role"], turn["content"]] for turn in pair.prompt] == turns  # type: ignore[index]
    assert [answer[0]["content"] for answer in pair.responses] == answers  # type: ignore[index]


ALPACA = "Below is a task.\n\n### Instruction:\nRiver?\n\n### Response:\n"


@pytest.mark.parametrize("start", [ALPACA, "Q: Lake?\nA: Como.\n\nQ: River?\nA:", "Question: River?\nAnswer:"])
def test_a_labelled_answer_is_whole(start: str) -> None:
    space = "" if start.endswith("\n") else " "
    pair = to_pair({"chosen": f"{start}{space}The Rhine.", "rejected": f"{start}{space}The Po."}, 1)
    assert (pair.prompt, pair.chosen, pair.rejected) == (start, f"{space}The Rhine.", f"{space}The Po.")
    assert pair.as_turns() == pair


@pytest.mark.parametrize(
    "prompt",
    [
        "User: a\nAssistant: b\n\nRewrite the answer.",
        "Write a dialogue.",
        "Human: an essay on being human",
        "User: a\nAssistant: b\nUser: c\n\nSum this up.",
    ],
)
def test_a_text_about_a_conversation_is_no_transcript(prompt: str) -> None:
    pair = to_pair({"prompt": prompt, "chosen": "User: hi\nAssistant: hello", "rejected": "no"}, 1)
    assert pair.as_turns() == pair and (pair.prompt, pair.chosen) == (prompt, "User: hi\nAssistant: hello")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Lake?", "chosen": f"{RIVER} Po.", "rejected": f"{RIVER} Rome."},
        {"prompt": "Name a river.", "chosen": f"{RIVER} Po.", "rejected": "Rome."},
        {
            "chosen": "User: a?\nAssistant: b\nUser: c?\nAssistant: d",
            "rejected": "User: a?\nAssistant: e\nUser: c?\nAssistant: f",
        },
        {"chosen": "User: a?\nAssistant: b", "rejected": "User: an?\nAssistant: b"},
    ],
)
def test_no_question_is_learned_from_a_transcript(row: dict[str, str]) -> None:
    with pytest.raises(BadRow) as caught:
        to_pair(row, 1)
    assert caught.value.code == "row-role"


@pytest.mark.parametrize("chosen", [" Po.\n\nHuman: more\n\nAssistant: Elbe.", "Human: Po.", "\n\nAssistant: Po."])
def test_a_response_is_one_turn_of_a_transcript(chosen: str) -> None:
    with pytest.raises(BadRow, match="chosen holds another turn"):
        from_last_turn(RIVER, {"chosen": chosen, "rejected": " Rome."})


LINES = "User: River?\nAssistant:"


@pytest.mark.parametrize("start", [RIVER, LINES, "\n\nSystem: s\n\nHuman: River?\n\nAssistant:", "USER: River? ASSISTANT:"])
@pytest.mark.parametrize(
    "answer", [" The log says:\nSystem: booting", " System: booting", " It is:\n\nSystem: up\n\nSYSTEM: down", "\nSystem: up"]
)
def test_an_answer_may_hold_a_line_that_begins_with_system(start: str, answer: str) -> None:
    """Also where the responses repeat the prompt."""
    answer = answer if start != LINES or not answer.startswith("\n") else f" {answer.strip()}"
    plain = {"prompt": start, "chosen": answer, "rejected": " No."}
    assert to_pair(plain, 1).chosen == answer
    implicit = to_pair({name: start + plain[name] for name in ("chosen", "rejected")}, 1)
    assert (implicit.prompt, implicit.chosen) == (start, answer)


def test_a_begun_answer_may_hold_such_a_line() -> None:
    pair = to_pair({"prompt": f"{RIVER} It says:\nSystem:", "chosen": " up", "rejected": " down"}, 1)
    assert (pair.prompt, pair.chosen) == (RIVER, " It says:\nSystem: up")


@pytest.mark.parametrize(
    ("text", "turns"),
    [
        ("\n\nHuman: q\n\nAssistant: I am.\n\n{other}: ...\n\nHuman: and?", ["q", "I am.\n\n{other}: ...", "and?"]),
        (
            "\n\nHuman: q\n\nAssistant: I am.\n\n{other}: ...\n\nHuman: and?\n\nAssistant:",
            ["q", "I am.\n\n{other}: ...", "and?"],
        ),
        ("\n\nHuman: log:\n\n{other}: hi\n\nwhy?\n\nAssistant:", ["log:\n\n{other}: hi\n\nwhy?"]),
        ("\n\nHuman: log:\n\n{other}: hi\n\nAssistant: so\n\nHuman: and?", ["log:\n\n{other}: hi", "so", "and?"]),
        ("\n\nHuman: q\n\nAssistant: a\n\nHuman: go on:\n\n{other}:", ["q", "a", "go on:\n\n{other}:"]),
        ("Human: q\n\n{other}: a\n\nAssistant: b\n\nHuman: and?\n\n{other}:", ["q", "a\n\nAssistant: b", "and?"]),
        ("User: q\n\nAssistant: I am.\n\n{other}: ...\n\nUser: and?\n\nAssistant:", ["q", "I am.\n\n{other}: ...", "and?"]),
        ("User: q\nAssistant: I am.\n\n{other}: ...\nUser: and?\nAssistant:", ["q", "I am.\n\n{other}: ...", "and?"]),
        ("User: q\n\n{other}: a\n\nUser: and?\n\n{other}:", ["q", "a", "and?"]),
        ("User: q\n\nAssistant: a\n\nUser: go on:\n\n{other}:", []),
    ],
)
@pytest.mark.parametrize("other", ["AI", "Bot", "GPT", "ChatGPT"])
def test_a_paragraph_may_begin_with_another_word_for_an_assistant(text: str, turns: list[str], other: str) -> None:
    said = turns_of(text.format(other=other))
    assert [turn["content"] for turn in said] == [turn.format(other=other) for turn in turns]
    assert [turn["role"] for turn in said] == [("user", "assistant")[i % 2] for i in range(len(turns))]


def test_the_shared_start_of_two_answers_may_hold_such_a_paragraph() -> None:
    answer = " I am.\n\nGPT: the kind is "
    pair = to_pair({"chosen": f"{RIVER}{answer}new", "rejected": f"{RIVER}{answer}old"}, 1)
    assert (pair.prompt, pair.chosen, pair.rejected) == (RIVER, f"{answer}new", f"{answer}old")


PIECES = (
    *"\n \t:x",
    "\n\n",
    "\r\n",
    "### ",
    "## ",
    "Human:",
    "USER:",
    "ASSISTANT:",
    "AI:",
    "ChatGPT:",
    "System:",
    "Q:",
    "Response:",
)


def test_the_labels_are_those_of_the_pattern() -> None:
    """The search for words gives what the pattern itself matches, in whole texts and up to any place."""
    draw = random.Random(0)
    for _ in range(3000):
        text = "".join(draw.choices(PIECES, k=draw.randint(1, 12)))
        end = draw.randint(0, len(text))
        expected = [label.span() for label in compiled(transcripts.LABEL).finditer(text)]
        assert [label.span() for label in transcripts._labels(text)] == expected
        expected = [label.start() for label in compiled(transcripts.LABEL).finditer(text, 0, end)]
        assert [label.start() for label in transcripts._up_to(end, transcripts._labels(text))] == expected


def test_a_row_of_a_long_transcript_is_searched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each text of a row once: the prompt, both responses, and where they repeat the prompt what is left of them."""
    searched: list[str] = []

    class Counted:
        def finditer(self, text: str, start: int) -> Iterator[re.Match[str]]:
            searched.append(text)
            return words.finditer(text, start)

    words = compiled(transcripts._WORD)
    monkeypatch.setattr(
        transcripts, "compiled", lambda pattern: Counted() if pattern == transcripts._WORD else compiled(pattern)
    )
    start = "".join(f"\n\nHuman: {i}?\n\nAssistant: {i} {'word ' * 200}" for i in range(9)) + "\n\nHuman: once?\n\nAssistant:"
    for row in (
        {"prompt": start, "chosen": " Po.", "rejected": " No."},
        {"chosen": f"{start} Elbe.", "rejected": f"{start} None."},
    ):
        searched.clear()
        to_pair(row, 1).as_turns()
        long = [text for text in searched if len(text) > len(start) / 2]
        assert 1 <= len(long) == len(set(long)) <= 3


def _bare(text: Any) -> Any:
    """Messages without what is neither role nor content."""
    return text if isinstance(text, str) else [{key: message[key] for key in ("role", "content")} for message in text]


def test_columns_name_what_is_called_otherwise() -> None:
    row = {"ask": "q", "better": "yes", "worse": "no"}
    columns = {"prompt": "ask", "chosen": "better", "rejected": "worse"}
    assert to_pair(row, 1, columns=columns) == to_pair({"prompt": "q", "chosen": "yes", "rejected": "no"}, 1)
    with pytest.raises(BadRow, match=r"ask \(columns.prompt\) is missing"):
        to_pair({"better": "yes", "worse": "no"}, 1, columns=columns)
    with_system = to_pair({**row, "context": "s"}, 1, columns={**columns, "system": "context", "tools": "functions"})
    assert with_system.prompt == SYSTEM + USER and with_system.tools == ()
    shown = to_demonstration({"ask": "q", "better": "yes"}, 1, columns={"prompt": "ask", "completion": "better"})
    assert (shown.prompt, shown.completion) == ("q", "yes")
    assert to_demonstration({"turns": USER + YES}, 1, columns={"messages": "turns"}).completion == YES


def test_an_empty_prompt_is_no_prompt_of_a_demonstration() -> None:
    assert to_demonstration({"prompt": "", "completion": "b"}, 1) == to_demonstration(
        {"messages": [{"role": "assistant", "content": "b"}]}, 1
    )


@pytest.mark.parametrize(
    "row",
    [
        {"question_text": "q", "chosen": "It is 4", "rejected": "It is 5"},
        {"id": "x7", "chosen": "It is 4", "rejected": "It is 5"},
    ],
)
def test_no_prompt_is_made_up_where_another_column_may_be_it(row: dict[str, Any]) -> None:
    with pytest.raises(BadRow, match="prompt is missing"):
        to_pair(row, 1)


def test_one_prompt_in_two_forms_is_one_prompt() -> None:
    forms = [
        {"prompt": "q", "chosen": "yes", "rejected": "no"},
        {"prompt": USER, "chosen": YES, "rejected": NO},
        {"prompt": [{**USER[0], "id": 7}], "chosen": YES, "rejected": NO},
    ]
    assert len({to_pair(row, 1).prompt_key for row in forms}) == 1


def test_tools_are_kept_and_checked() -> None:
    tools = [{"name": "search"}]
    base = {"prompt": "q", "chosen": "yes", "rejected": "no"}
    assert to_pair({**base, "tools": tools}, 1).tools == to_pair({**base, "tools": json.dumps(tools)}, 1).tools == tuple(tools)
    call = [{"role": "assistant", "content": None, "tool_calls": [{"name": "search"}]}]
    assert to_pair({"prompt": USER, "chosen": call, "rejected": NO}, 1).chosen[0]["tool_calls"]  # type: ignore[index]
    assert to_pair({**base, "tools": tools}, 1).prompt_key != to_pair(base, 1).prompt_key


ROWS = [{"prompt": f"q{i}, with a comma", "chosen": f"yes\n{i} é", "rejected": f'no "{i}"'} for i in range(5)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        out = io.StringIO()
        table = csv.DictWriter(out, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        table.writeheader()
        table.writerows(rows)
        path.write_text(out.getvalue(), encoding="utf-8", newline="")
    return path


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_a_table_is_divided_by_what_divides_its_header(tmp_path: Path, delimiter: str) -> None:
    path = tmp_path / "p.csv"
    path.write_text(
        delimiter.join(("prompt", "chosen", "rejected")) + "\n" + delimiter.join(("a", "b", "c")) + "\n", encoding="utf-8"
    )
    assert [pair.chosen for pair in read(str(path)).load()] == ["b"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("prompt,chosen,rejected,chosen\na,b,c,d\n", 1),
        ('prompt,chosen,rejected\n"a,b,c\n', 2),
        ('"prompt', 1),
    ],
)
def test_odd_tables_are_bad_rows(tmp_path: Path, text: str, line: int) -> None:
    path = tmp_path / "p.csv"
    path.write_text(text, encoding="utf-8")
    assert [row.line for row in stream(sources_of(str(path))) if isinstance(row, Bad)] == [line]


def test_what_can_be_read_is_read_beside_what_cannot(tmp_path: Path) -> None:
    good = write(tmp_path / "good.jsonl", [*ROWS, {"prompt": "x"}])
    data = read([str(good), "gone.jsonl"])
    assert sorted(problem.code for problem in data.problems) == ["dataset-missing", "row-missing-key"]
    assert data.pairs == 5


def test_roles_that_no_template_knows_are_bad(tmp_path: Path) -> None:
    with pytest.raises(BadRow, match="unknown role"):
        to_pair({"prompt": [{"role": "userr", "content": "q"}], "chosen": YES, "rejected": NO}, 1)


def test_long_texts_are_compared_in_part(tmp_path: Path) -> None:
    long = "the cat sat on the mat " * 40_000
    assert "too-similar" in findings([{"prompt": "Write a story", "chosen": long, "rejected": long + " again"}], tmp_path)


@pytest.mark.parametrize("suffix", READERS)
def test_every_format_gives_the_same_pairs(tmp_path: Path, suffix: str) -> None:
    data = read(str(write(tmp_path / f"pairs{suffix}", ROWS)))
    assert data.problems == () and (data.rows, data.pairs, data.prompts) == (5, 5, 5)
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in data.load()] == [tuple(row.values()) for row in ROWS]


def test_lines_are_physical_ones(tmp_path: Path) -> None:
    """In CSV a cell with a line break takes two lines; in an indented JSON list a row takes five."""
    lines = {
        suffix: [pair.line for pair in read(str(write(tmp_path / f"p{suffix}", ROWS))).load()] for suffix in (".csv", ".json")
    }
    assert lines == {".csv": [2, 4, 6, 8, 10], ".json": [2, 7, 12, 17, 22]}


def test_messages_in_parquet_and_csv(tmp_path: Path) -> None:
    rows = [{"prompt": USER, "chosen": YES, "rejected": NO}]
    assert _bare(read(str(write(tmp_path / "p.parquet", rows))).load()[0].chosen) == YES
    cells = [{key: json.dumps(value) for key, value in row.items()} for row in rows]
    assert _bare(read(str(write(tmp_path / "p.csv", cells))).load()[0].prompt) == USER


def test_folders_lists_and_weights(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "b.jsonl", ROWS[:2])
    write(folder / "a.csv", ROWS[2:])
    (folder / "notes.txt").write_text("not data", encoding="utf-8")
    assert [Path(source.path).name for source in sources_of(str(folder))] == ["a.csv", "b.jsonl"]
    assert [pair.prompt for pair in read(str(folder)).load()] == [row["prompt"] for row in [*ROWS[2:], *ROWS[:2]]]
    one = str(write(tmp_path / "one.jsonl", ROWS))
    small = [{"path": str(write(tmp_path / f"s{i}.jsonl", ROWS[:1])), "weight": 0.5} for i in range(4)]
    assert len(read(small).load()) == 2  # weighed as a whole
    assert len(read([{"path": one, "weight": 0.2}]).load()) == 1
    weighted = read([{"path": one, "weight": 2}, {"path": str(folder), "weight": 0.5}])
    assert Counter(pair.file for pair in weighted.load()) == {one: 10, str(folder / "a.csv"): 1, str(folder / "b.jsonl"): 1}
    assert weighted.name == "3 files"


KINDS = {**BAD_ROWS, "row-too-deep": b"[" * 100_000}
PLACES = st.lists(st.sampled_from([None, *KINDS]), min_size=1, max_size=60)


@settings(max_examples=80, deadline=None)
@given(places=PLACES, blank=st.booleans())
def test_every_bad_line_among_good_ones_is_found_by_its_number(
    tmp_path_factory: pytest.TempPathFactory, places: list[str | None], blank: bool
) -> None:
    """K bad lines of every kind among N good ones: exactly those physical line numbers, each once."""
    path = tmp_path_factory.mktemp("bad") / "pairs.jsonl"
    good = b'{"prompt": "q", "chosen": "yes", "rejected": "no"}'
    between = b"\n\n" if blank else b"\n"
    path.write_bytes(between.join(KINDS[kind] if kind else good for kind in places))
    step = 2 if blank else 1
    data = read(str(path))
    found = sorted(
        line for problem in data.problems if problem.code.startswith("row-") for line in problem.lines or [problem.line]
    )
    assert found == [1 + step * index for index, kind in enumerate(places) if kind]
    assert (data.rows, data.pairs) == (len(places), places.count(None))


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ('[{"prompt": "q",\n "chosen": "a", "rejected": "b"}, 3]', [2]),
        ('[\n{"prompt": "q", "prompt": "q", "chosen": "a", "rejected": "b"},\n\n{}]', [2, 4]),
        ('[\n{"prompt": "q", "chosen": "a", "rejected": "b"}\n{"prompt": "r"}]', [3]),
        ("[\n{'prompt': 1}]", [2]),
        ("[\n", [2]),
    ],
)
def test_bad_rows_of_a_json_list(tmp_path: Path, text: str, lines: list[int]) -> None:
    path = tmp_path / "pairs.json"
    path.write_text(text, encoding="utf-8")
    assert [row.line for row in stream(sources_of(str(path))) if isinstance(row, Bad)] == lines


def findings(rows: list[dict[str, Any]], tmp_path: Path) -> dict[str, Problem]:
    return {problem.code: problem for problem in lint(write(tmp_path / "pairs.jsonl", rows))[1]}


def lint(path: Path) -> tuple[Dataset, list[Problem]]:
    quality = Quality(inner_defaults("quality"))
    data = read(str(path), skip=True, observers=[quality])
    return data, quality.problems(data)


def documented(name: str) -> list[dict[str, Any]]:
    lines = (ROOT / "data-samples" / f"documented-{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def others(count: int) -> list[dict[str, Any]]:
    draw = random.Random(3)
    words = ["".join(draw.choices("abcdefghij", k=6)) for _ in range(3000)]
    return [
        {key: " ".join(draw.choices(words, k=draw.randint(8, 20))) for key in ("prompt", "chosen", "rejected")}
        for _ in range(count)
    ]


@pytest.mark.parametrize("count", [0, 600])
def test_the_documented_bad_pairs_are_found_alone_and_among_hundreds(tmp_path: Path, count: int) -> None:
    rows = [*others(count), *documented("bad")]
    found = findings(rows, tmp_path)
    assert found["too-similar"].lines == (count + 1, count + 2)


@pytest.mark.parametrize("name", ["good", "format", "assistant"])
@pytest.mark.parametrize("count", [0, 600])
def test_the_documented_good_pairs_give_no_finding_about_a_row(tmp_path: Path, count: int, name: str) -> None:
    found = findings([*others(count), *documented(name)], tmp_path)
    assert [problem for problem in found.values() if problem.line or problem.lines] == []


GOOD = [
    ("Compute 12 * 7.", "84", "86"),
    ("Name the capital of Australia.", "Canberra is the capital.", "Sydney is the capital."),
    ("What is 2 - 7?", "-5", "5"),
    ("Fix the bug: def area(a, b): return a+b", "return a*b", "return a+b"),
    ("For which x is 2x > 6?", "x > 3", "x < 3"),
    ("Did you like it?", "👍", "👎"),
    ("2+2等于几？", "4", "5"),
    ("Who is older, Bob or Ann?", "Bob.", "Ann."),
    ("Who is faster, a tortoise or a hare?", "A hare is faster", "A tortoise is faster"),
    ("Is it legal?", "Yes, it is legal", "No, it is legal"),
]


def test_answers_that_differ_in_one_word_are_not_too_similar(tmp_path: Path) -> None:
    rows = [dict(zip(("prompt", "chosen", "rejected"), texts, strict=True)) for texts in GOOD]
    found = findings(rows, tmp_path).get("too-similar")
    assert found is None, [GOOD[line - 1] for line in found.lines or [found.line or 0]]


def test_reversed_pairs_take_linear_time_and_copies_hide_nothing(tmp_path: Path) -> None:
    """Each pair in both orders, 10,000 times: a list that is searched for each would take minutes. Copies come first."""
    rows = [
        {"prompt": f"q{i}", "chosen": a, "rejected": b}
        for i in range(10_000)
        for a, b in (("yes it is", "no"), ("no", "yes it is"))
    ]
    found = findings(rows, tmp_path)["reversed-preference"]
    assert found.lines == tuple(range(1, 20_001))
    near = [*others(1) * 3000, *others(20)[10:], *({**row, "chosen": row["chosen"] + " indeed"} for row in others(20)[10:])]
    assert len(findings(near, tmp_path)["near-duplicates"].lines or ()) >= 9


def test_near_duplicates_are_found_and_others_are_not(tmp_path: Path) -> None:
    rows = others(400)
    for i in range(0, 400, 10):
        copy = dict(rows[i])
        words = str(copy["chosen"]).split()
        copy["chosen"] = " ".join([*words[:-1], "changed"])
        rows.append(copy)
    found = findings(rows, tmp_path)["near-duplicates"]
    assert len(set(found.lines or ()) & set(range(401, 441))) >= 38  # 1 - 0.002 are proposed at an overlap of 0.9
    assert set(found.lines or ()) <= set(range(401, 441))


def test_case_and_blanks_make_no_other_pair_and_a_partner_is_named(tmp_path: Path) -> None:
    story = "Once there was a house by the river in which nobody had lived for as long as anyone could remember."
    rows = [
        {"prompt": "Is it  so?", "chosen": "Yes, it is.", "rejected": "no"},
        {"prompt": "is it so?", "chosen": "yes, it is. ", "rejected": "No"},
        {"prompt": "Is it so?", "chosen": "NO", "rejected": "Yes, it is."},
        {"prompt": "tell", "chosen": story, "rejected": "no"},
        {"prompt": "tell", "chosen": story.replace("house", "home"), "rejected": "no"},
    ]
    found = findings(rows, tmp_path)
    assert found["repeated-pairs"].line == 2 and "(line 2 is like line 1)" in found["repeated-pairs"].message
    assert found["reversed-preference"].lines == (1, 3)
    assert found["near-duplicates"].line == 5 and "(line 5 is like line 4)" in found["near-duplicates"].message


def test_the_first_three_of_a_group_tell_their_own_fault(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": }\n{\n{"prompt": "a" "b"}\n{]\n', encoding="utf-8")
    message = next(problem for problem in read(str(path)).problems if problem.code == "row-not-json").message
    assert [f"line {n}, column" in message for n in (1, 2, 3, 4)] == [True, True, True, False]


def test_length_bias_by_hand(tmp_path: Path) -> None:
    """Chosen lengths 3, 1, 2 and rejected 1, 2, 2: won, lost, tied, so 1.5 of 3; of the 9 comparisons 3>1 3>2 3>2 2>1 are won
    and 1=1 2=2 2=2 tied: 5.5 / 9."""
    rows = [{"prompt": f"q{i}", "chosen": "a" * c, "rejected": "b" * r} for i, (c, r) in enumerate([(3, 1), (1, 2), (2, 2)])]
    quality = Quality(inner_defaults("quality"))
    read(str(write(tmp_path / "p.jsonl", rows)), observers=[quality])
    assert quality.length_bias() == {"longer_chosen": 0.5, "length_auc": round(5.5 / 9, 4)}


def test_limits_are_settings(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", others(30))
    codes = []
    for limit in (20, 40):
        quality = Quality({**inner_defaults("quality"), "few_pairs": limit})
        codes.append("few-pairs" in [problem.code for problem in quality.problems(read(str(path), observers=[quality]))])
    assert codes == [False, True]


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not there")
def test_flipped_labels_are_noticed_where_a_prompt_has_both_orders(tmp_path: Path) -> None:
    """The set with 20 % flipped labels next to the set it was made from: every flipped pair then stands in both orders."""
    text = "".join(
        (SHARED / f"ultrafeedback_1k.{name}.jsonl").read_text(encoding="utf-8") for name in ("train", "label_flip_20")
    )
    path = tmp_path / "both.jsonl"
    path.write_text(text, encoding="utf-8")
    _, problems = lint(path)
    (reversed_,) = (problem for problem in problems if problem.code == "reversed-preference")
    flipped = [problem for problem in problems if problem.code == "repeated-pairs"]
    assert 300 <= len(reversed_.lines or ()) <= 500  # about 200 pairs, each named in both files
    assert len(flipped[0].lines or ()) > 700


def test_a_pair_says_where_it_stands(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", ROWS)
    assert all(isinstance(row, Pair) and row.file == str(path) for row in stream(sources_of(str(path))))

"""The config reader: values, positions, and every way a text can be wrong."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_cli.config.jsonc import parse

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(JSON)
def test_reads_what_json_writes(value: object) -> None:
    document = parse(json.dumps(value, indent=1), "f")
    assert document.problems == ()
    assert document.value == value


@given(st.text())
def test_any_text_is_a_value_or_a_problem(text: str) -> None:
    document = parse(text, "f")
    try:
        expected = json.loads(text)
    except (ValueError, RecursionError):
        return
    assert document.problems or document.value == expected


def test_comments_trailing_commas_and_positions() -> None:
    document = parse('{\n  "a": 1, // one\n  /* two */ "b": [true, "x//y",],\n}', "f")
    assert document.value == {"a": 1, "b": [True, "x//y"]}
    assert document.positions[("a",)] == (2, 8)
    assert document.positions[("b", 1)] == (3, 25)


@pytest.mark.parametrize(
    ("text", "code", "line", "column"),
    [
        ("", "json-syntax", 1, 1),
        ("{", "json-syntax", 1, 2),
        ('{"a": 1\n "b": 2}', "json-syntax", 2, 2),
        ('{"a": tru}', "json-syntax", 1, 7),
        ('{"a" 1}', "json-syntax", 1, 6),
        ('{"a": 1} x', "json-syntax", 1, 10),
        ('{"a": 1, "a": 2}', "duplicate-key", 1, 10),
        ('{"a": NaN}', "json-nan", 1, 7),
        ('{"a": -Infinity}', "json-nan", 1, 7),
        ('{"a": 1e999}', "json-number", 1, 7),
        ('{"a": ' + "1" * 5000 + "}", "json-number", 1, 7),
        ('{"a": "\\ud800"}', "json-surrogate", 1, 7),
        ('{"a": "x\n"}', "json-syntax", 1, 7),
        ("[" * 100_000, "json-depth", 1, 66),
    ],
)
def test_what_is_wrong_and_where(text: str, code: str, line: int, column: int) -> None:
    problem = parse(text, "f").problems[0]
    assert (problem.code, problem.line, problem.column) == (code, line, column)
    assert problem.message and problem.fix

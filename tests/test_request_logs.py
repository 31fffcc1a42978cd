"""Logs of requests to rated answers: the forms of OpenAI's API and of what records it, and what is left out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fork_server import dpo

from dpo_cli.data.dataset import read
from dpo_cli.data.messages import BadRow
from dpo_cli.data.ratings import UNRATED
from dpo_cli.data.request_logs import CUT, FAILED, SEVERAL, rated
from dpo_cli.strategies.row_kinds import PAIRS, RATINGS

ASKED = [{"role": "user", "content": "q"}]
SAID = {"role": "assistant", "content": "a"}
CHOICES = [{"message": SAID, "finish_reason": "stop", "index": 0}]
ITEMS = [
    {"type": "reasoning", "summary": []},
    {"type": "message", "id": "m", "role": "assistant", "content": [{"type": "output_text", "text": "a"}]},
]
FORMS: dict[str, dict[str, Any]] = {
    "completion": {"messages": ASKED, "response": {"choices": CHOICES}},
    "proxy": {"request": {"body": {"messages": ASKED}}, "response": {"status_code": 200, "body": {"choices": CHOICES}}},
    "stored": {"object": "chat.completion", "request": {"messages": ASKED}, "choices": CHOICES},
    "responses": {
        "input": [{"type": "message", "role": "user", "content": [{"text": "q"}]}],
        "output": ITEMS,
    },
    "text": {"input": "q", "output": "a"},
    "trace": {"inputs": {"messages": ASKED}, "outputs": {"choices": CHOICES}},
    "legacy": {"request": {"prompt": "q"}, "response": {"choices": [{"text": "a", "finish_reason": "stop"}]}},
    "message": {"prompt": "q", "response": {"role": "assistant", "content": "a"}},
}
FEEDBACK: dict[str, dict[str, Any]] = {
    "word": {"feedback": "up"},
    "object": {"feedback": {"rating": True, "comment": "nice"}},
    "value": {"feedback": {"type": "thumbs", "value": 1}},
    "column": {"thumbs_up": 1},
    "negative column": {"thumbs_down": False},
    "metadata": {"metadata": {"feedback": "1", "user": "u"}},
    "scores": {"scores": [{"name": "latency", "value": 3}, {"name": "user-feedback", "value": 1}]},
}


@pytest.mark.parametrize("feedback", FEEDBACK)
@pytest.mark.parametrize("form", FORMS)
def test_a_request_is_a_rated_answer(form: str, feedback: str) -> None:
    row = rated({**FORMS[form], **FEEDBACK[feedback]}, 3, "log.jsonl", {})
    assert (row["prompt"], row["completion"], row["label"]) == (ASKED, [SAID], True)
    assert row["provenance"]["source"] == "log.jsonl:3"


@pytest.mark.parametrize(
    ("log", "code"),
    [
        ({**FORMS["completion"]}, UNRATED),
        ({**FORMS["completion"], "feedback": ""}, UNRATED),
        ({**FORMS["completion"], "feedback": {"comment": "hm"}}, UNRATED),
        ({**FORMS["completion"], "feedback": 4}, "row-label"),
        ({**FORMS["proxy"], "error": {"message": "too many requests"}, "feedback": 1}, FAILED),
        ({"messages": ASKED, "response": {"status_code": 429}, "feedback": 0}, FAILED),
        ({"messages": ASKED, "choices": [*CHOICES, *CHOICES], "feedback": 1}, SEVERAL),
        ({"messages": ASKED, "choices": [{"message": SAID, "finish_reason": "length"}], "feedback": 1}, CUT),
        ({"messages": ASKED, "feedback": 1}, "row-missing-key"),
        ({"choices": CHOICES, "feedback": 1}, "row-missing-key"),
        ({"messages": ASKED, "choices": [{"message": {"role": "assistant", "content": ""}}], "feedback": 1}, "row-empty"),
    ],
)
def test_a_request_without_a_rated_answer(log: dict[str, Any], code: str) -> None:
    with pytest.raises(BadRow) as failure:
        rated(log, 1, "log.jsonl", {})
    assert failure.value.code == code


def test_a_cut_answer_may_be_bad_and_tools_and_origin_stay() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    log = {"request": {"messages": ASKED, "tools": tools, "model": "m"}, "response": {"id": "r", "created": 7}, "stars": 2}
    log["response"]["choices"] = [{"message": SAID, "finish_reason": "length"}]
    row = rated(log, 9, "log.jsonl", {"label": "stars", "labels": [[4, 5], [1, 2], 3]})
    assert (row["label"], row["tools"]) == (False, tools)
    assert row["provenance"] == {"source": "log.jsonl:9", "id": "r", "model": "m", "time": 7}


def written(place: Path, *logs: dict[str, Any]) -> Path:
    path = place / "log.jsonl"
    path.write_text("".join(json.dumps(log) + "\n" for log in logs), encoding="utf-8")
    return path


def test_the_command_writes_a_dataset(tmp_path: Path) -> None:
    good, bad = ({**FORMS[form], "feedback": label} for form, label in (("completion", "up"), ("text", "down")))
    path, out = written(tmp_path, good, bad, FORMS["proxy"], {"foo": 1}), tmp_path / "ratings.jsonl"
    done = dpo("augment", path, "--from-logs", "--out", out, "--json")
    told = json.loads(done.stdout)
    assert done.returncode == 0 and "row-missing-key" in done.stderr
    assert told == {
        **{"out": str(out), "requests": 4, "good": 1, "bad": 1, "unrated": 1, "failed": 0, "cut": 0, "several": 0},
        "unusable": 1,
    }
    data = read(str(out), kind=RATINGS)
    assert data.pairs == 2 and not [problem for problem in data.problems if problem.severity != "hint"]
    assert read(str(out), kind=PAIRS).pairs == 0  # the same answer, once good and once bad
    assert data.read_as["unread"] == ["provenance"]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["log.jsonl", "--out", "there.jsonl"], 2, "already exists"),
        (["nowhere.jsonl", "--out", "new.jsonl"], 3, "file not found"),
        (["empty.jsonl", "--out", "new.jsonl"], 3, "no requests"),
        (["silent.jsonl", "--out", "new.jsonl"], 3, "the request has no feedback"),
        (["log.jsonl", "beta=1", "--out", "new.jsonl"], 2, "beta=1 has no effect"),
        (["log.jsonl", "--out", "new.json"], 2, "does not end in .jsonl"),
    ],
)
def test_what_cannot_be_written_is_said(
    words: list[str], code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Callable[..., Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path, {**FORMS["completion"], "feedback": 1})
    (tmp_path / "there.jsonl").write_text("", encoding="utf-8")
    (tmp_path / "empty.jsonl").write_text("", encoding="utf-8")
    (tmp_path / "silent.jsonl").write_text(json.dumps(FORMS["completion"]) + "\n", encoding="utf-8")
    done = dpo("augment", *words, "--from-logs", cwd=tmp_path)
    assert done.returncode == code and said in " ".join(done.stderr.split())
    assert not (tmp_path / "new.jsonl").exists()

"""Rows with several responses and a label, votes or scores; exports of annotation tools; and what becomes of each column."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_rows import NO, USER, YES, write

from dpo_cli.data.dataset import Bad, Dataset, read, sources_of, stream
from dpo_cli.data.messages import BadRow, flat
from dpo_cli.data.rows import Pair, to_demonstration, to_pairs
from dpo_cli.strategies.row_kinds import DEMONSTRATIONS, PAIRS

TWO = {"prompt": "q", "output_1": "yes", "output_2": "no"}
BACK = {"prompt": "q", "output_1": "no", "output_2": "yes"}
UNANSWERED = {"prompt": "q", "response_1": "no", "response_2": "yes"}
SIDES = {"prompt": "q", "response_a": "no", "response_b": "yes"}
PAIRWISE = {"value": {"selected": "right"}, "from_name": "pw", "to_name": ["answer1", "answer2"], "type": "pairwise"}

READ = {
    "ms-swift": {"messages": USER + YES, "rejected_response": "no"},
    "ms-swift, a conversation": {"messages": USER + YES, "rejected_messages": USER + NO},
    "ms-swift, query": {"query": "q", "response": "yes", "rejected_response": "no"},
    "openai": {"input": {"messages": USER, "tools": []}, "preferred_output": YES, "non_preferred_output": NO},
    "ultrafeedback": {
        "instruction": "q",
        "completions": [
            {"response": "so", "overall_score": 5},
            {"response": "no", "overall_score": 2},
            {"response": "yes", "overall_score": 9},
        ],
    },
    "ultrafeedback, aspects alone": {
        "instruction": "q",
        "completions": [
            {"response": "no", "annotations": {"honesty": {"Rating": "1"}, "truth": {"Rating": "N/A"}}},
            {"response": "yes", "annotations": {"honesty": {"Rating": "4"}, "truth": {"Rating": "5"}}},
        ],
    },
    "nectar": {"prompt": "q", "answers": [{"answer": "no", "rank": 7.0}, {"answer": "yes", "rank": 1.0}]},
    "lists": {"prompt": "q", "responses": ["so", "no", "yes"], "scores": ["2", "1", "3.5"]},
    "lists with ranks": {"prompt": "q", "generations": ["no", "yes", "so"], "ranks": [3, 1, 2]},
    "a missing rating": {"prompt": "q", "generations": ["so", "no", "yes"], "ratings": [None, 1, 2]},
    "a letter": {"prompt": "q", "response 1": "yes", "response 2": "no", "label": "A"},
    "a side": {"prompt": "q", "left": "no", "right": "yes", "label": "right"},
    "a name": {**TWO, "preference": "output_1"},
    "the text itself": {**TWO, "preferred": "yes"},
    "scores by name": {"prompt": "q", "answer_0": "no", "answer_1": "yes", "score_0": -1, "score_1": 1.0},
    "webgpt": {"question": {"full_text": "q"}, "answer_0": "no", "answer_1": "yes", "score_0": "-1", "score_1": "1"},
    "arena": {"model_a": "b", "model_b": "a", "conversation_a": USER + NO, "conversation_b": USER + YES, "winner": "model_b"},
    "votes": {
        "prompt": "q",
        "response_a": "no",
        "response_b": "yes",
        "winner_model_a": 0,
        "winner_model_b": 1,
        "winner_tie": 0,
    },
    "lmsys": {
        "prompt": ["q"],
        "response_a": ["no"],
        "response_b": ["yes"],
        "winner_model_a": 0,
        "winner_model_b": 1,
        "winner_tie": 0,
    },
    "lmsys, a table": {
        "prompt": '["q"]',
        "response_a": '["no"]',
        "response_b": '["yes"]',
        "winner_model_a": "0",
        "winner_model_b": "1",
    },
    "lists, a table": {"prompt": "q", "responses": '["so", "no", "yes"]', "scores": "[2, 1, 3.5]"},
    "lists, a table of pandas": {"prompt": "q", "generations": "['so', 'no', 'yes']", "ratings": "[nan, 1, 2]"},
    "shp": {"history": "q", "human_ref_A": "yes", "human_ref_B": "no", "labels": 1, "score_A": 8, "score_B": 2},
    "pku": {"prompt": "q", "response_0": "no", "response_1": "yes", "better_response_id": 1, "safer_response_id": 0},
    "helpsteer 2": {"prompt": "q", "response_1": "no", "response_2": "yes", "preference_strength": 3},
    "helpsteer 3": {"context": USER, "response1": "yes", "response2": "no", "overall_preference": -2},
    "stack exchange": {"qid": 1, "question": "q", "response_j": "yes", "response_k": "no"},
    "argilla": {
        "id": "7",
        "fields": UNANSWERED,
        "responses": {"best": [{"value": "response_2", "user_id": "u", "status": "submitted"}]},
    },
    "argilla, a suggestion": {
        "fields": UNANSWERED,
        "suggestions": {"best": {"value": "response_2", "score": 1}},
    },
    "argilla 1, what was discarded": {
        "fields": UNANSWERED,
        "responses": [
            {"status": "submitted", "values": {"best": {"value": "response_2"}}},
            {"status": "discarded", "values": {"best": {"value": "response_1"}}},
        ],
        "suggestions": [],
    },
    "argilla, a ranking": {
        "fields": UNANSWERED,
        "responses": {"order": [{"value": [{"value": "response-1", "rank": 2}, {"value": "response-2", "rank": 1}]}]},
    },
    "argilla, a table": {**UNANSWERED, "best.responses": ["response_2", "response_1", "response_2"], "id": "7"},
    "argilla, a table of suggestions": {**UNANSWERED, "best.suggestion": "response_2", "best.suggestion.score": 0.5},
    "label studio": {
        "data": {"prompt": "q", "answer1": "no", "answer2": "yes"},
        "annotations": [
            {"was_cancelled": True, "result": [{**PAIRWISE, "value": {"selected": "left"}}]},
            {"result": [PAIRWISE]},
        ],
    },
    "label studio, any names": {
        "data": {"prompt": "q", "one": "no", "other": "yes"},
        "annotations": [{"result": [{**PAIRWISE, "to_name": ["one", "other"]}]}],
    },
    "label studio, min": {"prompt": "q", "answer1": "no", "answer2": "yes", "pw": {"selected": "right"}, "annotator": 1},
    "label studio, min, a word": {"prompt": "q", "answer1": "no", "answer2": "yes", "pw": "right", "lead_time": 3.2},
    "several rejected": {"prompt": "q", "chosen": "yes", "rejected": ["no"]},
}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("name", READ)
def test_formats_are_read_as_they_are_meant(tmp_path: Path, name: str, suffix: str) -> None:
    data = read(str(write(tmp_path / f"rows{suffix}", [READ[name]])))
    assert [problem.message for problem in data.problems if problem.severity == "error"] == []
    assert [tuple(map(flat, (pair.prompt, *pair.responses))) for pair in data.load()] == [("q", "yes", "no")]
    shown = to_demonstration(READ[name], 1)
    assert (flat(shown.prompt), flat(shown.completion)) == ("q", "yes")


def answers(rows: list[dict[str, Any]], place: Path, columns: dict[str, Any] | None = None) -> list[str]:
    return [flat(pair.chosen) for pair in dataset(rows, place, columns).load() if isinstance(pair, Pair)]


def dataset(rows: list[dict[str, Any]], place: Path, columns: dict[str, Any] | None = None, sft: bool = False) -> Dataset:
    return read(str(write(place / "rows.jsonl", rows)), columns=columns, kind=DEMONSTRATIONS if sft else PAIRS)


@pytest.mark.parametrize(
    ("first", "second"), [(0, 1), (1, 2), ("0", "1"), ("1", "2"), (1.0, 2.0), ("A", "B"), ("left", "right")]
)
def test_the_file_tells_what_its_labels_count_from(tmp_path: Path, first: Any, second: Any) -> None:
    rows = [{**BACK, "label": second}, {**TWO, "label": first}, {**BACK, "label": second}]
    assert answers(rows, tmp_path) == ["yes"] * 3


def test_labels_that_may_count_from_either_are_an_error_until_they_are_stated(tmp_path: Path) -> None:
    rows = [{**TWO, "label": 1}, {**TWO, "label": 1}]
    (problem,) = [problem for problem in dataset(rows, tmp_path).problems if problem.severity == "error"]
    assert (problem.code, problem.lines) == ("row-label-unclear", (1, 2)) and '"labels": [1, 2]' in problem.message
    assert answers(rows, tmp_path, {"labels": [1, 2]}) == ["yes"] * 2
    assert answers(rows, tmp_path, {"labels": [0, 1]}) == ["no"] * 2


@pytest.mark.parametrize(
    "values", [[0, 1, 2], [-1, 1], [True, False], [1, 2, 3, 4, 5], [1, 2, 2, 4], [2, 1, 7], ["1", "2", "3"]]
)
def test_labels_that_have_two_meanings_are_not_guessed(tmp_path: Path, values: list[Any]) -> None:
    found = dataset([{**TWO, "label": value} for value in values], tmp_path).problems
    assert [problem.code for problem in found if problem.severity == "error"] == ["row-label-unclear"]


def test_a_scale_is_no_number_of_a_response(tmp_path: Path) -> None:
    rows = [{**TWO, "preference": value} for value in (0.8, 0.0, 1.0)]
    found = {problem.code: problem.lines or (problem.line,) for problem in dataset(rows, tmp_path).problems}
    assert (found["row-label-unclear"], found["row-label"]) == ((2, 3), (1,))
    scale = [{**(TWO if value < 3 else BACK), "preference": value} for value in (1, 2, 3, 4, 5)]
    assert answers(scale, tmp_path, {"labels": [[1, 2], [4, 5], 3]}) == ["yes"] * 4


@pytest.mark.parametrize(
    "row",
    [
        {**SIDES, "chosen": "response_b", "rejected": "response_a"},
        {**SIDES, "chosen": "B", "rejected": "A"},
        {"prompt": "q", "response_1": "no", "response_2": "yes", "chosen": "2", "rejected": "1"},
        {"prompt": "q", "response_1": "no", "response_2": "yes", "chosen": 2, "rejected": 1},
        {"question": "q", "answer_0": "no", "answer_1": "so", "answer_2": "yes", "chosen": "answer 2", "rejected": "answer_0"},
        {"conversation_a": USER + NO, "conversation_b": USER + YES, "chosen": "b", "rejected": "a"},
        {"prompt": "q", "gpt-4": "no", "llama": "yes", "chosen": "llama", "rejected": "gpt-4"},
    ],
)
def test_chosen_and_rejected_may_name_the_responses(tmp_path: Path, row: dict[str, Any]) -> None:
    data = dataset([row], tmp_path)
    assert [tuple(map(flat, (pair.prompt, *pair.responses))) for pair in data.load()] == [("q", "yes", "no")]
    assert [problem.code for problem in data.problems] == ["rows-read-as"]
    assert data.read_as["read"]["chosen"] == "label" and "response" in data.read_as["read"].values()
    assert flat(to_demonstration(row, 1).completion) == "yes"


@pytest.mark.parametrize(
    "more", [{}, {"response_1": "no"}, {"chosen": "1", "rejected": "1.5"}, {"chosen": "b", "rejected": "so"}]
)
def test_short_answers_are_no_names(more: dict[str, Any]) -> None:
    row = {"prompt": "q", "chosen": "B", "rejected": "A", "source": "x", **(SIDES if "chosen" in more else {}), **more}
    assert [(pair.chosen, pair.rejected) for pair in to_pairs(row, 1)] == [(row["chosen"], row["rejected"])]


@pytest.mark.parametrize("as_text", [False, True])
def test_turns_that_both_models_share_are_the_prompt(tmp_path: Path, as_text: bool) -> None:
    """Where they part before, the last questions follow different answers, and there is no one prompt."""
    shared = {"prompt": ["q", "and?"], "response_a": ["so", "no"], "response_b": ["so", "yes"], "winner": "b"}
    parted = {**shared, "response_b": ["oh", "yes"]}
    unsaid = {**shared, "response_a": ["so", None]}
    stored = [
        {name: json.dumps(value) if as_text and isinstance(value, list) else value for name, value in row.items()}
        for row in (shared, parted, unsaid)
    ]
    one, *others = stream(sources_of(str(write(tmp_path / "rows.jsonl", stored))))
    assert isinstance(one, Pair) and not isinstance(one.prompt, str)
    assert [message["content"] for message in one.prompt] == ["q", "so", "and?"]
    assert [answer[0]["content"] for answer in one.responses] == ["yes", "no"]
    assert [(other.line, other.code) for other in others if isinstance(other, Bad)] == [(2, "row-role"), (3, "row-empty")]


def test_unknown_values_are_bad_rows_and_ties_are_counted(tmp_path: Path) -> None:
    rows = [{**TWO, "label": value} for value in (1, 2, "tie", "seven", "maybe", "tie")]
    found = {problem.code: problem for problem in dataset(rows, tmp_path).problems}
    assert found["row-label"].lines == (4, 5) and "'maybe'" in found["row-label"].message
    assert (found["row-tie"].severity, found["row-tie"].lines) == ("warning", (3, 6))
    assert "label says which response is preferred (1 means output_1, 2 means output_2)" in found["rows-read-as"].message


def test_columns_name_the_parts_of_a_comparison(tmp_path: Path) -> None:
    rows = [{"ask": "q", "one": "no", "two": "yes", "verdict": word} for word in ("second", "second", "equal", "no idea")]
    columns = {"prompt": "ask", "responses": ["one", "two"], "preferred": "verdict", "labels": ["first", "second", "equal"]}
    data = dataset(rows, tmp_path, columns)
    assert answers(rows, tmp_path, columns) == ["yes"] * 2
    assert {problem.code: problem.lines or problem.line for problem in data.problems} == {
        "row-tie": 3,
        "row-label": 4,
        "rows-read-as": None,
    }
    assert data.read_as["read"] == {"ask": "prompt", "one": "response", "two": "response", "verdict": "label"}
    scored = [{"ask": "q", "one": "no", "two": "yes", "a": 1, "b": 2}]
    assert answers(scored, tmp_path, {"prompt": "ask", "responses": ["one", "two"], "scores": ["a", "b"]}) == ["yes"]
    listed = [{"ask": "q", "all": ["no", "yes"], "points": [1, 2]}]
    assert answers(listed, tmp_path, {"prompt": "ask", "responses": "all", "scores": "points"}) == ["yes"]


def test_a_row_of_several_responses_makes_several_pairs_and_one_demonstration(tmp_path: Path) -> None:
    row = {"prompt": "q", "response_a": "so", "response_b": "yes", "response_c": "no", "winner": "b"}
    assert [(pair.chosen, pair.rejected) for pair in to_pairs(row, 1)] == [("yes", "so"), ("yes", "no")]
    data, shown = dataset([row], tmp_path), dataset([row], tmp_path, sft=True)
    assert (data.rows, data.pairs, shown.pairs) == (1, 2, 1)


ASKED = {"fields": SIDES, "responses": {}}


@pytest.mark.parametrize(
    "more",
    [
        {"gold": "response_b", "shown_first": "response_a"},
        {"preferredByHumans": "B", "longer": "response_a"},
        {"final_vote": "response b", "worse": "response_a"},
        {"score_a": 1, "score_b": 2, "length_score_a": 9, "length_score_b": 3, "toxicity_score_a": 1, "toxicity_score_b": 0},
        {"helpful_score_a": 1, "helpful_score_b": 2, "harm_score_a": 0.9, "harm_score_b": 0.1},
        {"harmlessness_score_a": 1, "harmlessness_score_b": 2},
        {"overall_score_a": 1, "overall_score_b": 2, "style_score_a": 4, "style_score_b": 1},
    ],
)
def test_names_say_which_response_is_better(more: dict[str, Any]) -> None:
    assert [pair.chosen for pair in to_pairs({**SIDES, **more}, 1)] == ["yes"]


@pytest.mark.parametrize(
    "more",
    [
        *({name: "response_a"} for name in ("worse", "loser", "rejected", "worst", "shown_first", "first_shown", "reference")),
        *({name: "response_a"} for name in ("baseline", "longer", "not_preferred", "least_preferred", "dispreferred")),
        {"category": "summary a"},
        {"gold": "response_a", "final_vote": "response_b"},
        *(
            {f"{what}_score_a": 0.9, f"{what}_score_b": 0.1}
            for what in ("toxicity", "harmful", "length", "perplexity", "error")
        ),
        {"style_score_a": 4, "style_score_b": 1, "truth_score_a": 1, "truth_score_b": 4},
    ],
)
def test_a_value_alone_makes_no_response_the_better_one(more: dict[str, Any]) -> None:
    with pytest.raises(BadRow) as caught:
        to_pairs({**SIDES, **more}, 1)
    assert caught.value.code == "row-label"


@pytest.mark.parametrize("question", ["pw", "overall"])
def test_the_only_question_that_a_response_answers_is_the_label(question: str) -> None:
    given = {"length": [{"value": "response_a"}], question: [{"value": "response_b"}] * 2, "comment": [{"value": "so"}]}
    assert [pair.chosen for pair in to_pairs({**ASKED, "responses": given}, 1)] == ["yes"]


def test_what_names_the_worse_response_is_read_with_its_labels_exchanged(tmp_path: Path) -> None:
    rows = [{**SIDES, "worse": "response_a"}]
    (problem,) = [problem for problem in dataset(rows, tmp_path).problems if problem.severity == "error"]
    stated = {"preferred": "worse", "labels": ["response_b", "response_a"]}
    assert json.dumps(stated) in problem.message
    assert answers(rows, tmp_path, {"responses": ["response_a", "response_b"], **stated}) == ["yes"]
    assert answers(rows, tmp_path, stated) == ["yes"]


@pytest.mark.parametrize(
    "questions",
    [
        {"worse": "response_a"},
        {"which_is_longer": "response_a"},
        {"toxic": "response_a", "tone": "polite"},
        {"formality": "response_a", "tone": "response_b"},
    ],
)
def test_a_question_of_another_matter_is_no_label(questions: dict[str, str]) -> None:
    given = {name: [{"value": value}] for name, value in questions.items()}
    with pytest.raises(BadRow):
        to_pairs({**ASKED, "responses": given}, 1)
    given["which_is_better"] = [{"value": "response_b"}]
    assert [pair.chosen for pair in to_pairs({**ASKED, "responses": given}, 1)] == ["yes"]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "yes", "rejected": "no", "id": "7", "source": "x"},
        {"prompt": "q", "completion": "yes", "category": "c"},
        {"premise": "a", "sentence_1": "b", "sentence_2": "c", "label": 1},
        {"prompt": "q", "completion": "yes", "option_a": "b", "option_b": "c"},
    ],
)
def test_other_rows_are_no_comparisons(row: dict[str, Any]) -> None:
    for read_row in (to_pairs, to_demonstration):
        try:
            read_row(row, 1)
        except BadRow as error:
            assert error.code == "row-missing-key"


@pytest.mark.parametrize(
    ("row", "code", "names"),
    [
        ({"system": "a", "system_prompt": "b"}, "column-unread", ["system_prompt"]),
        ({"prompt": USER, "input": "i"}, "column-unread", ["input"]),
        ({"user_context": "i"}, "column-unread", ["user_context"]),
        ({"instruction": "i"}, "column-unread", ["instruction"]),
        ({"messages": [{"role": "user", "content": "more"}]}, "column-unread", ["messages"]),
        ({"available_tools": [{"name": "f", "description": "d"}]}, "column-unread", ["available_tools"]),
        ({"initial_reason_steps": "First"}, "column-unread", ["initial_reason_steps"]),
        ({"chosen_reasoning": "First"}, "column-unread", ["chosen_reasoning"]),
        ({"choices": ["A: one", "B: two"]}, "column-unread", ["choices"]),
        ({"thinking": "First"}, "column-unread", ["thinking"]),
        ({"functions": ["f"]}, "column-unread", ["functions"]),
        ({"image": "cat.jpg"}, "media-unread", ["image"]),
        ({"has_image": True}, "media-unread", ["has_image"]),
        ({"audio_path": "cat.mp3"}, "media-unread", ["audio_path"]),
        ({"prompt": "<video> What is it?"}, "media-marker", ["<video>"]),
        ({"score_chosen": 1, "score_rejected": 2.5}, "scores-contradict", ["score_chosen", "score_rejected"]),
        ({"chosen-rating": 3, "rejected-rating": 3}, "scores-tie", ["chosen-rating", "rejected-rating"]),
        ({"chosen_rank": 2, "rejected_rank": 1}, "scores-contradict", ["chosen_rank"]),
    ],
)
def test_columns_that_may_matter_are_warned_of(tmp_path: Path, row: dict[str, Any], code: str, names: list[str]) -> None:
    whole = {"prompt": "q", "chosen": "yes", "rejected": "no", **row}
    (problem,) = [problem for problem in dataset([whole], tmp_path).problems if problem.severity == "warning"]
    assert (problem.code, problem.line, problem.file) == (code, 1, str(tmp_path / "rows.jsonl"))
    assert all(name in problem.message for name in names)


SUGGESTED = {"value": "response_2", "agent": "judge-1"}
PREDICTED = {
    "model_version": "v1",
    "result": [{"from_name": "pw", "to_name": "response_1,response_2", "value": {"selected": "right"}}],
}


@pytest.mark.parametrize(
    ("row", "by", "read_as"),
    [
        ({"fields": UNANSWERED, "suggestions": {"best": SUGGESTED}}, "judge-1", {"fields", "suggestions"}),
        ({"fields": UNANSWERED, "suggestions": [{**SUGGESTED, "question_name": "best"}]}, "judge-1", {"fields", "suggestions"}),
        (
            {**UNANSWERED, "best.suggestion": "response_2", "best.suggestion.agent": "judge-1"},
            "judge-1",
            {*UNANSWERED, "best.suggestion"},
        ),
        ({"data": UNANSWERED, "annotations": [], "predictions": [PREDICTED]}, "v1", {"data", "predictions"}),
    ],
)
def test_an_answer_of_a_machine_is_said(tmp_path: Path, row: dict[str, Any], by: str, read_as: set[str]) -> None:
    data = dataset([row], tmp_path)
    (problem,) = [problem for problem in data.problems if problem.code == "label-suggested"]
    assert problem.line == 1 and f" of {by} " in problem.message
    assert data.read_as["read"].keys() == read_as and not data.read_as["unread"]


def test_an_answer_of_a_person_is_read_from_its_column(tmp_path: Path) -> None:
    row = {"fields": UNANSWERED, "responses": {"best": [{"value": "response_2"}]}, "suggestions": {"best": SUGGESTED}}
    data = dataset([row, {**row, "responses": {}}], tmp_path)
    assert [problem.line for problem in data.problems if problem.code == "label-suggested"] == [2]
    assert data.read_as["read"] == {"fields": "prompt, response", "responses": "label", "suggestions": "label"}


@pytest.mark.parametrize(
    ("row", "name"),
    [
        (
            {"prompt": "p", "response_1": "A", "response_2": "B", "score_1": 1, "score_2": 5, "winner": "response_1"},
            "score_1 and score_2",
        ),
        ({"prompt": "p", "responses": ["A", "B"], "scores": [1, 5], "label": 0}, "scores"),
    ],
)
def test_scores_that_contradict_a_label_are_called_as_the_file_calls_them(
    tmp_path: Path, row: dict[str, Any], name: str
) -> None:
    (problem,) = [
        one
        for one in dataset([row], tmp_path, {"labels": [0, 1]} if "label" in row else None).problems
        if "scores-" in one.code
    ]
    assert problem.message.startswith(f"{name} rate the rejected response higher")


@pytest.mark.parametrize(
    "row",
    [
        {"system_prompt": "a", "prompt": "q"},
        {"prompt": "Translate: Good morning.", "input": "Good morning."},
        {"prompt": "Translate.", "input": "Good morning."},
        {"prompt": "q", "messages": USER + YES, "score_chosen": 2, "score_rejected": 1},
        {"prompt": "q", "images": [], "context": ""},
        {"prompt": "q", "has_image": False, "num_images": 0, "image": "nan", "video": "0"},
        {"prompt": "q", "tools": [], "num_choices": 4, "reason": "shorter"},
        {"prompt": "q", "functions": [{"name": "f"}]},
        {"prompt": "q", "chosen_rank": 1, "rejected_rank": 2},
        {"prompt": "q", "history": [["a", "b"]]},
    ],
)
def test_columns_that_are_read_or_say_nothing_new_give_no_warning(tmp_path: Path, row: dict[str, Any]) -> None:
    found = dataset([{"chosen": "yes", "rejected": "no", **row}], tmp_path).problems
    assert [problem for problem in found if problem.severity != "hint"] == []


ALPACA = {"instruction": "q", "input": "", "output": "yes", "text": "### Instruction:\nq\n\n### Response:\nyes"}


@pytest.mark.parametrize(
    ("row", "taken"),
    [
        (ALPACA, "output"),
        ({"conversations": USER + YES, "text": "<user>q<assistant>yes"}, "conversations"),
        ({"prompt": "q", "completion": "yes", "text": "q yes"}, "completion"),
    ],
)
def test_a_text_beside_what_it_repeats_is_not_learned(tmp_path: Path, row: dict[str, Any], taken: str) -> None:
    data = dataset([row], tmp_path, sft=True)
    (shown,) = data.load()
    assert (flat(shown.prompt), flat(shown.responses[0])) == ("q", "yes")
    (hint,) = data.problems
    assert hint.code == "rows-read-as" and f"{taken} is trained on, and text is not" in hint.message
    assert "text" in data.read_as["unread"]


def test_a_text_is_learned_where_it_is_named_or_alone(tmp_path: Path) -> None:
    for row, columns in ((ALPACA, {"text": "text"}), ({"text": ALPACA["text"], "output": "yes"}, None)):
        (shown,) = dataset([row], tmp_path, columns, sft=True).load()
        assert (shown.prompt, shown.responses) == ("", (ALPACA["text"],))


def test_unwanted_demonstrations_are_warned_of_and_classes_are_not(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "completion": "yes", "label": label} for label in (True, False, True, False)]
    (problem,) = dataset(rows, tmp_path, sft=True).problems
    assert (problem.code, problem.lines) == ("label-unwanted", (2, 4)) and '"label"' in problem.message
    assert dataset([{**rows[0], "thumbs_down": down} for down in (0, 1)], tmp_path, sft=True).problems[0].line == 2
    assert dataset([{**rows[0], "label": label} for label in (0, 1, 2)], tmp_path, sft=True).problems == ()


CALLS = [
    {"from": "human", "value": "q"},
    {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
    {"from": "observation", "value": "5"},
    {"from": "gpt", "value": "yes"},
]


def test_calls_of_a_conversation_are_read(tmp_path: Path) -> None:
    for sft, row in ((True, {}), (False, {"rejected_response": "no"})):
        data = dataset([{"conversations": CALLS, "tools": [{"name": "f"}], **row}], tmp_path, sft=sft)
        assert [problem.code for problem in data.problems if problem.severity != "hint"] == []


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"loss": False}, {"weight": 0.0}])
def test_a_message_that_is_marked_as_not_learned_is_warned_of(tmp_path: Path, mark: dict[str, Any]) -> None:
    rows = [{"messages": [*USER, {**YES[0], **one}]} for one in ({}, mark, dict.fromkeys(mark, 1))]
    (problem,) = dataset(rows, tmp_path, sft=True).problems
    assert (problem.code, problem.line) == ("label-unwanted", 2) and next(iter(mark)) in problem.message


def test_functions_are_tools() -> None:
    row, tools = {"prompt": "q", "chosen": "yes", "rejected": "no"}, [{"name": "f"}]
    for functions in (tools, json.dumps(tools)):
        assert to_pairs({**row, "functions": functions}, 1)[0].tools == ({"name": "f"},)
    assert to_pairs({**row, "functions": "def f(): pass"}, 1)[0].tools == ()


@pytest.mark.parametrize("empty", ["nan", "None", "null", "NaN", " "])
@pytest.mark.parametrize("column", ["system", "input", "context", "history", "tools"])
def test_an_empty_cell_in_words_says_nothing(tmp_path: Path, column: str, empty: str) -> None:
    row = {"prompt": "q", "chosen": "None", "rejected": "nan", column: empty}
    (pair,) = to_pairs(row, 1)
    assert dataset([row], tmp_path).problems == ()
    assert (pair.prompt, pair.chosen, pair.rejected, pair.tools) == ("q", "None", "nan", ())


def test_each_column_is_listed(tmp_path: Path) -> None:
    row = {"instruction": "q", "input": "i", "chosen": "yes", "rejected": "no", "system_prompt": "s", "id": 3}
    said = dataset([row], tmp_path).to_json()["columns"]
    read_as = {
        "instruction": "prompt",
        "input": "prompt",
        "chosen": "chosen",
        "rejected": "rejected",
        "system_prompt": "system",
    }
    assert said == {"read": read_as, "unread": ["id"]}
    renamed = dataset([{"ask": "q", **row}], tmp_path, {"prompt": "ask"}).to_json()["columns"]
    assert renamed["read"]["ask"] == "prompt" and "instruction" in renamed["unread"]


@pytest.mark.parametrize("hidden", ["\u200b", "\u200c\u200d", "\u2060", "\ufeff", "\u00ad"])
def test_what_cannot_be_seen_makes_no_answer(hidden: str) -> None:
    for chosen, code in ((f" {hidden}", "row-empty"), (f"no{hidden}", "row-identical")):
        for wrap in (str, lambda text: [{"role": "assistant", "content": text}]):
            with pytest.raises(BadRow) as caught:
                to_pairs(json.loads(json.dumps({"prompt": "q", "chosen": wrap(chosen), "rejected": wrap("no")})), 1)
            assert caught.value.code == code

"""Votes: the page in a real browser, the file, its count by hand, and a judge behind a real HTTP server."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, WAIT, Browser, Page, browser
from conftest import ROOT, Run
from test_ranking import Endpoint, endpoint, longer_is_better, shown  # noqa: F401 - endpoint is a fixture
from typer.testing import CliRunner

from dpo_cli.app import app
from dpo_cli.errors import InvalidInput
from dpo_cli.preferences import votes
from dpo_cli.results.codec import to_json
from dpo_cli.results.intervals import Interval

ORIGIN: votes.Origin = {"run": "quickstart", "adapter_sha256": "ab" * 32, "criterion": "clearer"}
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "So."},
    {"role": "user", "content": "And then?"},
]
ANSWERS = [
    ("What <b>is</b> this?", "</script><script>document.title = 'broken'</script>", "a line\u2028 and {{ 7 * 7 }}"),
    (CONVERSATION, "the adapter's", "the base's"),
    ("Same?", "Yes.", "Yes."),
    ("Nothing?", "", "Something."),
    *((f"question {i}", f"adapter {i}", f"base {i}") for i in range(6)),
]


def made(answers: list[Any] = ANSWERS, seed: int = 1) -> votes.Document:
    return votes.unvoted(ORIGIN, answers, seed)


def voted(*winners: votes.Winner | None) -> votes.Document:
    document = made([(f"question {i}", "a", "b") for i in range(len(winners))])
    for vote, winner in zip(document["votes"], winners, strict=True):
        vote["winner"], vote["by"] = winner, winner and "human"
    return document


def written(tmp_path: Path, document: Any) -> Path:
    place = tmp_path / "votes.json"
    place.write_text(document if isinstance(document, str) else json.dumps(document), encoding="utf-8")
    return place


def test_a_tally_by_hand() -> None:
    """6 wins, 1 loss, 1 tie: (6 + 1/2) / 8 = 0.8125. Sign test of 1 of 7: 2 (1 + 7) / 2^7 = 0.125. Two are not voted yet."""
    counted = votes.tally(voted(*["adapter"] * 6, "base", "tie", None, None))
    assert [getattr(counted, name) for name in ("prompts", "missing", "wins", "losses", "ties", "same_text")] == [
        10,
        2,
        6,
        1,
        1,
        0,
    ]
    assert counted.win_rate.value == 0.8125
    assert 0.4 < counted.win_rate.low < 0.8125 < counted.win_rate.high == 1.0
    assert counted.sign_test == 0.125
    assert votes.tally(voted("adapter")).win_rate == Interval(1.0, 1.0, 1.0)


def test_the_sign_test_by_hand() -> None:
    """0 of 5: 2 / 32. 2 of 5: 2 (1 + 5 + 10) / 32 = 1. Nothing decided: 1.

    1300 of 2500, too many for floats alone: 1299.5 is (1299.5 - 1250) / 25 = 1.98 deviations from the mean, 2 (1 - 0.97615).
    """
    assert [votes.sign_test(*split) for split in ((5, 0), (0, 5), (3, 2), (0, 0))] == [0.0625, 0.0625, 1.0, 1.0]
    assert votes.sign_test(1300, 1200) == pytest.approx(0.0477, abs=5e-4)


def test_the_page_is_blind_balanced_and_follows_its_seed() -> None:
    answers = [(f"question {i}", f"adapter {i}", f"base {i}") for i in range(20)]
    page = votes.page(made(answers), 1)
    assert page == votes.page(made(answers), 1) != votes.page(made(answers, 2), 2)
    assert made(answers)["page"] != made(answers, 2)["page"] != made(answers[:19], 2)["page"]
    data = json.loads(page.split('<script type="application/json" id="data">')[1].split("</script>")[0])
    assert sorted(case["place"] for case in data["cases"]) == list(range(20)) != [case["place"] for case in data["cases"]]
    assert sum(case["answers"][0].startswith("adapter") for case in data["cases"]) == 10
    assert '"adapter"' not in page.split("<script>")[0] and '"base"' not in page.split("<script>")[0]


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        ('{"votes": [', "votes-unreadable", "line 1"),
        ("[" * 100_000, "votes-unreadable", "damaged"),
        ('{"learning_rate": 2e-4}', "not-votes", "votes_version"),
        (json.dumps(made() | {"votes_version": 2}), "not-votes", "votes_version: 1 was expected"),
        (json.dumps(voted("nobody")), "not-votes", "votes[0].winner: 'nobody' is not one of"),
        (json.dumps(made() | {"judge": {}}), "not-votes", "judge: 'url' is a required property"),
        (json.dumps(voted(None, None)), "no-votes", "there are no votes yet"),
    ],
)
def test_what_is_no_file_of_votes_is_told(tmp_path: Path, text: str, code: str, says: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        votes.count(written(tmp_path, text))
    (problem,) = caught.value.problems
    assert problem.code == code and says in problem.message and problem.file == str(tmp_path / "votes.json")


@pytest.mark.parametrize("command", ["vote", "eval"])  # as it was before there was `dpo vote`
def test_a_tally_on_the_command_line_needs_no_run_and_no_torch(tmp_path: Path, command: str) -> None:
    place = written(tmp_path, voted("adapter", "tie", None))
    code = (
        "import sys\n"
        "from dpo_cli.app import app\n"
        f"app([{command!r}, '--tally', {str(place)!r}, '--json'], standalone_mode=False)\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert json.loads(done.stdout) == {**to_json(votes.tally(voted("adapter", "tie", None))), "thresholds": []}
    assert "note: 1 of 3 prompts have no vote yet" in done.stderr
    assert CliRunner().invoke(app, [command, "--tally", str(place), "--fail-under", "win_rate>0.75"]).exit_code == 5
    told = CliRunner().invoke(app, [command, "--tally", str(tmp_path / "gone.json")])
    assert told.exit_code == 3 and "No such file" in told.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["eval"],
        ["eval", "run", "--tally", "votes.json"],
        ["eval", "--tally", "votes.json", "--side-by-side", "3"],
        ["eval", "run", "--judge"],
        ["eval", __file__, "--adapter", "a", "--side-by-side", "3"],
        ["vote"],
        ["vote", "run", "--tally", "votes.json"],
    ],
)
def test_what_does_not_go_together_is_wrong_usage(words: list[str]) -> None:
    assert CliRunner().invoke(app, words).exit_code == 2


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here")
    with browser(tmp_path_factory.mktemp("browser")) as started:
        yield started


@pytest.fixture
def page(chromium: Browser, tmp_path: Path) -> Page:
    """The page of votes in a window that remembers nothing of the tests before."""
    (tmp_path / "side-by-side.html").write_text(votes.page(made(), 1), encoding="utf-8")
    opened = chromium.page(tmp_path)
    opened.open((tmp_path / "side-by-side.html").as_uri())
    return opened


def seen(page: Page) -> tuple[str, list[str]]:
    """The heading, and the texts of the prompt and of both answers."""
    return page.js("[heading.innerText, [...document.querySelectorAll('#ask .text')].map((text) => text.textContent)]")


def downloaded(page: Page, folder: Path) -> votes.Document:
    """What the page saves, once the browser has written it."""
    place = folder / "votes.json"
    place.unlink(missing_ok=True)
    page.js("save()")
    deadline = time.monotonic() + WAIT
    while not place.exists():
        assert time.monotonic() < deadline, f"the page saved nothing within {WAIT:.0f} s"
        page.js("new Promise((resolve) => setTimeout(resolve, 20))")
    return votes.read(place)


def test_votes_by_keyboard_and_button_reach_the_file(page: Page, tmp_path: Path) -> None:
    """Every prompt is voted for by the answer that is seen, in all ways to vote; what is saved is what was meant."""
    document = made()
    answers = {(vote["adapter"], vote["base"]): vote for vote in document["votes"]}
    page.look(390, 844)
    ways = ["1", "button 2", "t", "button 1", "2", "0", "button tie", "3", "T"]
    for number, way in enumerate(ways, start=1):
        heading, (*prompt, one, other) = seen(page)
        assert heading == f"Prompt {number} of 9"
        one, other = ("" if text == "(an empty answer)" else text for text in (one, other))
        vote = answers.get((one, other)) or answers[other, one]
        said = vote["prompt"]
        assert prompt == ([said] if isinstance(said, str) else [message["content"] for message in said])
        if way.startswith("button "):
            page.click(f"#bar [data-does='{way[7:]}']")
        else:
            page.press(way)
        vote |= {"winner": {"1": "adapter", "2": "base"}.get(way[-1], "tie"), "by": "human"}
        if way[-1] in "12" and one != vote["adapter"]:
            vote["winner"] = "base" if vote["winner"] == "adapter" else "adapter"
    assert page.js("[heading.innerText, status.innerText, result.hidden]")[::2] == ["All 9 voted", True]
    saved = downloaded(page, tmp_path)
    assert saved == document and votes.count(tmp_path / "votes.json") == votes.tally(document)
    assert {vote["by"] for vote in saved["votes"]} == {"human", "same text"}
    page.click("#end [data-does=show]")
    counted = votes.tally(document)
    assert page.js("result.innerText.match(/[0-9]+$/gm).map(Number)") == [counted.wins, counted.losses, counted.ties]
    page.press("Backspace")
    assert page.js("at") == 9  # who has seen the result votes no more
    assert page.console == [] and len(page.requests) == 1
    assert page.js("document.title") == "Which answer is better? quickstart"


def test_a_reload_loses_nothing_and_back_goes_back(page: Page, tmp_path: Path) -> None:
    page.press("1", "2", "t", "ArrowLeft", "Backspace")
    assert page.js("[at, marks.slice(0, 4), document.activeElement.id]") == [1, ["1", "2", "tie", None], "heading"]
    assert page.js("document.querySelector('.bar [aria-pressed=true]').dataset.does") == "2"
    page.press("1")
    page.reload()
    assert page.js("[at, marks.slice(0, 4), progress.value]") == [3, ["1", "1", "tie", None], 3]
    assert votes.tally(downloaded(page, tmp_path)).missing == 6
    page.call("Input.dispatchKeyEvent", type="keyDown", key="1", autoRepeat=True)
    page.call("Input.dispatchKeyEvent", type="keyDown", key="1", modifiers=2)
    assert page.js("at") == 3  # a key held down votes once, and Ctrl+1 is the browser's


def test_a_browser_that_keeps_nothing_says_so_and_votes_all_the_same(page: Page, tmp_path: Path) -> None:
    refuse = "Object.defineProperty(window, 'localStorage', { get() { throw new DOMException('no', 'SecurityError'); } })"
    page.call("Page.addScriptToEvaluateOnNewDocument", source=refuse)
    page.reload()
    page.press("1")
    assert "does not store votes: save before you close" in page.js("document.querySelector('#status').innerText")
    assert votes.tally(downloaded(page, tmp_path)).missing == 8
    assert page.js("document.querySelector('#status').innerText") == "1 of 9 voted. Saved."
    assert page.console == []


def test_nothing_is_asked_where_all_answers_are_the_same(page: Page, tmp_path: Path) -> None:
    document = made([("one", "Yes.", "Yes."), ("two", "No.", "No.")])
    (tmp_path / "same.html").write_text(votes.page(document, 1), encoding="utf-8")
    page.open((tmp_path / "same.html").as_uri())
    page.press("1", "Backspace")
    assert page.js("heading.innerText") == "Nothing to vote on: all answers are the same text"
    assert downloaded(page, tmp_path) == document
    assert votes.tally(document).win_rate == Interval(0.5, 0.5, 0.5)
    assert page.console == []


def test_the_second_click_of_a_double_one_is_no_vote(page: Page) -> None:
    page.click("#bar [data-does='1']")
    page.click("#bar [data-does='1']", count=2)
    assert page.js("at") == 1
    page.click("#bar [data-does='1']")
    assert page.js("at") == 2


def test_the_page_fits_a_phone_and_its_buttons_a_thumb(page: Page) -> None:
    page.look(360, 640)
    assert page.js("document.documentElement.scrollWidth") == 360
    heights = page.js("[...document.querySelectorAll('#bar button')].map((button) => button.getBoundingClientRect().height)")
    assert len(heights) == 4 and min(heights) >= 48
    light = page.js("getComputedStyle(document.body).backgroundColor")
    page.look(360, 640, dark=True)
    assert page.js("getComputedStyle(document.body).backgroundColor") != light


def test_a_run_is_put_before_a_judge(run: Run, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """The endpoint fails after some verdicts: they are kept, and the same command asks for the others alone."""
    _, place = run(eval_split=0.5, learning_rate=1.0, max_new_tokens=16)
    options = {"judge_url": endpoint.url, "judge_model": "judge-1", "criterion": "longer"}
    words = ["eval", str(place), f"augment={json.dumps(options)}", "--side-by-side", "99", "--judge", "--json"]
    refused(place, words)
    monkeypatch.setattr("dpo_cli.preferences.side_by_side.AT_ONCE", 1)
    left = iter(range(3))
    endpoint.reply = lambda asked: longer_is_better(asked) if next(left, None) is not None else (404, "")
    assert CliRunner().invoke(app, words).exit_code == 1
    kept = votes.read(place / "votes.json")["votes"]
    open_ones = [vote for vote in kept if vote["winner"] is None]
    assert [vote["by"] for vote in kept].count("judge") == 1 and open_ones
    endpoint.requests.clear()
    endpoint.reply = longer_is_better
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0 and "no-effect" not in done.stderr, done.stderr
    asked = [shown(body["messages"][0]["content"]) for _, _, body in endpoint.requests]
    orders = [order for vote in open_ones for order in ((vote["adapter"], vote["base"]), (vote["base"], vote["adapter"]))]
    assert asked == orders
    result, document = json.loads(done.stdout)["side_by_side"], votes.read(place / "votes.json")
    assert result["tally"] == to_json(votes.tally(document)) and result["prompts"] == len(document["votes"]) == 5
    assert "all there are; 99 were requested" in done.stderr
    assert document["judge"] == {"url": f"{endpoint.url}/chat/completions", "model": "judge-1"}
    for vote in document["votes"]:
        difference = len(vote["adapter"]) - len(vote["base"])
        assert vote["winner"] == ("adapter" if difference > 0 else "base" if difference < 0 else "tie")
    answers = [(vote["prompt"], vote["adapter"], vote["base"]) for vote in document["votes"]]
    summary = json.loads((place / "metrics.json").read_text(encoding="utf-8"))
    unvoted = votes.unvoted({"run": "run", "adapter_sha256": summary["adapter_sha256"], "criterion": "longer"}, answers, 42)
    assert unvoted["page"] == document["page"]
    assert (place / "side-by-side.html").read_text(encoding="utf-8") == votes.page(unvoted, 42)


def refused(place: Path, words: list[str]) -> None:
    """What is wrong with a contest is told before a model is loaded, and votes of people stay."""
    told = CliRunner().invoke(app, ["eval", str(place), "--side-by-side", "2", "--judge"])
    assert told.exit_code == 3 and "judge_url" in told.stderr and "[rank-incomplete]" in told.stderr
    plan = (place / "plan.json").read_text(encoding="utf-8")
    (place / "plan.json").write_text(plan.replace('"eval_split": 0.5', '"eval_split": 0'), encoding="utf-8")
    told = CliRunner().invoke(app, ["eval", str(place), "--side-by-side", "2"])
    assert told.exit_code == 3 and "[nothing-to-compare]" in told.stderr
    assert "there are no held-out rows" not in told.stdout  # as an evaluation says it
    (place / "plan.json").write_text(plan, encoding="utf-8")
    told = CliRunner().invoke(app, ["eval", str(place), "beta=0.5", "--side-by-side", "2"])
    assert told.exit_code == 2 and "dpo eval does not accept beta=" in told.stderr
    (place / "votes.json").write_text(json.dumps(voted("adapter")), encoding="utf-8")
    told = CliRunner().invoke(app, words)
    assert told.exit_code == 3 and "[votes-of-people]" in told.stderr
    assert votes.read(place / "votes.json") == voted("adapter")
    (place / "votes.json").unlink()


def test_a_reply_that_is_no_verdict_is_no_vote(run: Run, endpoint: Endpoint) -> None:  # noqa: F811
    """Half of the replies say nothing: these prompts stay open, and the same command asks for them again; all: exit 1."""
    _, place = run(eval_split=0.5, learning_rate=1.0, max_new_tokens=16)
    options = {"judge_url": endpoint.url, "judge_model": "judge-1"}
    words = ["vote", str(place), f"augment={json.dumps(options)}", "--prompts", "99", "--judge"]
    endpoint.reply = lambda _: (200, "I really cannot say, both are great!")
    told = CliRunner().invoke(app, words)
    assert told.exit_code == 1 and "its replies are not A, B or T" in told.stderr
    open_before = [
        vote["prompt"]
        for vote in json.loads((place / "votes.json").read_text(encoding="utf-8"))["votes"]
        if vote["winner"] is None
    ]
    endpoint.reply = lambda asked: (200, "T" if f"[Prompt]\n{open_before[0]}\n" in asked else "perhaps")
    told = CliRunner().invoke(app, words)
    assert told.exit_code == 0 and "have no verdict from the judge" in told.stdout
    kept = json.loads((place / "votes.json").read_text(encoding="utf-8"))["votes"]
    assert [vote["prompt"] for vote in kept if vote["by"] == "judge"] == open_before[:1]
    endpoint.reply = lambda _: (200, "T")
    done = CliRunner().invoke(app, [*words, "--json", "--fail-under", "win_rate>0.99"])
    result = json.loads(done.stdout)
    assert (done.exit_code, result["thresholds"][0]["ok"]) == (5, False) and result["prompts"] == 5

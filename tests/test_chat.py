"""Chat: answers as in an evaluation, the conversation as the template writes it, votes that become pairs, and a terminal."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import tiny_tokenizer
from conftest import ROOT, made_row, tiny_model
from fork_server import dpo
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from test_votes import voted, written
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from dpo_cli.commands.chat import Chat, _origin
from dpo_cli.data.encoded import EncodedRows
from dpo_cli.errors import InvalidInput
from dpo_cli.evaluation.generation import Sampling, answers
from dpo_cli.preferences.conversation import Conversation, Speakers, Stop, TextOfTokens
from dpo_cli.preferences.voted_pairs import VotedPairs
from dpo_cli.runs.open_run import OpenedRun, load_policy, open_run
from dpo_cli.ui.chat_entry import TypedEntry
from dpo_cli.ui.chat_view import ChatView
from dpo_cli.ui.console import Console, printable

NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}{% endfor %}"
)
OMITS_SYSTEM = "{% for message in messages if message['role'] != 'system' %}[user]{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a tiny model that has many end tokens, so that its sampled answers are short."""
    place = tmp_path_factory.mktemp("chat")
    model = tiny_model("llama")
    model.generation_config.eos_token_id = [2, *range(40, 60)]
    model.float().save_pretrained(place / "model")
    tiny_tokenizer().save_pretrained(place / "model")
    (place / "pairs.jsonl").write_text("".join(json.dumps(made_row(i)) + "\n" for i in range(24)), encoding="utf-8")
    values = {"model_name": "model", "dataset": "pairs.jsonl", "device": "cpu", "bf16": False, "fp16": False, "max_steps": 3}
    values |= {"lora_r": 4, "learning_rate": 3e-2, "output_dir": "run", "kl_prompts": 2, "max_new_tokens": 4}
    (place / "config.json").write_text(json.dumps(values), encoding="utf-8")
    done = dpo("train", "config.json", cwd=place)
    assert done.returncode == 0, done.stderr
    return place


@pytest.fixture(scope="module")
def opened(trained: Path) -> OpenedRun:
    before = Path.cwd()
    os.chdir(trained)
    try:
        return open_run(str(trained / "run"), None, Console(), with_rows=False)
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def policy(opened: OpenedRun) -> Any:
    return load_policy(opened, Console())[0]


def speakers(policy: Any, opened: OpenedRun, tokens: int = 12, temperature: float | None = None) -> Speakers:
    return Speakers.of(policy, opened, Conversation.of(opened, None), tokens, temperature, 1)


def nothing(text: str) -> None:
    pass


class Script:
    """A user who enters these texts, and presses the key of each if there is a vote on its answers."""

    def __init__(self, texts: list[str], keys: str) -> None:
        self.left, self.pressed = iter(zip(texts, keys, strict=True)), ""

    def text(self) -> str | None:
        text, self.pressed = next(self.left, (None, ""))
        return text

    def key(self, question: str, keys: str) -> str | None:
        return self.pressed

    def quiet(self) -> AbstractContextManager[None]:
        return nullcontext()


def test_both_sides_answer_as_in_an_evaluation(policy: Any, opened: OpenedRun, trained: Path) -> None:
    """The policy as `dpo eval` lets it answer, the base as the model without any adapter."""
    assert isinstance(opened.rows, EncodedRows) and not opened.rows
    speaking, conversation = speakers(policy, opened), Conversation.of(opened, None)
    ids, _ = conversation.ids(conversation.asked("question 1"), speaking.room)
    room = opened.plan.evaluation_room(4)
    plain = AutoModelForCausalLM.from_pretrained(trained / "model")
    pieces: list[str] = []
    one, other = (speaking.answer(side, ids, 0, pieces.append) for side in ("adapter", "base"))
    (evaluated,) = answers(policy.network, opened.tokenizer, [ids], Sampling(12), torch.float32, room)
    (without,) = answers(plain, opened.tokenizer, [ids], Sampling(12), torch.float32, room)
    assert one.answer == evaluated and other.answer == without and one.answer.ids != other.answer.ids
    assert "".join(pieces).replace("\N{REPLACEMENT CHARACTER}", "") != "" and one.finish in ("end", "length")


def test_the_prompt_is_that_of_the_template_and_loses_its_oldest_turns(opened: OpenedRun) -> None:
    conversation = Conversation.of(opened, "Be brief.")
    conversation.add("first " * 20, "an answer")
    prompt = conversation.asked("the next one")
    template = opened.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    ids, is_cut = conversation.ids(prompt, 1000)
    assert opened.tokenizer.decode(ids) == template and not is_cut
    shorter, is_cut = conversation.ids(prompt, len(ids) - 20)
    kept = opened.tokenizer.decode(shorter)
    assert is_cut and "Be brief." in kept and "the next one" in kept and "first" not in kept
    with pytest.raises(InvalidInput, match="leave no room for a message"):
        conversation.ids(prompt, 3)
    assert conversation.undo() and not conversation.undo() and len(conversation.messages) == 1


@pytest.mark.parametrize(
    ("template", "says"), [(NO_SYSTEM, "System role not supported"), (OMITS_SYSTEM, "omits"), (None, "without")]
)
def test_a_template_without_a_system_role_is_refused(opened: OpenedRun, template: str | None, says: str) -> None:
    tokenizer: PreTrainedTokenizerFast = tiny_tokenizer()
    tokenizer.chat_template = template
    other = OpenedRun(**{**vars(opened), "tokenizer": tokenizer})
    Conversation.of(other, None)
    with pytest.raises(InvalidInput, match=says) as caught:
        Conversation.of(other, "Be brief.")
    assert caught.value.problems[0].code == "no-system-role"


def test_ctrl_c_stops_an_answer_and_keeps_what_is_there(policy: Any, opened: OpenedRun) -> None:
    speaking, stop = speakers(policy, opened, tokens=40, temperature=1.0), Stop()
    before = signal.getsignal(signal.SIGINT)
    ids, _ = Conversation.of(opened, None).ids("question 1", 100)
    turn, whole = next(
        (turn, whole) for turn in range(50) if (whole := speaking.answer("adapter", ids, turn, nothing)).answer.tokens > 20
    )

    def interrupt(piece: str) -> None:
        if not stop.is_requested:
            signal.raise_signal(signal.SIGINT)

    with stop.listening():
        spoken = speaking.answer("adapter", ids, turn, interrupt, stop)
    assert signal.getsignal(signal.SIGINT) is before
    assert spoken.finish == "stopped" and 0 < spoken.answer.tokens < whole.answer.tokens
    assert whole.answer.ids[: spoken.answer.tokens] == spoken.answer.ids


def test_text_is_shown_once_its_characters_are_whole(opened: OpenedRun) -> None:
    text, pieces = " the cat é\N{SMILING FACE WITH SUNGLASSES} sat", list[str]()
    shown = TextOfTokens(opened.tokenizer, frozenset([2]), pieces.append)
    for token in [*opened.tokenizer(text)["input_ids"], 2]:
        shown.add(token)
    assert "".join(pieces) == text.lstrip() and len(pieces) > 3 and "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)


def held(policy: Any, opened: OpenedRun, out: Path, texts: list[str], keys: str) -> Chat:
    speaking = speakers(policy, opened, tokens=60, temperature=1.0)
    console = Console()
    chat = Chat(
        Conversation.of(opened, None), speaking, True, console, ChatView(console), VotedPairs(out), _origin(opened, speaking)
    )
    chat.hold(Script(texts, keys), is_typed=True)
    return chat


def test_votes_become_pairs_that_train(
    policy: Any, opened: OpenedRun, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "chat.jsonl"
    out.write_text('{"prompt": "by hand", "chosen": "a", "rejected": "b"}', encoding="utf-8")  # without an end of its line
    chat = held(policy, opened, out, [f"question {i}" for i in range(8)], "aababa=s")
    said = capsys.readouterr().out
    shown = [line.partition(": ")[2] for line in said.split("\n") if line.startswith(("A: ", "B: "))]
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()][1:]
    assert len(rows) == chat.pairs.counts["pair"] >= 2 and f"{out}: {len(rows)} pairs" in said  # type: ignore[union-attr]
    assert {row["provenance"]["chosen"] for row in rows} <= {"adapter", "base"}
    for row in rows:
        turn, mark = row["provenance"]["turn"], row["provenance"]
        key = "aababa"[turn]
        one, other = shown[2 * turn : 2 * turn + 2] if key == "a" else shown[2 * turn : 2 * turn + 2][::-1]
        texts = [row[name][0]["content"] for name in ("chosen", "rejected")]
        assert [printable(text).split("\n")[0] for text in texts] == [one, other]
        assert row["prompt"][-1] == {"role": "user", "content": f"question {turn}"} and len(row["prompt"]) == 2 * turn + 1
        assert mark["source"] == "dpo chat" and mark["run"] == "run" and mark["seed"] == 1
        assert mark["sampling"] == {"max_new_tokens": 60, "temperature": 1.0, "top_p": 1.0}
        if turn < 6:  # the conversation continues with the better answer
            assert chat.conversation.messages[2 * turn + 1]["content"] == texts[0]
    ties = Path(f"{out}.ties").read_text(encoding="utf-8").splitlines()
    assert len(ties) == 1 and json.loads(ties[0])["provenance"]["chosen"] is None
    checked = json.loads(dpo("validate", "config.json", f"dataset={out}", "--json", cwd=trained).stdout)
    assert not [problem for problem in checked["problems"] if problem["severity"] == "error"]
    assert not [problem for problem in checked["problems"] if problem["code"].startswith("column")]
    words = (f"dataset={out}", "max_steps=1", "eval_split=0", f"output_dir={tmp_path / 'next'}")
    done = dpo("train", "config.json", *words, cwd=trained)
    assert done.returncode == 0, done.stderr


def test_an_answer_that_did_not_end_is_not_chosen(
    policy: Any, opened: OpenedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["/system Be brief.", "question 1", "/undo", "/undo", "/foo", "//a", "/quit", "not said"]
    chat = held(policy, opened, tmp_path / "chat.jsonl", texts, "s" * len(texts))
    assert not (tmp_path / "chat.jsonl").exists() and [m["role"] for m in chat.conversation.messages][:2] == ["system", "user"]
    assert chat.conversation.messages[1]["content"] == "/a"
    said = capsys.readouterr().out
    assert "removed the last turn" in said and "there is no turn to remove" in said and "there is no command /foo" in said
    chat.speakers = speakers(policy, opened, tokens=1, temperature=1.0)
    chat.conversation.restart(None)
    chat.hold(Script(["question 2", "question 3", "question 5"], "aba"), is_typed=True)
    assert "did not end, and would teach not to end" in capsys.readouterr().out


def test_one_prompt_for_a_script(trained: Path) -> None:
    run = trained / "run"
    words = ("chat", run, "--side-by-side", "--prompt", "-", "--max-new-tokens", 8, "--json")
    done = dpo(*words, cwd=trained, input="question 1\n")
    document = json.loads(done.stdout)
    assert [answer["model"] for answer in document["answers"]] == ["policy", "base"]
    assert document["messages"] == [{"role": "user", "content": "question 1\n"}]
    assert document["adapter_sha256"] == json.loads((run / "metrics.json").read_text(encoding="utf-8"))["adapter_sha256"]
    assert {"text", "tokens", "finish", "seconds"} < document["answers"][0].keys()
    assert json.loads(dpo("chat", run, "--json", "--max-new-tokens", 8, cwd=trained, input="question 1\n").stdout)["answers"]
    asked = ("--prompt", "question 1\n", "--max-new-tokens", 8)
    alone = dpo("chat", run, *asked, cwd=trained)
    assert alone.stdout.strip() == document["answers"][0]["text"]
    other = dpo("chat", "config.json", "--adapter", run / "adapter", *asked, cwd=trained)
    assert other.stdout == alone.stdout
    lines = dpo("chat", run, "--max-new-tokens", 8, cwd=trained, input="question 1\n\n/rest\n")
    assert lines.stdout.strip().splitlines()[0] == alone.stdout.strip().splitlines()[0]
    assert "did you mean /reset?" in lines.stderr and lines.returncode == 0


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ([], 2, "no run is given"),
        (["run", "--json"], 2, "the prompt is empty"),
        (["run", "--prompt", " "], 2, "the prompt is empty"),
        (["run", "--out", "a.jsonl"], 2, "--out keeps votes on two answers"),
        (["run", "--side-by-side", "--out", "a.jsonl"], 2, "only a terminal asks"),
        (["run", "max_new_tokens=5"], 2, "--max-new-tokens 5"),
        (["run", "learning_rate=5"], 2, "dpo chat does not accept learning_rate"),
        (["config.json"], 2, "is a file, not a run directory"),
        (["gone"], 3, "is not a finished run"),
        (["run", "--prompt", "a", "--max-new-tokens", "100000"], 2, "leaves no room for a prompt"),
    ],
)
def test_what_cannot_be_done_is_said(trained: Path, words: list[str], code: int, says: str) -> None:
    done = dpo("chat", *words, cwd=trained)
    assert done.returncode == code and says in done.stderr and not done.stdout.replace("{", "").startswith("Traceback")


def test_a_reward_model_does_not_chat(trained: Path) -> None:
    assert dpo("train", "config.json", "strategy=reward", "output_dir=scores", cwd=trained).returncode == 0
    done = dpo("chat", "scores", "--prompt", "a", cwd=trained)
    assert done.returncode == 3 and "holds a reward model" in done.stderr


def test_serve_names_other_programs(trained: Path) -> None:
    done = dpo("serve", "run", "--port", 8000, cwd=trained)
    assert done.returncode == 2
    for line in ("transformers serve", "--lora-modules run=run/adapter", "llama-server -m", "ollama create"):
        assert line in done.stderr


def test_a_votes_file_becomes_pairs(tmp_path: Path) -> None:
    place, out = written(tmp_path, voted("adapter", "base", "tie", None)), tmp_path / "pairs.jsonl"
    done = dpo("vote", "--tally", place, "--pairs", out, "--json")
    assert json.loads(done.stdout)["pairs"] == {"out": str(out), "pairs": 2, "ties": 1, "missing": 1, "empty": 0}
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [tuple(row.values())[:3] for row in rows] == [("question 0", "a", "b"), ("question 1", "b", "a")]
    assert [row["provenance"]["chosen"] for row in rows] == ["adapter", "base"]
    assert rows[0]["provenance"]["source"] == "dpo vote"
    again = dpo("vote", "--tally", place, "--pairs", out)
    assert again.returncode == 2 and "exists already" in again.stderr
    ties = dpo("vote", "--tally", written(tmp_path, voted("tie")), "--pairs", tmp_path / "none.jsonl")
    assert ties.returncode == 0 and "no pair" in ties.stdout and not (tmp_path / "none.jsonl").exists()


def test_what_is_typed() -> None:
    with create_pipe_input() as typed, create_app_session(input=typed):
        entry = TypedEntry()
        typed.send_text("one\x1b\rtwo\r")
        assert entry.text() == "one\ntwo"
        typed.send_text("forget this\x03kept\r")
        assert entry.text() == "kept"
        typed.send_text("\x1b[A\r")
        assert entry.text() == "kept"  # the arrow recalls it
        typed.send_text("x\r=")
        assert entry.key("?", "ab=s") == "="
        typed.send_text("\x03")
        assert entry.key("?", "ab=s") is None
        typed.send_text("\x03")
        assert entry.text() is None
        typed.send_text("\x04")
        assert entry.text() is None


def screen_of(descriptor: int, until: bytes, seconds: float = 60) -> bytes:
    """What a terminal gets, up to these bytes or the end."""
    text, end = b"", time.monotonic() + seconds
    while until not in text and time.monotonic() < end:
        if select.select([descriptor], [], [], 0.1)[0]:
            try:
                text += os.read(descriptor, 1 << 16)
            except OSError:  # the other end is closed
                break
    return text


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    ends = pty.openpty()
    yield ends
    for end in ends:
        os.close(end)


@pytest.mark.long
def test_a_chat_in_a_terminal(trained: Path, terminal: tuple[int, int]) -> None:
    """A question, its answer, and Ctrl-C at an empty prompt, which ends the chat."""
    ours, theirs = terminal
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "60", "NO_COLOR": "1"}
    words = [sys.executable, "-m", "dpo_cli", "chat", "run", "--max-new-tokens", "60", "--temperature", "1"]
    ready = b"\x1b[?2004h"  # prompt_toolkit waits for input
    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    with subprocess.Popen(words, cwd=trained, env=env, start_new_session=True, **streams) as chat:
        said = screen_of(ours, ready)
        assert b"/help lists the commands" in said and b"Traceback" not in said
        os.write(ours, b"question 1\r")
        said = screen_of(ours, b"\x1b[?2004l") + screen_of(ours, ready)
        assert b"Traceback" not in said
        os.write(ours, b"\x03")
        assert chat.wait(60) == 0

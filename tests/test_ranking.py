"""What makes an answer the better one: rules by hand, a tiny reward model, and a judge behind a real HTTP server."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from datetime import date
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHAPE, tiny_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from dpo_cli.config.schema import inner_defaults
from dpo_cli.data.rows import Question
from dpo_cli.errors import RunFailed
from dpo_cli.evaluation.generation import Answer
from dpo_cli.preferences import endpoint as endpoint_module
from dpo_cli.preferences.judge import Judge, verdict
from dpo_cli.preferences.ranking import Ranked, Reward, best_pairs, ranking

DAY = date(2026, 3, 4)
QUESTION = Question("What is the capital of France?", "Paris is the capital.", 1)


def answers(*texts: str, finished: bool = True) -> list[Answer]:
    return [Answer(text, len(text.split()), finished) for text in texts]


def rank(texts: list[str], **options: Any) -> list[float]:
    return ranking({**inner_defaults("augment"), **options}, "cpu", torch.float32, DAY)(QUESTION, answers(*texts))


def test_rules_by_hand() -> None:
    """Tokens here are words. Of the reference's letters, in the order of sorted words, the first answer has all."""
    texts = ["the capital is Paris", "It is Paris", "Rome"]
    assert rank(texts, rank="shorter") == [-4, -3, -1]
    assert rank(texts, rank="longer") == [4, 3, 1]
    assert rank(texts, rank="regex", pattern=r"\bParis\b") == [1, 1, 0]
    assert rank(texts, rank="regex", pattern=r"^(?!.*\bis\b)") == [0, 0, 1]
    overlap = rank([*texts, "Capital! the: PARIS is"], rank="reference")
    assert overlap[0] == overlap[3] == 100 > overlap[1] > overlap[2]


def test_pairs_are_far_apart_and_use_each_answer_seldom() -> None:
    """Scores 4, 3, 1, 0: first 4 over 0, then the two that are left; a third pair has to use one again."""
    made = best_pairs(answers("a", "b", "c", "d"), [3, 0, 4, 1], 3, 0)
    assert made == [Ranked(2, 1, (4, 0)), Ranked(0, 3, (3, 1)), Ranked(0, 1, (3, 0))]
    assert best_pairs(answers("a", "b", "c"), [2, 1, 0], 9, 2) == [Ranked(0, 2, (2, 0))]
    assert best_pairs(answers("a", "b"), [1, 1], 1, 0) == []


def test_an_unfinished_answer_is_never_chosen() -> None:
    mixed = [*answers("whole"), *answers("cut off in the", finished=False)]
    assert best_pairs(mixed, [0, 1], 1, 0) == []
    assert best_pairs(mixed, [1, 0], 1, 0) == [Ranked(0, 1, (1, 0))]


@pytest.fixture
def reward_dir(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny classifier with one label, as reward models are."""
    torch.manual_seed(1)
    model = LlamaForSequenceClassification(LlamaConfig(**SHAPE, num_labels=1))
    model.save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    return tmp_path / "reward"


def test_a_reward_model_scores_the_conversation(reward_dir: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    scores = Reward(str(reward_dir), "cpu", torch.float32, DAY)(QUESTION, answers("Paris", "the cat sat"))
    model = LlamaForSequenceClassification.from_pretrained(reward_dir)
    for text, score in zip(("Paris", "the cat sat"), scores, strict=True):
        said = f"<|im_start|>user\n{QUESTION.prompt}<|im_end|>\n<|im_start|>assistant\n{text}<|im_end|>\n"
        expected = model(**tokenizer(said, return_tensors="pt")).logits
        assert score == pytest.approx(expected.item(), abs=1e-6)
    assert scores[0] != scores[1]


def test_a_reward_model_scores_with_its_adapter(reward_dir: Path, tmp_path: Path) -> None:
    """Also in files that hold the head of the model that it was made of, which it does not use."""
    file = reward_dir / "model.safetensors"
    weights = load_file(file)
    save_file({**weights, "lm_head.weight": torch.zeros(SHAPE["vocab_size"], 4)}, file, metadata={"format": "pt"})
    model = LlamaForSequenceClassification.from_pretrained(reward_dir)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))  # has no task_type
    adapted.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[1, 7, 30, 99]])
    with torch.no_grad():
        right = adapted.eval()(input_ids=ids).logits.item()
        with adapted.disable_adapter():
            assert abs(adapted(input_ids=ids).logits.item() - right) > 1e-3
        reward = Reward(str(tmp_path / "adapter"), "cpu", torch.float32, DAY)
        assert reward.model(input_ids=ids).logits.item() == pytest.approx(right, abs=1e-6)
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "adapter")
    adapted.save_pretrained(tmp_path / "second")
    with pytest.raises(RunFailed, match="on another adapter"):
        Reward(str(tmp_path / "second"), "cpu", torch.float32, DAY)


def test_what_is_no_reward_model_is_refused(reward_dir: Path, tiny_model_dir: Path) -> None:
    """A causal model would get a head of random numbers; weights in pickles could run code."""
    with pytest.raises(RunFailed, match="not a reward model"):
        Reward(str(tiny_model_dir), "cpu", torch.float32, DAY)
    config = json.loads((tiny_model_dir / "config.json").read_text(encoding="utf-8"))
    (reward_dir / "config.json").write_text(json.dumps({**config, "num_labels": 1}), encoding="utf-8")
    tiny_model("llama", torch.float32).save_pretrained(reward_dir)
    with pytest.raises(RunFailed, match="not a reward model"):
        Reward(str(reward_dir), "cpu", torch.float32, DAY)
    torch.save({}, reward_dir / "pytorch_model.bin")
    (reward_dir / "model.safetensors").unlink()
    with pytest.raises(RunFailed, match="cannot load"):
        Reward(str(reward_dir), "cpu", torch.float32, DAY)


Reply = Callable[[str], tuple[int, str]]


class Endpoint:
    """An HTTP server that speaks the API: `reply` makes a status and a text of what the judge was asked."""

    def __init__(self) -> None:
        self.reply: Reply = lambda _: (200, "T")
        self.model = "served/one"
        self.finish: Callable[[dict[str, Any], str], str] = lambda body, text: "stop"
        self.requests: list[tuple[str, str | None, dict[str, Any]]] = []
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.requests.append((self.path, self.headers["Authorization"], body))
                status, text = endpoint.reply(body["messages"][0]["content"])
                choice = {"message": {"role": "assistant", "content": text}, "finish_reason": endpoint.finish(body, text)}
                usage = {"completion_tokens": len(text.split())}
                said = json.dumps({"model": endpoint.model, "choices": [choice], "usage": usage}).encode()
                self.send_response(status)
                self.end_headers()
                self.wfile.write(said if text != "no JSON" else b"<html>")

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setattr(endpoint_module, "PAUSES_SECONDS", (0.0, 0.0))
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    made = Endpoint()
    thread = threading.Thread(target=made.server.serve_forever, args=(0.01,))
    thread.start()
    yield made
    made.server.shutdown()
    thread.join()
    made.server.server_close()


def shown(asked: str) -> tuple[str, str]:
    """The two answers that the judge is asked about, in their order."""
    first, second = asked.split("[Answer A]\n")[1].split("\n[End of answer A]\n\n[Answer B]\n")
    return first, second.split("\n[End of answer B]")[0]


def longer_is_better(asked: str) -> tuple[int, str]:
    one, other = map(len, shown(asked))
    return 200, "A" if one > other else "B" if other > one else "T"


def test_a_judge_sees_both_orders_and_ranks(endpoint: Endpoint) -> None:
    """Three answers, three duels, two orders: six requests. The longest wins both of its duels, the shortest none."""
    endpoint.reply = longer_is_better
    scores = Judge(endpoint.url, "judge-1", "longer")(QUESTION, answers("one", "one two three", "one two"))
    assert scores == [-2, 2, 0]
    asked = [shown(body["messages"][0]["content"]) for _, _, body in endpoint.requests]
    texts = ("one", "one two three", "one two")
    assert sorted(asked) == sorted((a, b) for a in texts for b in texts if a != b)
    path, authorization, body = endpoint.requests[0]
    assert (path, authorization) == ("/v1/chat/completions", "Bearer secret-key")
    assert (body["model"], body["temperature"]) == ("judge-1", 0)
    assert QUESTION.prompt in body["messages"][0]["content"] and "Which is longer?" in body["messages"][0]["content"]


def test_a_judge_that_favours_a_place_decides_nothing(endpoint: Endpoint) -> None:
    endpoint.reply = lambda _: (200, "A")
    assert Judge(endpoint.url, "m", "better")(QUESTION, answers("one", "two")) == [0, 0]


def test_a_busy_judge_is_asked_again_and_a_dead_one_is_told(endpoint: Endpoint) -> None:
    status = iter([503, 429])
    endpoint.reply = lambda asked: (next(status, 200), "A")
    client = Judge(endpoint.url, "m", "better")
    assert client.compare("p", "one", "two") == "A"
    assert len(endpoint.requests) == 3
    endpoint.reply = lambda _: (500, "")
    with pytest.raises(RunFailed, match=r"cannot be reached.*status 500"):
        client.compare("p", "one", "two")
    assert len(endpoint.requests) == 6
    with pytest.raises(RunFailed, match="ConnectError"):
        Judge("http://127.0.0.1:9/v1", "m", "better").compare("p", "one", "two")


@pytest.mark.parametrize(
    ("status", "text", "says"),
    [(401, "", "denies access"), (404, "", "rejects the request"), (200, "no JSON", "does not answer as the OpenAI")],
)
def test_a_judge_that_cannot_be_used_is_told_at_once(endpoint: Endpoint, status: int, text: str, says: str) -> None:
    endpoint.reply = lambda _: (status, text)
    with pytest.raises(RunFailed, match=says) as caught:
        Judge(endpoint.url, "m", "better")(QUESTION, answers("one", "two"))
    assert "secret-key" not in f"{caught.value.message} {caught.value.fix}"


def test_verdicts() -> None:
    said = {"A": "A", " b.\n": "B", "**B**": "B", "Both are right.\n\nAnswer: A": "A", "T": "T"}
    unclear = dict.fromkeys(("A is better than B", "", "maybe", "1"))
    assert {reply: verdict(reply) for reply in (*said, *unclear)} == {**said, **unclear}

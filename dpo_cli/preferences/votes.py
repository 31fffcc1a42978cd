"""Which answer people or a judge prefer: the votes file, the page for voters, and the count. No torch.

A votes file holds every prompt with both answers, so that it can be counted without the run:

{"votes_version": 1, "run": "quickstart", "adapter_sha256": "...", "criterion": "more helpful", "page": "...", "judge": null,
 "votes": [{"prompt": "..." or messages, "adapter": "...", "base": "...", "winner": "adapter", "by": "human"}, ...]}

winner   adapter, base, tie, or null before a vote
by       human, judge, "same text" (a tie without a vote), or null
page     the digest of the page, which changes only with the answers
judge    {"url", "model"} of the judge, null if people vote
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypedDict

import jinja2
import numpy as np
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from dpo_cli.data.messages import Text
from dpo_cli.data.transcripts import as_messages
from dpo_cli.errors import InvalidInput, invalid
from dpo_cli.evaluation.bootstrap import Intervals, mean
from dpo_cli.results.tally import JudgeModel, Tally

VERSION = 1
Side = Literal["adapter", "base"]
Winner = Literal["adapter", "base", "tie"]
POINTS: dict[Winner, float] = {"adapter": 1.0, "tie": 0.5, "base": 0.0}
AS_MADE: tuple[Side, Side] = ("adapter", "base")
TURNED: tuple[Side, Side] = ("base", "adapter")
TEMPLATE = Path(__file__).with_name("side_by_side.html.j2")

_TEXT = {"type": "string"}
_MESSAGE = {"type": "object", "required": ["role", "content"], "properties": {"role": _TEXT, "content": _TEXT}}
_VOTE = {
    "type": "object",
    "required": ["prompt", "adapter", "base", "winner", "by"],
    "properties": {
        "prompt": {"anyOf": [_TEXT, {"type": "array", "minItems": 1, "items": _MESSAGE}]},
        "adapter": _TEXT,
        "base": _TEXT,
        "winner": {"enum": [*POINTS, None]},
        "by": {"enum": ["human", "judge", "same text", None]},
    },
}
_FILE = {
    "type": "object",
    "required": ["votes_version", "run", "adapter_sha256", "criterion", "page", "judge", "votes"],
    "properties": {
        "votes_version": {"const": VERSION},
        **dict.fromkeys(("run", "adapter_sha256", "criterion", "page"), _TEXT),
        "judge": {"type": ["object", "null"], "required": ["url", "model"], "properties": {"url": _TEXT, "model": _TEXT}},
        "votes": {"type": "array", "minItems": 1, "items": _VOTE},
    },
}
REMEDY = "name the votes.json that a side-by-side page saved, or a judge wrote"


class Named(TypedDict):
    """The judge of a votes file."""

    url: str
    model: str


class Vote(TypedDict):
    """A prompt, both answers to it, and which is better."""

    prompt: Text
    adapter: str
    base: str
    winner: Winner | None
    by: str | None


class Origin(TypedDict):
    """Which run is compared, and by which criterion."""

    run: str
    adapter_sha256: str
    criterion: str


class Document(Origin):
    """A votes file."""

    votes_version: int
    page: str
    judge: Named | None
    votes: list[Vote]


def unvoted(origin: Origin, answers: Sequence[tuple[Text, str, str]], seed: int) -> Document:
    """A votes file without votes; `answers` are a prompt, the adapter's answer and the base's."""
    votes: list[Vote] = []
    for prompt, adapter, base in answers:
        is_same = adapter == base
        winner: Winner | None = "tie" if is_same else None
        by = "same text" if is_same else None
        votes.append({"prompt": prompt, "adapter": adapter, "base": base, "winner": winner, "by": by})
    digest = hashlib.sha256(json.dumps([dict(origin), votes, seed]).encode()).hexdigest()
    return {"votes_version": VERSION, **origin, "page": digest, "judge": None, "votes": votes}


def page(document: Document, seed: int) -> str:
    """The page for voters of a file without votes, in random order; each side is first as often as second.

    The page holds which answer belongs to which side, since its votes file needs that; it is encoded, so that the source of the
    page does not show it.
    """
    sealed = base64.b64encode(json.dumps(document).encode()).decode()
    # In JSON, only a < can end the script element around it; json escapes everything beyond ASCII.
    data = json.dumps({"sealed": sealed, "cases": _cases(document["votes"], seed)}).replace("<", "\\u003c")
    template = jinja2.Template(TEMPLATE.read_text(encoding="utf-8"), autoescape=True, undefined=jinja2.StrictUndefined)
    same = sum(vote["by"] == "same text" for vote in document["votes"])
    html: str = template.render(run=document["run"], criterion=document["criterion"], same=same, data=data)
    return html


def _cases(votes: Sequence[Vote], seed: int) -> list[dict[str, object]]:
    """The cases to vote on: the place of each open vote, its prompt as messages, and its answers in the order of the page."""
    draw = random.Random(seed)
    places = [place for place, vote in enumerate(votes) if vote["winner"] is None]
    orders = [AS_MADE if i % 2 else TURNED for i in range(len(places))]
    draw.shuffle(places)
    draw.shuffle(orders)
    return [
        {"place": place, "prompt": _shown(votes[place]["prompt"]), "answers": [votes[place][side] for side in order]}
        for place, order in zip(places, orders, strict=True)
    ]


def _shown(prompt: Text) -> list[dict[str, str]]:
    """A prompt as messages of plain text: tool calls are shown as JSON."""
    return [
        {"role": message["role"], "text": "\n".join([message["content"], *map(json.dumps, message.get("tool_calls") or ())])}
        for message in as_messages(prompt, "user")
    ]


def read(path: Path) -> Document:
    """A votes file; `InvalidInput` with the reason for any other file."""
    try:
        document: Document = json.loads(path.read_bytes())
    except OSError as error:
        raise _invalid("votes-unreadable", f"cannot be read: {error.strerror}", path) from error
    except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, or brackets without end
        raise _invalid("votes-unreadable", f"not JSON, or damaged: {error}", path) from error
    if (wrong := best_match(Draft202012Validator(_FILE).iter_errors(document))) is not None:
        place = f"{wrong.json_path.removeprefix('$').removeprefix('.')}: " if wrong.path else ""
        raise _invalid("not-votes", f"not a votes file: {place}{wrong.message[:200]}", path)
    return document


def _invalid(code: str, message: str, path: Path, fix: str = REMEDY) -> InvalidInput:
    return invalid(code, message, fix, file=str(path))


def count(path: Path) -> Tally:
    """The count of a file with at least one vote."""
    document = read(path)
    if all(vote["winner"] is None for vote in document["votes"]):
        raise _invalid("no-votes", "there are no votes yet", path, "vote on side-by-side.html, and save votes.json again")
    return tally(document)


def tally(document: Document) -> Tally:
    """The adapter's wins, losses and ties, its win rate over the votes (a tie counts one half), and the sign test."""
    counted = [(vote, winner) for vote in document["votes"] if (winner := vote["winner"]) is not None]
    winners, voters = Counter(winner for _, winner in counted), Counter(vote["by"] for vote, _ in counted)
    wins, losses = winners["adapter"], winners["base"]
    points = np.array([POINTS[winner] for _, winner in counted])
    judge = document["judge"]
    return Tally(
        run=document["run"],
        adapter_sha256=document["adapter_sha256"],
        criterion=document["criterion"],
        judge=JudgeModel(judge["url"], judge["model"]) if judge else None,
        prompts=len(document["votes"]),
        missing=len(document["votes"]) - len(counted),
        same_text=voters["same text"],
        wins=wins,
        losses=losses,
        ties=winners["tie"],
        win_rate=Intervals([json.dumps(vote["prompt"]) for vote, _ in counted]).of(mean(points)),
        sign_test=sign_test(wins, losses),
    )


def sign_test(wins: int, losses: int) -> float:
    """The two-sided p-value of this split if both sides are equally likely, without ties; exact, by the binomial distribution.

    Dixon and Mood, The Statistical Sign Test, Journal of the American Statistical Association 41 (1946).
    """
    decided = wins + losses
    tail = sum(math.comb(decided, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / (1 << decided))

"""The answers of a run and of its base, shown to people as a page, or to a judge."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from dpo_cli.config.ranking_rules import RANK_PARTS, rank_problems
from dpo_cli.config.schema import inner_defaults
from dpo_cli.data.encoded import Encoded
from dpo_cli.data.messages import flat
from dpo_cli.errors import InvalidInput, RunFailed, invalid
from dpo_cli.evaluation.generation import Sample, first_of_each_prompt
from dpo_cli.plan.plan import Plan
from dpo_cli.preferences import votes
from dpo_cli.preferences.endpoint import AT_ONCE
from dpo_cli.preferences.judge import Judge
from dpo_cli.results.tally import SideBySide
from dpo_cli.storage.progress import working
from dpo_cli.storage.redaction import redacted
from dpo_cli.storage.run_directory import PAGE, SUMMARY, VOTES, RunDirectory
from dpo_cli.ui.console import Console

JUDGE_FIX = (
    """add 'augment={"judge_url": "http://localhost:8000/v1", "judge_model": "..."}' to the command; """
    "the environment variable OPENAI_API_KEY can hold a key"
)
WINNERS: dict[float, votes.Winner] = {1.0: "adapter", -1.0: "base", 0.0: "tie"}


def contest_of(prompts: int, by_judge: bool, run: RunDirectory, plan: Plan, rows: Sequence[Encoded]) -> Contest:
    """The contest of `dpo vote RUN_DIR` over this many prompts; checked before any model is loaded."""
    if not first_of_each_prompt(rows, 1):
        message, fix = "there is no prompt to answer", "name a file with prompts: --dataset"
        raise invalid("nothing-to-compare", message, fix)
    parts = {name: value for name, value in plan.config.augment.items() if name in RANK_PARTS["judge"]}
    options = {**inner_defaults("augment"), **parts}
    if not by_judge:
        return Contest(run, plan.config.seed, prompts, str(options["criterion"]), None)
    if wrong := [*rank_problems({**options, "rank": "judge"}, parts, "augment")]:
        raise InvalidInput([replace(problem, fix=JUDGE_FIX) for problem in wrong])
    _require_no_human_votes(run)
    judge = Judge(options["judge_url"], options["judge_model"], options["criterion"])
    return Contest(run, plan.config.seed, prompts, judge.criterion, judge)


def _require_no_human_votes(run: RunDirectory) -> None:
    """`InvalidInput` if a judge's votes would replace those of people."""
    place = run.path / VOTES
    if place.exists() and votes.read(place)["judge"] is None:
        message = "votes of people are in this file, and the judge's votes would replace them"
        raise invalid("votes-of-people", message, "rename the file", file=str(place))


@dataclass(frozen=True)
class Contest:
    """A run, the criterion for its answers, and the judge, if there is one."""

    run: RunDirectory
    seed: int
    prompts: int
    criterion: str
    judge: Judge | None

    def hold(self, samples: Sequence[Sample], console: Console) -> SideBySide:
        """Write the page and the votes of the judge."""
        answers = [
            (sample.prompt, sample.adapter.text, sample.base.text)
            for sample in samples[: self.prompts]
            if not sample.is_missing
        ]
        sha256 = self.run.read_json(SUMMARY)["adapter_sha256"]
        origin: votes.Origin = {"run": self.run.path.resolve().name, "adapter_sha256": sha256, "criterion": self.criterion}
        document = votes.unvoted(origin, redacted(answers), self.seed)  # before encoding, which hides secrets
        self.run.write_text(PAGE, votes.page(document, self.seed))
        page = str(self.run.path / PAGE)
        fewer = f" (all there are; {self.prompts} were requested)" if len(answers) < self.prompts else ""
        console.line(f"side by side: {len(answers)} prompts{fewer}; open {page} in a browser")
        if self.judge is None:
            return SideBySide(page, len(answers))
        self._judged(document, self.judge, console)
        counted = votes.tally(document)
        console.tally(counted)
        return SideBySide(page, len(answers), str(self.run.path / VOTES), counted)

    def _judged(self, document: votes.Document, judge: Judge, console: Console) -> None:
        """The judge's votes, with those of an earlier, unfinished call. They are always written, so that none is paid twice."""
        document["judge"] = {"url": judge.endpoint.url, "model": judge.model}
        place = self.run.path / VOTES
        before = votes.read(place) if place.exists() else document
        if (before["page"], before["judge"]) == (document["page"], document["judge"]):
            document["votes"] = before["votes"]
        open_votes = [vote for vote in document["votes"] if vote["winner"] is None]

        def ask(vote: votes.Vote) -> None:
            won = judge.better(flat(vote["prompt"]), vote["adapter"], vote["base"])
            if won is not None:  # else there is no vote: the same command asks again
                vote["winner"], vote["by"] = WINNERS[won], "judge"

        try:
            with working("asking the judge", len(open_votes), "prompts") as work, ThreadPoolExecutor(AT_ONCE) as pool:
                for _ in pool.map(ask, open_votes):
                    work.add()
        finally:
            self.run.write_json(VOTES, document)
        if open_votes and (silent := sum(vote["winner"] is None for vote in open_votes)):
            message = f"{silent} of {len(open_votes)} prompts have no verdict from the judge: its replies are not A, B or T"
            if silent == len(open_votes):
                raise RunFailed(message, "ask a model that follows instructions, or another criterion")
            console.line(f"note: {message}")

"""The runs of a comparison on its held-out pairs: each is evaluated once, like `dpo eval CONFIG --adapter DIR`, and kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_cli.commands.session import composer_for
from dpo_cli.config.config import load
from dpo_cli.config.ranking_rules import RANK_PARTS
from dpo_cli.data.rows import Question
from dpo_cli.evaluation.bootstrap import mean
from dpo_cli.evaluation.pooling import Rows
from dpo_cli.models.source import ModelSource
from dpo_cli.preferences import votes
from dpo_cli.results.codec import JsonObject, from_json, to_json
from dpo_cli.results.methods_compared import ScoredRun
from dpo_cli.runs.kept_evaluation import basis_of, digest_of
from dpo_cli.storage.atomic import write_whole
from dpo_cli.storage.digests import sha256_of_settings
from dpo_cli.storage.jsonio import json_text, read_json
from dpo_cli.storage.log import Tell, log_to
from dpo_cli.storage.redaction import redacted
from dpo_cli.storage.run_directory import PAGE, SUMMARY, VOTES, RunDirectory
from dpo_cli.ui.console import Console

if TYPE_CHECKING:
    from dpo_cli.evaluation.evaluation import Measured
    from dpo_cli.evaluation.generation import Sample
    from dpo_cli.plan.plan import Plan
    from dpo_cli.preferences.ranking import Reward
    from dpo_cli.runs.open_run import Opened


@dataclass(frozen=True)
class Scorer:
    """Evaluates runs by the config `held_out`, and keeps a file of each in the folder `kept_in`."""

    held_out: Path
    kept_in: Path
    parts: Mapping[str, Any]  # of the option `compare`
    console: Console

    @cached_property
    def basis(self) -> JsonObject:
        """What decides the figures, apart from the run."""
        return basis_of(load(str(self.held_out)).require().to_json())

    def scored(self, run: RunDirectory) -> ScoredRun:
        """The scores of a finished run, from its file if nothing has changed."""
        RunDirectory.open(run.path)
        digest = self._digest(run)
        names = run.path.relative_to(self.held_out.parent).parts  # of a run, or of its last stage
        file = self.kept_in / f"{'-'.join(names)}.json"
        if (known := _known(file, digest)) is not None and not (self.parts["side_by_side"] and not run.has(PAGE)):
            return known
        self.console.line(f"evaluating {run.path}")
        made = self._computed(run, digest)
        self.kept_in.mkdir(exist_ok=True)
        text = json_text(redacted(to_json(made)))
        write_whole(file, lambda part: part.write_text(text + "\n", encoding="utf-8"))
        return made

    def _digest(self, run: RunDirectory) -> str:
        judge = self.parts["judge_reward_model"]
        return digest_of(
            {
                "trained": [run.read_json(SUMMARY)["adapter_sha256"], sha256_of_settings(run.trained)],
                "config": read_json(self.held_out),
                "judge": ModelSource.of(judge).state if judge else None,
                "side_by_side": self.parts["side_by_side"],
                **self.basis,
            }
        )

    def _computed(self, run: RunDirectory, digest: str) -> ScoredRun:
        composer_for()
        from dpo_cli.commands.eval import measured_on
        from dpo_cli.providers.out_of_memory import free_memory
        from dpo_cli.runs.open_run import open_trained

        opened = open_trained(str(self.held_out), run, self.console)
        with log_to(run.log):
            plan, samples, measured = measured_on(opened, self.console, self.parts["side_by_side"])
            free_memory()
            assert measured is not None  # the budget is refused where nothing is held out
            wins = self._wins(opened, plan, samples)
            self._hold_contest(run, opened, plan, samples)
        return _as_scored(opened, samples, measured, wins, digest)

    def _wins(self, opened: Opened, plan: Plan, samples: Sequence[Sample]) -> list[float]:
        """1 where the reward model scores the answer higher than the base's, a half for the same score, else 0."""
        if self.parts["judge_reward_model"] is None:
            return []
        from dpo_cli.evaluation.generation import first_of_each_prompt

        reward = self._reward(plan)
        rows = [row.row for row in first_of_each_prompt(opened.rows, len(samples))]
        wins = []
        for row, sample in zip(rows, samples, strict=True):
            if not sample.is_missing:
                asked = Question(sample.prompt, None, row.line, row.file, row.tools)
                base, own = reward(asked, [sample.base, sample.adapter])
                wins.append(float(np.sign(own - base)) / 2 + 0.5)
        return wins

    def _reward(self, plan: Plan) -> Reward:
        import torch

        from dpo_cli.preferences.ranking import Reward

        return Reward(self.parts["judge_reward_model"], plan.config.device, getattr(torch, plan.dtype), plan.day)

    def _hold_contest(self, run: RunDirectory, opened: Opened, plan: Plan, samples: Sequence[Sample]) -> None:
        """The page for voters, and the votes of the judge if the config names one and people have not voted."""
        if not (count := self.parts["side_by_side"]):
            return
        from dpo_cli.preferences.side_by_side import contest_of

        names_judge = all(plan.config.augment.get(name) for name in RANK_PARTS["judge"][:2])
        by_people = run.has(VOTES) and votes.read(run.path / VOTES)["judge"] is None
        contest_of(count, names_judge and not by_people, run, plan, opened.rows).hold(samples, self.console)


def _known(file: Path, digest: str) -> ScoredRun | None:
    try:
        known = from_json(ScoredRun, read_json(file))
    except (OSError, ValueError):  # missing, or damaged: computed again
        return None
    return known if known.digest == digest else None


def _as_scored(opened: Opened, samples: Sequence[Sample], measured: Measured, wins: list[float], digest: str) -> ScoredRun:
    from dpo_cli.evaluation.evaluation import prompt_digests

    scores, shown = measured.log_probs, [sample for sample in samples if not sample.is_missing]
    return ScoredRun(
        digest=digest,
        prompts=prompt_digests(opened.rows),
        policy=scores.policy.tolist(),
        reference=scores.reference.tolist(),
        tokens=scores.tokens.tolist(),
        kl=scores.kl.tolist(),
        kl_sequence=measured.kl.tolist(),
        answer_tokens=[float(sample.adapter.tokens) for sample in shown],
        base_answer_tokens=[float(sample.base.tokens) for sample in shown],
        wins=wins,
        samples=[sample.texts for sample in shown[:3]],
    )


def votes_of(run: RunDirectory, tell: Tell) -> dict[str, Rows]:
    """The votes on a run's answers, of its votes.json; none if they are about another adapter."""
    if not run.has(VOTES):
        return {}
    document = votes.read(run.path / VOTES)
    if document["adapter_sha256"] != run.read_json(SUMMARY)["adapter_sha256"]:
        tell(f"note: {run.path / VOTES} is about another adapter, and is not counted")
        return {}
    counted = [(vote["prompt"], winner) for vote in document["votes"] if (winner := vote["winner"]) is not None]
    if not counted:
        return {}
    points = np.array([votes.POINTS[winner] for _, winner in counted])
    return {"vote_rate": (mean(points), [json_text(prompt) for prompt, _ in counted])}

"""What is asked of `dpo eval`, and what of it goes together. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from dpo_cli.errors import UsageError
from dpo_cli.evaluation.thresholds import METRICS, OF_VOTES, Threshold, parse

# The options that say how a run is judged, and not how it was trained.
JUDGING = frozenset({"augment", "kl_prompts", "max_new_tokens", "per_device_eval_batch_size", "device", "bf16", "fp16"})


@dataclass(frozen=True)
class Request:
    """A run to judge; with an `adapter`, a config whose model it is put on; or a file of votes to count.

    Raises `UsageError` for what does not go together.
    """

    target: str = ""
    adapter: Path | None = None
    dataset: str | None = None
    overrides: tuple[str, ...] = ()
    fail_under: str | None = None
    side_by_side: int | None = None
    by_judge: bool = False
    tally: Path | None = None
    thresholds: list[Threshold] = field(init=False)

    def __post_init__(self) -> None:
        known = METRICS if self.tally is None else OF_VOTES
        object.__setattr__(self, "thresholds", parse(self.fail_under, known) if self.fail_under is not None else [])
        if self.tally is not None:
            if self.target or self.adapter or self.dataset or self.side_by_side or self.by_judge:
                raise UsageError("--tally counts a file by itself", f"dpo eval --tally {self.tally}")
            return
        if not self.target:
            raise UsageError("no run is named", "dpo eval RUN_DIR, or dpo eval --tally votes.json")
        if self.by_judge and not self.side_by_side:
            raise UsageError("--judge fills the votes of --side-by-side", f"dpo eval {self.target} --side-by-side 20 --judge")
        if self.adapter is not None:
            if self.side_by_side:
                raise UsageError("--side-by-side writes into the directory of a run", "dpo eval RUN_DIR --side-by-side 20")
            return
        if Path(self.target).is_file():
            fix = f"dpo eval {self.target} --adapter DIR, or dpo eval RUN_DIR"
            raise UsageError(f"{self.target} is a file: a run is judged, or an adapter on a config's model", fix)
        for key in (word.partition("=")[0] for word in self.overrides):
            if key not in JUDGING:
                fix = f"only {', '.join(sorted(JUDGING))} may differ; another model or dataset: --adapter, --dataset"
                raise UsageError(f"dpo eval takes no {key}=...: a run is judged as it was trained", fix)

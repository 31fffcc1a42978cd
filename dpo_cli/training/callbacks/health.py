"""Is the training healthy? Rules over the lines of metrics.jsonl, each with what the documentation says to do.

Each rule is one function that looks at a line and returns an event or nothing; `RULES` at the end lists them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from transformers import TrainerCallback

Line = dict[str, Any]


@dataclass(frozen=True)
class Event:
    """What a rule found: shown, kept in metrics.json, and with the action "stop" the end of the training (exit 5)."""

    rule: str
    action: Literal["note", "warn", "stop"]
    step: int
    message: str
    remedy: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


Rule = Callable[[Line], Event | None]


def not_finite(line: Line) -> Event | None:
    """A loss or gradient that is NaN or infinite never recovers: AdamW's moments keep it."""
    broken = [name for name in ("loss", "grad_norm") if not math.isfinite(line.get(name, 0.0))]
    if not broken:
        return None
    message = f"{' and '.join(broken)} of step {line['step']} are not finite"
    remedy = "lower learning_rate (the documentation says: try 1e-7) or lora_alpha; with fp16, use bf16"
    return Event("not-finite", "stop", line["step"], message, remedy)


RULES: Sequence[Rule] = (not_finite,)


class Health(TrainerCallback):
    """Puts every line to every rule. A sink of `Record`, and a callback behind it that ends the training."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.tell = tell
        self.events: list[Event] = []

    @property
    def stopped(self) -> bool:
        return any(event.action == "stop" for event in self.events)

    def see(self, line: Line) -> None:
        for event in filter(None, (rule(line) for rule in RULES)):
            self.events.append(event)
            self.tell(f"{event.action} [{event.rule}] {event.message}\n  {event.remedy}")

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.stopped:
            control.should_training_stop = True
            control.should_evaluate = False

"""Two figures of a comparison as text."""

from __future__ import annotations

from typing import Literal

MOST_DIGITS = 17  # figures of less than 1e-17 read the same


def compared(one: float, other: float, digits: int = 1, kind: Literal["f", "g"] = "f") -> tuple[str, str]:
    """Both as text, with more than `digits` digits if they would read the same: "1.04" and "1.00", not "1.0" and "1.0"."""
    texts = f"{one:.{digits}{kind}}", f"{other:.{digits}{kind}}"
    if texts[0] == texts[1] and one != other and digits < MOST_DIGITS:
        return compared(one, other, digits + 1, kind)
    return texts

"""JSON as dpo writes it, and JSON files of dpo or of a model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any


def json_text(value: object, indent: int | None = None) -> str:
    """JSON that every reader accepts: NaN and infinity, which JSON does not have, become null."""

    def finite(part: object) -> object:
        if isinstance(part, dict):
            return {key: finite(inner) for key, inner in part.items()}
        if isinstance(part, list | tuple):
            return [finite(inner) for inner in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(finite(value), indent=indent, ensure_ascii=False, allow_nan=False)


def read_json(file: Path | Traversable) -> Any:
    """The value in a file; `ValueError` with its name if it is not JSON, `OSError` if it cannot be read."""
    return _parsed(file.name, lambda: file.read_text(encoding="utf-8"))


def _parsed(name: str, text: Callable[[], str]) -> Any:
    try:
        return json.loads(text())
    except ValueError as error:
        raise ValueError(f"{name} is not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{name} is not JSON that can be read: it is nested too deeply") from error


def read_object(file: Path) -> dict[str, Any]:
    """The object in a file of a model; `ValueError` also for another value."""
    value = read_json(file)
    if not isinstance(value, dict):
        raise ValueError(f"{file.name} is not an object")
    return value


def read_object_if_there(file: Path) -> dict[str, Any]:
    """The same, {} without the file."""
    return read_object(file) if file.is_file() else {}

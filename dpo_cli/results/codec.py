"""Results as JSON and back: the fields of a dataclass are its keys; null stands for a number that is not finite.

A class with another JSON shape has the methods `to_json` and `of_json`.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from cattrs import Converter

T = TypeVar("T")
JsonObject = dict[str, object]
MISSING = "required field missing"  # the message of cattrs


@functools.cache
def _converter() -> Converter:
    """Imported late: cattrs takes 40 ms, and `validate` does not need it."""
    from cattrs import Converter
    from cattrs.strategies import use_class_methods

    converter = Converter()
    converter.register_structure_hook(float, lambda value, _: _number(value))
    converter.register_structure_hook(int, lambda value, _: _of_type(value, int))
    converter.register_structure_hook(str, lambda value, _: _of_type(value, str))
    use_class_methods(converter, unstructure_method_name="to_json")
    return converter


def object_of(value: object, *keys: str) -> JsonObject:
    """A JSON value that is an object with these keys; `ValueError` that names what it does not have."""
    if not isinstance(value, dict):
        raise ValueError("it is not an object")
    if missing := [key for key in keys if key not in value]:
        raise ValueError(f"it has no {' and no '.join(missing)}")
    return value


def list_of(value: object, name: str) -> list[object]:
    """A JSON value that is a list; `ValueError` with its name where it is another one."""
    if not isinstance(value, list):
        raise ValueError(f"{name} is not a list")
    return value


def _of_type(value: object, kind: type[T]) -> T:
    """A value that is not converted: 1.5 is not a step, and null is not a text."""
    if isinstance(value, bool) or not isinstance(value, kind):
        raise ValueError(f"it is not {'a whole number' if kind is int else 'a text'}")
    return value


def _number(value: object) -> float:
    """A JSON number: integers stay integers."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("it is not a number")
    return value


def to_json(result: object) -> JsonObject:
    """The JSON of a result; numbers that are not finite are written as null (storage/jsonio.py)."""
    value: JsonObject = _converter().unstructure(result)
    return value


def from_json(kind: type[T], value: object) -> T:
    """The result in a JSON value; `ValueError` with each key that is missing or has another type."""
    from cattrs import BaseValidationError, transform_error

    try:
        return _converter().structure(value, kind)
    except BaseValidationError as error:
        faults = [message.partition(" @ ") for message in transform_error(error, path="")]
        missing = [path.lstrip(".") for what, _, path in faults if what == MISSING]
        others = [f"{path.lstrip('.')}: {what}" for what, _, path in faults if what != MISSING]
        raise ValueError("; ".join([f"it has no {' and no '.join(missing)}"] * bool(missing) + others)) from error

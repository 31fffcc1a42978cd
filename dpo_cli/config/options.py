"""`Config`, made from schema.json: a frozen dataclass with a field for each option, in the order of the schema.

Type checkers read options.pyi instead. `make reference` writes it from the same schema, and a test compares the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, make_dataclass, replace
from typing import TYPE_CHECKING

from dpo_cli.config.schema import options

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def _to_json(self: DataclassInstance) -> dict[str, object]:
    return {field.name: getattr(self, field.name) for field in fields(self)}


def _replaced(self: DataclassInstance, values: Mapping[str, object]) -> object:
    return replace(self, **values)


METHODS = {"to_json": _to_json, "replaced": _replaced}
Config = make_dataclass("Config", list(options()), frozen=True, namespace={**METHODS, "__module__": __name__})

"""Writes what is made from the schema: dpo_cli/config/options.pyi, and the reference in README.md; `--check` compares."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from dpo_cli.config.schema import Option, options

ROOT = Path(__file__).parent.parent
STUB = ROOT / "dpo_cli" / "config" / "options.pyi"
README = ROOT / "README.md"


def annotation(option: Option) -> str:
    """The Python type of an option's values."""
    rule = option.rule
    if "enum" in rule:
        words = [repr(choice) for choice in rule["enum"] if choice is not None]
        return f"Literal[{', '.join(words)}]" + (" | None" if None in rule["enum"] else "")
    names = {"integer": "int", "number": "float", "string": "str", "boolean": "bool", "array": "list[Any]", "null": "None"}
    types = [rule["type"]] if isinstance(rule["type"], str) else rule["type"]
    return " | ".join({**names, "object": "dict[str, Any]"}[name] for name in types)


def stub() -> str:
    fields = "\n".join(f"    {name}: {annotation(option)}" for name, option in options().items())
    return f"""# Written by `make reference` from schema.json.
from dataclasses import dataclass
from typing import Any, Literal

@dataclass(frozen=True)
class Config:
{fields}

    def to_json(self) -> dict[str, Any]: ...
"""


def option_table() -> str:
    """Markdown: a table for each group of options."""
    return "\n\n".join(
        f"**{group}**\n\n" + "\n".join(_rows(group)) for group in dict.fromkeys(o.group for o in options().values())
    )


def _rows(group: str) -> Iterator[str]:
    yield "| option | value | default | meaning | strategies | source |"
    yield "|---|---|---|---|---|---|"
    for option in options().values():
        if option.group == group:
            cells = (
                f"`{option.name}`",
                option.type_words,
                option.default_words,
                option.description + (f" *({option.not_yet_words})*" if option.not_yet_words else ""),
            )
            yield f"| {' | '.join((*cells, ', '.join(option.strategies), option.source))} |".replace("^", "").replace("$ ", " ")


def in_readme(text: str, section: str, content: str) -> str:
    """`text` with `content` between the marks of a section."""
    begin, end = f"<!-- {section}: written by `make reference` -->", f"<!-- end of {section} -->"
    assert begin in text and end in text, f"README.md has lost the marks of {section}"
    return re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: f"{begin}\n{content}\n{end}", text, flags=re.DOTALL)


def written() -> dict[Path, str]:
    """Each file that is made from the schema, with the text it should have."""
    return {STUB: stub(), README: in_readme(README.read_text(encoding="utf-8"), "options", option_table())}


def main() -> int:
    stale = {path: text for path, text in written().items() if not path.exists() or path.read_text(encoding="utf-8") != text}
    for path, text in stale.items():
        if "--check" not in sys.argv:
            path.write_text(text, encoding="utf-8")
        print(f"{'stale' if '--check' in sys.argv else 'wrote'}: {path.relative_to(ROOT)}")
    return int(bool(stale) and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())

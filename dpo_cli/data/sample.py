"""A sample of the rows as the model sees them: what only a training would find out, before torch is imported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dpo_cli.data.formats import Row
from dpo_cli.data.tokenizer import CONFIG, Tokenizer
from dpo_cli.data.tokens import encode_all
from dpo_cli.errors import InvalidInput, Problem
from dpo_cli.hardware.adapters import adapter_at, foundation


class Sample:
    """Keeps up to `most` rows, spread over all; an observer of a pass (data/reader.py). It needs the model's own files."""

    def __init__(self, model_name: str, most: int) -> None:
        self.rows: list[Row] = []
        self.tokenizer, self.token_rows = _files_of(model_name) if most else (None, None)
        self._most, self._seen, self._stride = most, 0, 1

    def see(self, row: Row, prompt_key: str) -> None:
        if self.tokenizer is None:
            return
        if self._seen % self._stride == 0:
            self.rows.append(row)
            if len(self.rows) > self._most:  # a file may start with rows of one kind, so the sample goes on to its end
                self.rows = self.rows[::2]
                self._stride *= 2
        self._seen += 1

    @property
    def is_chat(self) -> bool:
        """Whether the tokenizer has a chat template, or is not known."""
        return self.tokenizer is None or self.tokenizer.template is not None

    def problems(self, use_chat_template: bool | str, skip: bool) -> tuple[Problem, ...]:
        """What is wrong with the rows of the sample once they are rendered and tokenised."""
        if self.tokenizer is None or not self.rows:
            return ()
        try:
            return encode_all([self.rows], self.tokenizer, use_chat_template, token_rows=self.token_rows, skip=skip).problems
        except InvalidInput as error:  # of the template as a whole
            return error.problems


def _files_of(model_name: str) -> tuple[Tokenizer | None, int | None]:
    """The tokenizer of a model's folder, an adapter's own first, and the rows of the model's embedding."""
    folder = Path(foundation(model_name))
    try:
        adapter = adapter_at(model_name)
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no folder of a model; what is wrong with it is a problem of model_name
        return None, None
    own = adapter.directory if adapter and (adapter.directory / CONFIG).is_file() else folder
    rows = (config.get("text_config") or config).get("vocab_size")
    return Tokenizer.in_folder(own), rows if isinstance(rows, int) else None

"""A sample of the rows as the model sees them: problems that a training would find, before torch is imported."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpo_cli.data.rows import Row
from dpo_cli.errors import InvalidInput, Problem

if TYPE_CHECKING:
    from dpo_cli.data.tokenizer import Tokenizer


class Sample:
    """Keeps up to `most` rows, spread over all; an observer of a pass (data/dataset.py). Without a tokenizer it keeps none."""

    def __init__(self, tokenizer: Tokenizer | None, token_rows: int | None, most: int) -> None:
        self.rows: list[Row] = []
        self.tokenizer, self.token_rows = tokenizer, token_rows
        self._most, self._seen, self._stride = most, 0, 1

    def see(self, row: Row, prompt_key: str) -> None:
        if self.tokenizer is None or not self._most:
            return
        if self._seen % self._stride == 0:
            self.rows.append(row)
            if len(self.rows) > self._most:  # a file may start with rows of one kind, so the sample covers it to its end
                self.rows = self.rows[::2]
                self._stride *= 2
        self._seen += 1

    @property
    def is_chat(self) -> bool:
        """Whether the tokenizer has a chat template, or is not known."""
        return self.tokenizer is None or self.tokenizer.template is not None

    def problems(self, use_chat_template: bool | str, skip: bool) -> tuple[Problem, ...]:
        """The problems of the sample when it is rendered and tokenised."""
        if self.tokenizer is None or not self.rows:
            return ()
        from dpo_cli.data.tokens import encode_all  # imports Jinja, which a config without a local model does not need

        try:
            return encode_all([self.rows], self.tokenizer, use_chat_template, token_rows=self.token_rows, skip=skip).problems
        except InvalidInput as error:  # about the whole template
            return error.problems

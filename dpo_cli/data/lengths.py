"""Lengths of pairs: in characters, and in tokens if the model's tokenizer is a local file. An observer of a pass."""

from __future__ import annotations

from array import array
from statistics import median
from typing import TYPE_CHECKING

from dpo_cli.data.messages import Text
from dpo_cli.data.rows import Row

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BYTES_A_TOKEN = 2  # minimum of UTF-8 in nearly all text: English has about 4, Chinese 3, code 2 to 3; only digits have 1
TEMPLATE_TOKENS, TURN_TOKENS = 64, 8  # markers of a chat template around a pair, and around each message
SAMPLE = 500  # minimum number of pairs, spread over all, whose tokens are counted; the others are estimated by their characters


class Lengths:
    """Lengths of prompt and longer response, as `max_seq_length` counts them, but without a template's markers."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.characters = array("q")
        self.longest: Row | None = None
        self._most = self._most_bytes = self._most_turns = self._bytes = 0
        self._tokenizer = tokenizer
        self._sampled: list[tuple[int, int]] = []  # characters and tokens of every `_stride`th pair
        self._stride = 1

    def see(self, row: Row, prompt_key: str) -> None:
        texts = [_shown(row.prompt), max(map(_shown, row.responses), key=len), *map(str, row.tools)]
        size = sum(map(len, texts))
        self.characters.append(size)
        is_ascii = all(map(str.isascii, texts))
        size_in_bytes = size if is_ascii else sum(len(text.encode()) for text in texts)
        self._bytes += size_in_bytes
        self._most_bytes = max(self._most_bytes, size_in_bytes)
        if isinstance(row.prompt, list):
            self._most_turns = max(self._most_turns, len(row.prompt))
        if size > self._most:
            self._most, self.longest = size, row
        if self._tokenizer is not None and (len(self.characters) - 1) % self._stride == 0:
            tokens = sum(len(self._tokenizer.encode(text, add_special_tokens=False).ids) for text in texts)
            self._sampled.append((size, tokens))
            if len(self._sampled) == 2 * SAMPLE:  # a file may start with short pairs, so the sample covers it to its end
                self._sampled = self._sampled[::2]
                self._stride *= 2

    @property
    def most_tokens(self) -> int | None:
        """A number of tokens that very probably covers the longest sequence; None without pairs."""
        if self.longest is None:
            return None
        template = TEMPLATE_TOKENS + TURN_TOKENS * self._most_turns
        if not self._sampled:
            return self._most_bytes // BYTES_A_TOKEN + template
        densest = max(tokens / max(1, size) for size, tokens in self._sampled)
        return round(self._most * densest) + template

    @property
    def _rate(self) -> float:
        """Tokens per character: of the sample, or without a sample by four bytes of UTF-8 per token."""
        if not self._sampled:
            return self._bytes / 4 / max(1, sum(self.characters))
        return sum(tokens for _, tokens in self._sampled) / max(1, sum(size for size, _ in self._sampled))

    def share_over(self, max_length: int) -> float:
        """The estimated share of pairs longer than `max_length` tokens."""
        rate = self._rate
        return sum(size * rate > max_length for size in self.characters) / max(1, len(self.characters))

    def to_json(self, max_length: int) -> dict[str, object]:
        """Median and maximum; with a tokenizer also in tokens, and the share of pairs longer than `max_length`."""
        if self.longest is None:
            return {"characters": None, "tokens": None, "longest": None}
        characters = {"median": median(self.characters), "most": self._most}
        where = {"file": self.longest.file, "line": self.longest.line}
        if self._tokenizer is None:
            return {"characters": characters, "tokens": None, "longest": where}
        tokens = {name: round(size * self._rate) for name, size in characters.items()}
        over = self.share_over(max_length)
        return {"characters": characters, "tokens": {**tokens, "share_over": round(over, 4)}, "longest": where}


def _shown(text: Text) -> str:
    """The text that a template may write: for a message all but its role."""
    if isinstance(text, str):
        return text
    return "\n".join(str(value) for message in text for key, value in message.items() if key != "role")

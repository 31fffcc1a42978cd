"""How long pairs are: in characters, and in tokens where the model's tokenizer is a local file. An observer of a pass."""

from __future__ import annotations

from array import array
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from dpo_cli.data.formats import Pair, flat

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BYTES_A_TOKEN = 2  # of UTF-8, at the least: English has about 4, Chinese 3, code and numbers 2 to 3
TEMPLATE_TOKENS = 64  # that a chat template may put around a pair
SAMPLE = 500  # the tokens of so many pairs, spread over all, are counted at least; the others have as many a character


class Lengths:
    """Lengths of prompt and longer response together, as `max_seq_length` counts them but for a template's markers."""

    def __init__(self, model_name: str) -> None:
        self.characters = array("q")
        self.longest: Pair | None = None
        self._most = self._most_bytes = 0
        self._tokenizer = _tokenizer(model_name)
        self._sampled: list[tuple[int, int]] = []  # characters and tokens of every `_stride`th pair
        self._stride = 1

    def see(self, pair: Pair, prompt_key: str) -> None:
        texts = [flat(pair.prompt), max(flat(pair.chosen), flat(pair.rejected), key=len)]
        size = sum(map(len, texts))
        self.characters.append(size)
        is_ascii = all(map(str.isascii, texts))
        self._most_bytes = max(self._most_bytes, size if is_ascii else sum(len(text.encode()) for text in texts))
        if size > self._most:
            self._most, self.longest = size, pair
        if self._tokenizer is not None and (len(self.characters) - 1) % self._stride == 0:
            tokens = sum(len(self._tokenizer.encode(text, add_special_tokens=False).ids) for text in texts)
            self._sampled.append((size, tokens))
            if len(self._sampled) == 2 * SAMPLE:  # a file may start with short pairs, so the sample goes on to its end
                self._sampled = self._sampled[::2]
                self._stride *= 2

    @property
    def most_tokens(self) -> int | None:
        """No fewer tokens than the longest sequence has, in all likelihood; None without pairs."""
        if self.longest is None:
            return None
        if not self._sampled:
            return self._most_bytes // BYTES_A_TOKEN + TEMPLATE_TOKENS
        densest = max(tokens / max(1, size) for size, tokens in self._sampled)
        return round(self._most * densest) + TEMPLATE_TOKENS

    def to_json(self, max_length: int) -> dict[str, Any]:
        """Median and longest; with a tokenizer the tokens of both, and the share of pairs longer than `max_length`."""
        if self.longest is None:
            return {"characters": None, "tokens": None, "longest": None}
        characters = {"median": median(self.characters), "most": self._most}
        where = {"file": self.longest.file, "line": self.longest.line}
        if self._tokenizer is None:
            return {"characters": characters, "tokens": None, "longest": where}
        rate = sum(tokens for _, tokens in self._sampled) / max(1, sum(size for size, _ in self._sampled))
        over = sum(size * rate > max_length for size in self.characters) / len(self.characters)
        tokens = {name: round(size * rate) for name, size in characters.items()}
        return {"characters": characters, "tokens": {**tokens, "share_over": round(over, 4)}, "longest": where}


def _tokenizer(model_name: str) -> Tokenizer | None:
    """The tokenizer of a model directory."""
    file = Path(model_name) / "tokenizer.json"
    if not file.is_file():
        return None
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(file))
    except Exception:  # the library's only class of error: characters are counted, and the model's loading says what is wrong
        return None

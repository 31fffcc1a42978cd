"""How long pairs are: in characters, and in tokens where the model's tokenizer is a local file. An observer of a pass."""

from __future__ import annotations

from array import array
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from dpo_cli.data.formats import Pair, flat

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SAMPLE = 500  # pairs whose tokens are counted; the others have as many a character


class Lengths:
    """Lengths of prompt and longer response together, as `max_seq_length` counts them but for a template's markers."""

    def __init__(self, model_name: str) -> None:
        self.characters = array("q")
        self.longest: Pair | None = None
        self._most = 0
        self._tokenizer = _tokenizer(model_name)
        self._sampled = [0, 0]  # characters and tokens of the sample

    def see(self, pair: Pair, prompt_key: str) -> None:
        texts = [flat(pair.prompt), max(flat(pair.chosen), flat(pair.rejected), key=len)]
        size = sum(map(len, texts))
        self.characters.append(size)
        if size > self._most:
            self._most, self.longest = size, pair
        if self._tokenizer is not None and len(self.characters) <= SAMPLE:
            self._sampled[0] += size
            self._sampled[1] += sum(len(self._tokenizer.encode(text, add_special_tokens=False).ids) for text in texts)

    def to_json(self, max_length: int) -> dict[str, Any]:
        """Median and longest; with a tokenizer the tokens of both, and the share of pairs longer than `max_length`."""
        if self.longest is None:
            return {"characters": None, "tokens": None, "longest": None}
        characters = {"median": median(self.characters), "most": self._most}
        where = {"file": self.longest.file, "line": self.longest.line}
        if self._tokenizer is None:
            return {"characters": characters, "tokens": None, "longest": where}
        rate = self._sampled[1] / max(1, self._sampled[0])
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

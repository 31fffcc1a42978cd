"""Texts to token ids by the package fastokens, which is much faster than the package tokenizers, for the tokenizers that it
reads. It is used for many texts, after it has given the same ids for some of them, for texts that are hard to cut into words,
and for texts of all tokens of the vocabulary, several together and each alone.
"""

from __future__ import annotations

import json
import random
from array import array
from collections.abc import Container, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from dpo_cli.data.pieces import Encode

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOGETHER = 3  # tokens of a text that is compared
# Texts on which two ways to cut a text into words may differ.
HARD = (
    "",
    " a  b   c\n\n d\t\te \r\n\r\n",
    "don't I'LL we’re 'ſ it's'S",
    "1 12 123 1234567 1,234.5e-6 ١٢٣ ²³",
    "é e\u0301 ﬁ Å A\u030a ǆ İ \u200b\u00a0\u2028\x85",
    "中文，日本語 한국어 हिन्दी สวัสดี مرحبا",
    "👩‍👩‍👧 🤷🏽‍♂️ 🇩🇪 \ufe0f",
    "x_y __init__ (a){b}[c] <|x|> </s> <s> ... !!?? //",
    "\x00\x01\x7f \ufffd \uffff \U000e0001",
)


def fast_encoder(tokenizer: Tokenizer, encode: Encode, seen: Sequence[str]) -> Encode | None:
    """Like `encode`, which is that of the tokenizer, but faster; None if fastokens does not read it, or gives other ids.

    Its threads do not survive a fork, so no process may fork after this. `seen` are some of the texts.
    """
    try:
        from fastokens import Tokenizer as FastTokenizer  # late, because few commands have many texts
    except ImportError:  # a machine without a wheel of it: the package tokenizers is slower, and the same
        return None

    described = json.loads(tokenizer.to_str())
    size = 1 + max(tokenizer.get_vocab().values())
    described["truncation"] = described["padding"] = None
    _add_missing_bytes(described, size)
    try:
        fast: Any = FastTokenizer.from_json_str(json.dumps(described))
    except ValueError:  # it does not have one of the parts of this tokenizer: the package tokenizers does
        return None
    del described

    def encoded(texts: Sequence[str]) -> list[list[int]]:
        try:
            flat, ends = (array(code, given) for code, given in zip("IQ", fast.encode_batch_flat(list(texts)), strict=True))
        except ValueError:  # a text that its regular expressions give up on: the package tokenizers does not
            return encode(texts)
        ids = [flat[start:end].tolist() for start, end in pairwise(ends)]
        if max(flat, default=0) >= size:  # a byte that has no token
            outside = [place for place, of_text in enumerate(ids) if max(of_text, default=0) >= size]
            for place, own in zip(outside, encode([texts[place] for place in outside]), strict=True):
                ids[place] = own
        return ids

    texts = [*HARD, *seen, *_texts_of_tokens(tokenizer, TOGETHER)]
    ids = encode(texts)
    if encoded(texts) != ids:
        return None
    found = {id for of_text in ids for id in of_text}  # several tokens together may be other ones
    alone = _texts_of_tokens(tokenizer, 1, found)
    return encoded if encoded(alone) == encode(alone) else None


def _add_missing_bytes(described: dict[str, Any], size: int) -> None:
    """Add tokens from `size` on for the bytes that a byte-level tokenizer has no token for: fastokens asks for all of them."""
    from tokenizers.pre_tokenizers import ByteLevel

    vocabulary = described["model"].get("vocab")
    if described["model"]["type"] == "BPE" and '"ByteLevel"' in json.dumps(described["pre_tokenizer"]):
        missing = sorted(set(ByteLevel.alphabet()) - vocabulary.keys())
        vocabulary.update({byte: size + number for number, byte in enumerate(missing)})


def _texts_of_tokens(tokenizer: Tokenizer, together: int, without: Container[int] = ()) -> list[str]:
    """Texts of so many tokens each, with each token of the vocabulary in one of them, but for some."""
    ids = [id for id in sorted(tokenizer.get_vocab().values()) if id not in without]
    random.Random(0).shuffle(ids)
    groups = [ids[start : start + together] for start in range(0, len(ids), together)]
    return list(tokenizer.decode_batch(groups, skip_special_tokens=False))

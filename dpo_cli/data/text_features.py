"""Words, signs and scripts in texts, for the findings of findings.py."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import cache


@cache
def compiled(pattern: str) -> re.Pattern[str]:
    """A pattern, compiled at its first use: `dpo validate` must be fast, and needs only a few of them."""
    return re.compile(pattern)


def differ(one: str, other: str) -> bool:
    """Whether each of two lower-case texts has a word that the other lacks, except fillers."""
    left, right = {*one.split()}, {*other.split()}
    return _has_own(left - right, other) and _has_own(right - left, one)


def _has_own(words: set[str], text: str) -> bool:
    return any(word.isalpha() and word not in FILLERS and word not in text for word in words)


def same_answer(one: list[str], other: list[str], question: set[str]) -> bool:
    """Whether two answers have the same words in the same order, except for fillers and a repeated question."""
    one, other = ([word for word in words if word not in FILLERS] for words in (one, other))
    extra = {*one} - {*other}, {*other} - {*one}
    if all(extra) or not (extra[0] | extra[1]) <= question:
        return False
    left = [word for word in one if word not in extra[0]], [word for word in other if word not in extra[1]]
    return left[0] == left[1] and bool(left[0])


def words(text: str) -> list[str]:
    """The words, numbers and signs of a text, without punctuation and quotes."""
    return compiled(_WORDS).findall(text.lower())


def auc(above: Sequence[int], below: Sequence[int]) -> float:
    """The probability that a value of `above` exceeds one of `below`; a tie counts one half."""
    if not above or not below:
        return 0.5
    highs, lows = Counter(above), Counter(below)
    wins, smaller = 0.0, 0
    for length in sorted(highs.keys() | lows.keys()):
        wins += highs[length] * (smaller + lows[length] / 2)
        smaller += lows[length]
    return wins / (len(above) * len(below))


def script(text: str) -> str | None:
    """The script of most letters of a text; None with fewer than 20 letters, or if no script has two thirds of them."""
    names = Counter(unicodedata.name(char, "").split(" ", 1)[0] for char in text[:2000] if char.isalpha())
    scripts: Counter[str] = Counter()
    for name, count in names.items():
        scripts[_SCRIPTS.get(name, name)] += count
    (name, count), total = max(scripts.items(), key=lambda item: item[1], default=("", 0)), scripts.total()
    return name if total >= 20 and count * 3 >= total * 2 else None


_SCRIPTS = {"CJK": "Han or kana", "HIRAGANA": "Han or kana", "KATAKANA": "Han or kana", "FULLWIDTH": "LATIN"}
FREE_TEXT = (
    r"(?is)^\s*(please |can you |could you )*"
    r"(describe|write|compose|draft|tell|create|explain|imagine|invent|narrate|summari[sz]e)\b"
    r"(?!.*\?\s*$)"
)
_WORDS = r"[-+]?\d+(?:[.,]\d+)*|\w+(?:['’]\w+)?|[^\s\w.,;:!?\"'“”‘’()`]"
FILLERS = frozenset(
    """a an the it its this that these those there here he she they we you i is are was were be been being do does did has have
    had will would can could of in on at to for from by with as and or so then well answer result equals equal makes correct
    right s re""".split()  # noqa: SIM905 - a list of quoted words would be four times as long
)
ABOUT_LANGUAGE = (
    r"(?i)translat|language|english|spanish|french|german|italian|portuguese|russian|ukrainian|greek|chinese|mandarin|japanese|korean"
    r"|arabic|persian|farsi|hebrew|hindi|urdu|bengali|tamil|thai|vietnamese|turkish"
)
REFUSAL = (
    r"(?i)\s*(i['’]?m sorry|i am sorry|sorry,|i apologi[sz]e"
    r"|i can(no|['’])t (help|assist|do|provide|answer|fulfil|comply|create|write|engage)"
    r"|i am (not able|unable)|i['’]m (not able|unable)|i won['’]t (help|assist|provide)|as an ai|i don['’]t know)"
)
MARKERS = (
    r"(?m)<\|(im_start|im_end|eot_id|start_header_id|end_of_text|endoftext|user|assistant|system|end)\|>|\[/?INST\]|<</?SYS>>"
    r"|<(start|end)_of_turn>|<｜(User|Assistant)｜>|\n\n(Human|Assistant): |^### (Instruction|Response):"
)
MARKER_SIGNS = ("<", "INST]", "### ", "\n\nHuman: ", "\n\nAssistant: ")  # one of them is in each marker


# Characters without width (joiners, soft hyphens, direction marks, selectors, tags), and blank ones. Tags after a black flag
# are visible: they make it the flag of England or Scotland.
_HIDDEN = (
    "(\U0001f3f4[\U000e0020-\U000e007f]+)"
    "|[\u00ad\u034f\u061c\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff"
    "\ufff9-\ufffb\U000e0000-\U000e0fff]"
)
_BLANK = str.maketrans(dict.fromkeys("\u115f\u1160\u2800\u3164\uffa0", " "))


def visible(text: str) -> str:
    """The visible part of a text, to check whether it is empty or equal to another. Training uses the text as written."""
    return text if text.isascii() else compiled(_HIDDEN).sub(r"\1", text).translate(_BLANK)


def plain(text: str) -> str:
    """The text without differences of case, spaces and invisible characters.

    Spaces at the start of a line stay, because code needs them.
    """
    lines = visible(text).casefold().strip().splitlines()
    return "\n".join(line[: len(line) - len(line.lstrip())] + " ".join(line.split()) for line in lines)

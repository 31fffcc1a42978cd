"""Rows that cannot be trained on, one of each kind: the row, its code, and what is said of it.

`make reference` writes the table of the README from here, and the tests read every one of them.
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """A bad row, which stands on line 2 between two good ones; or a file of its own that has a bad one."""

    code: str
    row: bytes
    says: str  # a part of the message
    severity: str = "error"
    suffix: str = ".jsonl"
    content: bytes | None = None  # the whole file, where a line does not show the fault
    line: int = 2
    shown: str = ""  # in the README, where the row cannot be

    @property
    def file(self) -> str:
        return f"data/{self.code}{self.suffix}"

    @property
    def fix(self) -> str:
        of_files = {"row-not-gzip": "compress the file again", "row-not-utf8": "save the file as UTF-8"}
        if self.code in of_files:
            return of_files[self.code]
        return "correct or delete these rows" if self.severity == "error" else "these rows are skipped"


GOOD = b'{"prompt": "question", "chosen": "yes", "rejected": "no"}'
TABLE = b"prompt,chosen,rejected\na,b,c\nd,e\n"
CUT = b"PAR1" + b"x" * 100  # a Parquet file without its end
CUT_GZIP = gzip.compress(GOOD, mtime=0)[:-9]
TWO = b'"prompt": "a", "output_1": "b", "output_2": "c"'
DEEP = b'{"prompt": "a", "chosen": "b", "rejected": "c", "context": ' + b"[" * 200 + b"]" * 200 + b"}"

FAULTS = (
    Fault("row-not-json", b'{"prompt": "a", "chosen": "b"', "not valid JSON"),
    Fault("row-not-object", b"3", "not a JSON object"),
    Fault("row-missing-key", b'{"prompt": "a", "chosen": "b"}', "rejected is missing"),
    Fault("row-wrong-type", b'{"prompt": "a", "chosen": "b", "rejected": 3}', "rejected is int"),
    Fault(
        "row-mixed-types",
        b'{"prompt": "a", "chosen": [{"role": "assistant", "content": "b"}], "rejected": "c"}',
        "both be strings",
    ),
    Fault("row-empty", b'{"prompt": "a", "chosen": "\\u200b ", "rejected": "c"}', "chosen is empty"),
    Fault("row-identical", b'{"prompt": "a", "chosen": "b", "rejected": "b\\u200b"}', "chosen and rejected are identical"),
    Fault(
        "row-role",
        b'{"prompt": "a", "chosen": {"from": "system", "value": "b"}, "rejected": {"from": "gpt", "value": "c"}}',
        "chosen holds a message of another role",
    ),
    Fault("row-no-prompt", b'{"chosen": "b", "rejected": "c"}', "there is no prompt"),
    Fault("row-history", b'{"prompt": "a", "history": "b", "chosen": "d", "rejected": "e"}', "not a list of earlier turns"),
    Fault("row-tools", b'{"prompt": "a", "chosen": "b", "rejected": "c", "tools": "search"}', "tools is text, but not JSON"),
    Fault(
        "row-call",
        b'{"prompt": "a", "chosen": [{"role": "assistant", "tool_calls": [{}]}], "rejected": "c"}',
        'a tool call without a "name"',
    ),
    Fault(
        "row-part",
        b'{"prompt": [{"role": "user", "content": [{"type": "image"}]}], "chosen": "b", "rejected": "c"}',
        'its type is "image"',
    ),
    Fault("row-tie", b"{" + TWO + b', "winner": "tie"}', "the label is a tie", "warning"),
    Fault("row-label", b"{" + TWO + b', "winner": "maybe"}', "an unknown value"),
    Fault("row-label-unclear", b"{" + TWO + b', "label": 1}', 'write "columns": {"labels": [0, 1]}'),
    Fault("row-score", b"{" + TWO + b', "score_1": "good", "score_2": "bad"}', '"score_1" is not a number'),
    Fault("row-one-response", b'{"prompt": "a", "responses": ["b"], "scores": [1]}', "fewer than two responses"),
    Fault("row-nul", b'{"prompt": "a\\u0000", "chosen": "b", "rejected": "c"}', "prompt holds a NUL character"),
    Fault("row-surrogate", b'{"prompt": "\\ud800", "chosen": "b", "rejected": "c"}', "half of a surrogate pair"),
    Fault("row-unreadable", DEEP, "nested more than 100 levels deep", shown="a row of 200 nested lists"),
    Fault("row-not-utf8", b'{"prompt": "\xff", "chosen": "b", "rejected": "c"}', "not valid UTF-8"),
    Fault("row-duplicate-key", b'{"prompt": "a", "prompt": "a", "chosen": "b", "rejected": "c"}', "a key is given twice"),
    Fault("row-too-long", b" " * (1 << 26) + b"3", "the line has more than 64 MiB", shown="a line of 65 MiB"),
    Fault("row-not-gzip", b"", "damaged from here on", suffix=".jsonl.gz", content=CUT_GZIP, line=1, shown="a cut gzip file"),
    Fault("row-not-csv", b"d,e", "has 2 cells, but the header has 3", suffix=".csv", content=TABLE, line=3),
    Fault("row-not-parquet", b"", "cannot be read", suffix=".parquet", content=CUT, line=1, shown="a cut file"),
)

# Those that a line shows, by their codes.
BAD_ROWS = {fault.code: fault.row for fault in FAULTS if fault.content is None and fault.code != "row-too-long"}

"""Reference log-probs that all runs of a user share: a SQLite file in the user's cache. No torch.

A value has two keys, so it cannot be stale: the digest of what computes it (weights and adapter as loaded, dtype, code; see
`computed_by` in scoring/reference.py), and the digest of the token ids of its pair. Each value has a checksum over both keys,
so damage to the file is a value that is missing. No training depends on this file: what cannot be read is computed, and what
cannot be written is not kept. The user is told why.
"""

from __future__ import annotations

import hashlib
import sqlite3
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from dpo_cli.errors import DpoError
from dpo_cli.storage.user_cache import Entry, cache_dir

FILE = "reference.sqlite"
KIND = "reference"
APPLICATION, VERSION = 0x44504F52, 1  # of the file
TABLES = """
CREATE TABLE IF NOT EXISTS models (id INTEGER PRIMARY KEY, digest TEXT NOT NULL UNIQUE, name TEXT NOT NULL, used REAL NOT NULL);
CREATE TABLE IF NOT EXISTS pairs (
  model INTEGER NOT NULL REFERENCES models ON DELETE CASCADE, pair BLOB NOT NULL, value BLOB NOT NULL, PRIMARY KEY (model, pair)
) WITHOUT ROWID;
"""
VALUES_OF = (  # as bytes also where damage has changed the type
    "SELECT pair, CAST(value AS BLOB) FROM pairs JOIN models ON models.id = pairs.model WHERE digest = ? AND pair IN"
)
VALUES = struct.Struct("<dd")  # log-probs of chosen and rejected
CHECK_BYTES = 8
ASKED = 500  # pairs per query; SQLite limits the number of parameters
WAIT_SECONDS = 5.0  # for another process that writes

LogProbs = tuple[float, float]  # of chosen and rejected, in nats
Tell = Callable[[str], None]


class ReferenceCache:
    """The values of one reference."""

    def __init__(self, digest: str, name: str, tell: Tell) -> None:
        """`digest` is of everything that decides the values; `name` is for people."""
        self.digest, self.name, self._tell, self._is_usable = digest, name, tell, True

    def read(self, pairs: Sequence[bytes]) -> dict[bytes, LogProbs]:
        """The known values among these pairs, by their digests."""
        known: dict[bytes, LogProbs] = {}
        if not self._is_usable:
            return known
        with self._careful("read"):
            if not path().is_file():
                return known
            with _opened() as cache:
                for begin in range(0, len(pairs), ASKED):
                    some = pairs[begin : begin + ASKED]
                    places = ",".join("?" * len(some))
                    for pair, value in cache.execute(f"{VALUES_OF} ({places})", (self.digest, *some)):
                        if (log_probs := self._unpacked(pair, value)) is not None:
                            known[pair] = log_probs
                if known:
                    cache.execute("UPDATE models SET used = ? WHERE digest = ?", (time.time(), self.digest))
        return known

    def add(self, values: Mapping[bytes, LogProbs]) -> None:
        """Keep these values, by the digests of their pairs."""
        if not self._is_usable or not values:
            return
        with self._careful("written"):
            path().parent.mkdir(parents=True, exist_ok=True)
            with _opened() as cache:
                about = "INSERT INTO models (digest, name, used) VALUES (?, ?, ?)"
                again = "ON CONFLICT (digest) DO UPDATE SET used = excluded.used"
                cache.execute(f"{about} {again}", (self.digest, self.name, time.time()))
                (model,) = cache.execute("SELECT id FROM models WHERE digest = ?", (self.digest,)).fetchone()
                rows = ((model, pair, self._packed(pair, log_probs)) for pair, log_probs in values.items())
                cache.executemany("INSERT OR REPLACE INTO pairs VALUES (?, ?, ?)", rows)

    @contextmanager
    def _careful(self, what: str) -> Iterator[None]:
        """Within, a cache that fails is not used any more, and the user is told; a value is computed instead."""
        try:
            yield
        except (sqlite3.Error, OSError, DpoError, _Foreign) as error:  # damaged, foreign, locked, a full disk, no home
            self._is_usable = False
            self._tell(f"note: reference log-probs cannot be {what} in the cache, so they are computed: {error}")

    def _packed(self, pair: bytes, log_probs: LogProbs) -> bytes:
        numbers = VALUES.pack(*log_probs)
        return numbers + self._check(pair, numbers)

    def _unpacked(self, pair: bytes, value: object) -> LogProbs | None:
        """The log-probs in a value; None if it is damaged."""
        if not isinstance(value, bytes) or not isinstance(pair, bytes) or len(value) != VALUES.size + CHECK_BYTES:
            return None
        numbers = value[: VALUES.size]
        chosen, rejected = VALUES.unpack(numbers)
        return (chosen, rejected) if value[VALUES.size :] == self._check(pair, numbers) else None

    def _check(self, pair: bytes, numbers: bytes) -> bytes:
        return hashlib.blake2b(self.digest.encode() + pair + numbers, digest_size=CHECK_BYTES).digest()


class _Foreign(Exception):
    """A SQLite file of another program, or of another version."""


def path() -> Path:
    """The file of the cache."""
    return cache_dir() / FILE


@contextmanager
def _opened() -> Iterator[sqlite3.Connection]:
    """A connection for one transaction."""
    with closing(sqlite3.connect(path(), timeout=WAIT_SECONDS, isolation_level=None)) as cache, cache:
        (application,), (version,) = (cache.execute(f"PRAGMA {name}").fetchone() for name in ("application_id", "user_version"))
        if (application, version) != (APPLICATION, VERSION):
            if application or version or cache.execute("SELECT name FROM sqlite_master").fetchone():
                raise _Foreign(f"{path()} is not a cache of this version of dpo; `dpo cache --prune 0` removes it")
            cache.execute(f"PRAGMA application_id = {APPLICATION}")
            cache.execute(f"PRAGMA user_version = {VERSION}")
            cache.executescript(TABLES)
        cache.execute("PRAGMA foreign_keys = ON")
        cache.execute("BEGIN IMMEDIATE")
        yield cache


def entries() -> list[Entry]:
    """The references in the cache, the last used first."""
    if not path().is_file():
        return []
    with _opened() as cache:
        size = path().stat().st_size / max(1, cache.execute("SELECT count(*) FROM pairs").fetchone()[0])
        query = "SELECT name, used, count(pair) FROM models LEFT JOIN pairs ON model = id GROUP BY id ORDER BY used DESC"
        return [Entry(KIND, name, round(size * pairs), used, pairs) for name, used, pairs in cache.execute(query)]


def prune(before: float) -> list[Entry]:
    """Remove the references that were last used before this time, in seconds since 1970, and return them.

    A file that cannot be read as a cache is removed whole.
    """
    try:
        old = [entry for entry in entries() if entry.used < before]
        if old:
            with _opened() as cache:
                cache.execute("DELETE FROM models WHERE used < ?", (before,))
            with closing(sqlite3.connect(path(), timeout=WAIT_SECONDS)) as cache:
                cache.execute("VACUUM")
        return old
    except sqlite3.OperationalError:  # locked: another process uses it
        raise
    except (sqlite3.DatabaseError, _Foreign):
        whole = Entry(KIND, "not a cache of this version", path().stat().st_size, path().stat().st_mtime)
        path().unlink()
        return [whole]

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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from dpo_cli.errors import DpoError, RunFailed
from dpo_cli.storage.log import Tell
from dpo_cli.storage.user_cache import Entry, cache_dir

FILE = "reference.sqlite"
KIND = "reference"
APPLICATION, VERSION = 0x44504F52, 1  # of the file
TABLES = (
    "CREATE TABLE models (id INTEGER PRIMARY KEY, digest TEXT NOT NULL UNIQUE, name TEXT NOT NULL, used REAL NOT NULL)",
    "CREATE TABLE pairs (model INTEGER NOT NULL REFERENCES models ON DELETE CASCADE, pair BLOB NOT NULL, value BLOB NOT NULL,"
    " PRIMARY KEY (model, pair)) WITHOUT ROWID",
)
VALUES_OF = (  # as bytes also where damage has changed the type
    "SELECT pair, CAST(value AS BLOB) FROM pairs JOIN models ON models.id = pairs.model WHERE digest = ? AND pair IN"
)
CHECK_BYTES = 8
ASKED = 500  # pairs per query; SQLite limits the number of parameters
WAIT_SECONDS = 5.0  # for another process that writes

LogProbs = tuple[float, ...]  # of the responses of a unit, in nats: of chosen and rejected, or of one


class ReferenceCache:
    """The values of one reference."""

    def __init__(self, digest: str, name: str, tell: Tell, responses: int = 2) -> None:
        """`digest` is of everything that decides the values; `name` is for people. A value is of so many responses."""
        self.digest, self.name, self._tell, self._is_usable = digest, name, tell, True
        self._values = struct.Struct(f"<{responses}d")

    def read(self, pairs: Sequence[bytes]) -> dict[bytes, LogProbs]:
        """The known values among these pairs, by their digests."""
        known: dict[bytes, LogProbs] = {}
        if not self._is_usable:
            return known
        with self._or_without("read"):
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
        with self._or_without("written"):
            path().parent.mkdir(parents=True, exist_ok=True)
            with _opened() as cache:
                about = "INSERT INTO models (digest, name, used) VALUES (?, ?, ?)"
                again = "ON CONFLICT (digest) DO UPDATE SET used = excluded.used"
                cache.execute(f"{about} {again}", (self.digest, self.name, time.time()))
                (model,) = cache.execute("SELECT id FROM models WHERE digest = ?", (self.digest,)).fetchone()
                rows = ((model, pair, self._packed(pair, log_probs)) for pair, log_probs in values.items())
                cache.executemany("INSERT OR REPLACE INTO pairs VALUES (?, ?, ?)", rows)

    def distrust(self) -> None:
        """Say that the values are not those that the reference computes: they are computed, and replaced."""
        self._tell("note: the reference log-probs in the cache differ from those of this model: they are computed again")

    @contextmanager
    def _or_without(self, what: str) -> Iterator[None]:
        """Within, a failure of the cache is reported, and the run continues without it: damage, a lock, a full disk, no home.

        A cache that another process has locked is asked again later.
        """
        try:
            yield
        except (sqlite3.Error, OSError, DpoError, ForeignFile) as error:
            self._is_usable = _is_locked(error)
            is_damaged = isinstance(error, sqlite3.Error) and not self._is_usable
            fix = "; if it is damaged, `dpo cache --prune 0` removes it" if is_damaged else ""
            self._tell(f"note: reference log-probs cannot be {what} in the cache, so they are computed: {error}{fix}")

    def _packed(self, pair: bytes, log_probs: LogProbs) -> bytes:
        numbers = self._values.pack(*log_probs)
        return numbers + self._check(pair, numbers)

    def _unpacked(self, pair: bytes, value: object) -> LogProbs | None:
        """The log-probs in a value; None if it is damaged."""
        if not isinstance(value, bytes) or not isinstance(pair, bytes) or len(value) != self._values.size + CHECK_BYTES:
            return None
        numbers, check = value[: self._values.size], value[self._values.size :]
        return self._values.unpack(numbers) if check == self._check(pair, numbers) else None

    def _check(self, pair: bytes, numbers: bytes) -> bytes:
        return hashlib.blake2b(self.digest.encode() + pair + numbers, digest_size=CHECK_BYTES).digest()


class ForeignFile(Exception):
    """A SQLite file of another program, or of another version."""


def _is_locked(error: Exception) -> bool:
    """Whether another process has the file now."""
    return isinstance(error, sqlite3.OperationalError) and error.sqlite_errorcode in (
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
    )


def path() -> Path:
    """The file of the cache."""
    return cache_dir() / FILE


@contextmanager
def _opened() -> Iterator[sqlite3.Connection]:
    """A connection for one transaction, which also makes a new file whole or not at all."""
    with closing(sqlite3.connect(path(), timeout=WAIT_SECONDS, isolation_level=None)) as cache, cache:
        cache.execute("PRAGMA foreign_keys = ON")
        cache.execute("BEGIN IMMEDIATE")
        (application,), (version,) = (cache.execute(f"PRAGMA {name}").fetchone() for name in ("application_id", "user_version"))
        if (application, version) != (APPLICATION, VERSION):
            if application or version or cache.execute("SELECT name FROM sqlite_master").fetchone():
                raise ForeignFile(f"{path()} is not a cache of this version of dpo; `dpo cache --prune 0` removes it")
            for table in TABLES:
                cache.execute(table)
            cache.execute(f"PRAGMA application_id = {APPLICATION}")
            cache.execute(f"PRAGMA user_version = {VERSION}")
        yield cache


def entries() -> list[Entry]:
    """The references in the cache, the last used first; another file is one entry. `RunFailed` if it is locked."""
    if not path().is_file():
        return []
    try:
        with _opened() as cache:
            return _entries(cache)
    except (sqlite3.Error, ForeignFile) as error:
        return [_unreadable(error)]


def prune(before: float) -> list[Entry]:
    """Remove the references that were last used before this time, in seconds since 1970, and return them.

    A file that is not a cache is removed whole if it was not changed since. `RunFailed` if it is locked.
    """
    if not path().is_file():
        return []
    try:
        with _opened() as cache:
            old = [entry for entry in _entries(cache) if entry.used < before]
            cache.execute("DELETE FROM models WHERE used < ?", (before,))
    except (sqlite3.Error, ForeignFile) as error:
        whole = _unreadable(error)
        if whole.used >= before:
            return []
        path().unlink()
        return [whole]
    if old:
        with suppress(sqlite3.Error), closing(sqlite3.connect(path())) as cache:  # in use: the space is used again later
            cache.execute("VACUUM")
    return old


def _entries(cache: sqlite3.Connection) -> list[Entry]:
    size = path().stat().st_size / max(1, cache.execute("SELECT count(*) FROM pairs").fetchone()[0])
    query = "SELECT name, used, count(pair) FROM models LEFT JOIN pairs ON model = id GROUP BY id ORDER BY used DESC"
    return [Entry(KIND, name, round(size * pairs), used, pairs) for name, used, pairs in cache.execute(query)]


def _unreadable(error: Exception) -> Entry:
    """A file that cannot be read as a cache; `RunFailed` if it only cannot be read now."""
    if _is_locked(error):
        raise RunFailed(f"{path()} is used by another process", "wait for it, and run the command again") from error
    about = path().stat()
    return Entry(KIND, "not a cache of this version", about.st_size, about.st_mtime)

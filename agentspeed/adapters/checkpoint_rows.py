"""The rows of a durable checkpointer: checkpoints, channel values, pending writes and session snapshots, in sqlite3.

One connection behind one lock, so that any thread may call; every method is one transaction. Values come and go as
(kind, bytes): what they mean is the caller's. A file may be open in several processes at once."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeAlias, final

Typed: TypeAlias = tuple[str, bytes]
"""A serialised value, and how it was serialised."""

SCHEMA_VERSION: Final = 1
SESSIONS_OF_A_THREAD: Final = 16
"""Snapshots that are kept of one thread; the oldest go first."""
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS checkpoints (
    thread TEXT NOT NULL, ns TEXT NOT NULL, id TEXT NOT NULL, parent TEXT,
    kind TEXT NOT NULL, data BLOB NOT NULL, meta_kind TEXT NOT NULL, meta BLOB NOT NULL,
    run TEXT, deltas TEXT NOT NULL, PRIMARY KEY (thread, ns, id)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS checkpoints_of_run ON checkpoints (run);
CREATE TABLE IF NOT EXISTS versions (
    thread TEXT NOT NULL, ns TEXT NOT NULL, id TEXT NOT NULL, channel TEXT NOT NULL, version TEXT NOT NULL,
    PRIMARY KEY (thread, ns, id, channel)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS channel_values (
    thread TEXT NOT NULL, ns TEXT NOT NULL, channel TEXT NOT NULL, version TEXT NOT NULL,
    kind TEXT NOT NULL, data BLOB NOT NULL, PRIMARY KEY (thread, ns, channel, version)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS writes (
    thread TEXT NOT NULL, ns TEXT NOT NULL, id TEXT NOT NULL, task TEXT NOT NULL, place INTEGER NOT NULL,
    channel TEXT NOT NULL, kind TEXT NOT NULL, data BLOB NOT NULL, path TEXT NOT NULL,
    PRIMARY KEY (thread, ns, id, task, place)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS sessions (
    saved INTEGER PRIMARY KEY AUTOINCREMENT, model TEXT NOT NULL, thread TEXT NOT NULL, name TEXT NOT NULL,
    state TEXT NOT NULL, data BLOB NOT NULL, UNIQUE (model, thread, name));
"""
_OF_A_THREAD: Final = ("checkpoints", "versions", "channel_values", "writes")
_UNUSED_VALUES: Final = """
DELETE FROM channel_values WHERE thread = ? AND NOT EXISTS (
    SELECT 1 FROM versions WHERE versions.thread = channel_values.thread AND versions.ns = channel_values.ns
    AND versions.channel = channel_values.channel AND versions.version = channel_values.version)
"""


class Place(NamedTuple):
    """Which checkpoint."""

    thread: str
    ns: str
    id: str


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One checkpoint without the values of its channels. `versions`: of every channel, as text. `deltas`: channels
    whose value is told by the writes of its ancestors."""

    place: Place
    parent: str | None
    checkpoint: Typed
    metadata: Typed
    run: str | None
    versions: Mapping[str, str]
    deltas: Sequence[str]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Write:
    """One pending write of a task. `place` below 0 is of a special channel, and replaces an earlier one."""

    task: str
    place: int
    channel: str
    value: Typed
    path: str


@final
class CheckpointRows:
    """`path`: a file, or ":memory:"."""

    def __init__(self, path: str) -> None:
        self._lock = threading.RLock()
        self._connection = sqlite3.connect(path, timeout=30.0, check_same_thread=False, isolation_level=None)
        try:
            (found,) = self._connection.execute("PRAGMA user_version").fetchone()
            if found not in (0, SCHEMA_VERSION):
                raise ValueError(f"{path} has version {found} of its tables; this agentspeed reads {SCHEMA_VERSION}.")
            _ = self._connection.execute("PRAGMA journal_mode = WAL")
            _ = self._connection.execute("PRAGMA synchronous = NORMAL")
            _ = self._connection.executescript(f"{_SCHEMA} PRAGMA user_version = {SCHEMA_VERSION};")
        except BaseException:
            self._connection.close()
            raise

    def close(self) -> None:
        """Calling it again does nothing; other methods raise `sqlite3.ProgrammingError` afterwards."""
        with self._lock:
            self._connection.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            _ = self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
            except BaseException:
                _ = self._connection.execute("ROLLBACK")
                raise
            _ = self._connection.execute("COMMIT")

    def _all(self, sql: str, given: Sequence[Any] = ()) -> list[Any]:
        with self._lock:
            return self._connection.execute(sql, given).fetchall()

    # ---- checkpoints ------------------------------------------------------------------------------------------------
    def put(self, row: Row, values: Mapping[str, Typed | None]) -> None:
        """`values`: of the channels that have a new version; None where that version has no value."""
        thread, ns, _ = row.place
        with self._transaction() as rows:
            _ = rows.execute(
                "INSERT OR REPLACE INTO checkpoints VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (*row.place, row.parent, *row.checkpoint, *row.metadata, row.run, json.dumps(list(row.deltas))),
            )
            _ = rows.execute("DELETE FROM versions WHERE (thread, ns, id) = (?, ?, ?)", row.place)
            _ = rows.executemany(
                "INSERT INTO versions VALUES (?, ?, ?, ?, ?)",
                [(*row.place, channel, version) for channel, version in row.versions.items()],
            )
            for channel, value in values.items():
                key = (thread, ns, channel, row.versions.get(channel, ""))
                if value is None:
                    _ = rows.execute(
                        "DELETE FROM channel_values WHERE (thread, ns, channel, version) = (?, ?, ?, ?)", key
                    )
                else:
                    _ = rows.execute("INSERT OR REPLACE INTO channel_values VALUES (?, ?, ?, ?, ?, ?)", (*key, *value))

    def put_writes(self, place: Place, writes: Iterable[Write]) -> None:
        """A write that is there already stays, unless it is special."""
        with self._transaction() as rows:
            for write in writes:
                verb = "REPLACE" if write.place < 0 else "IGNORE"
                _ = rows.execute(
                    f"INSERT OR {verb} INTO writes VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (*place, write.task, write.place, write.channel, *write.value, write.path),
                )

    def latest(self, thread: str, ns: str) -> str | None:
        """The id of a namespace's latest checkpoint."""
        found = self._all("SELECT max(id) FROM checkpoints WHERE (thread, ns) = (?, ?)", (thread, ns))
        return None if found[0][0] is None else str(found[0][0])

    def get(self, place: Place) -> tuple[str | None, Typed, Typed] | None:
        """The parent's id, the checkpoint and its metadata."""
        found = self._all(
            "SELECT parent, kind, data, meta_kind, meta FROM checkpoints WHERE (thread, ns, id) = (?, ?, ?)", place
        )
        if not found:
            return None
        parent, kind, data, meta_kind, meta = found[0]
        return parent, (kind, data), (meta_kind, meta)

    def values(self, place: Place) -> dict[str, Typed]:
        """Of each channel that has one at that checkpoint."""
        found = self._all(
            "SELECT channel, kind, data FROM versions JOIN channel_values USING (thread, ns, channel, version)"
            " WHERE (thread, ns, id) = (?, ?, ?)",
            place,
        )
        return {channel: (kind, data) for channel, kind, data in found}

    def writes(self, place: Place) -> list[tuple[str, str, Typed]]:
        """Task, channel and value, in the order in which a step applies them."""
        found = self._all(
            "SELECT task, channel, kind, data FROM writes WHERE (thread, ns, id) = (?, ?, ?)"
            " ORDER BY path, task, place",
            place,
        )
        return [(task, channel, (kind, data)) for task, channel, kind, data in found]

    def places(self, thread: str | None, ns: str | None, id: str | None, before: str | None) -> list[Place]:
        """Checkpoints, latest first; None: any."""
        asked = [("thread = ?", thread), ("ns = ?", ns), ("id = ?", id), ("id < ?", before)]
        given = [(test, value) for test, value in asked if value is not None]
        where = " AND ".join(test for test, _ in given) or "1"
        found = self._all(
            f"SELECT thread, ns, id FROM checkpoints WHERE {where} ORDER BY id DESC", [value for _, value in given]
        )
        return [Place(*one) for one in found]

    # ---- what goes --------------------------------------------------------------------------------------------------
    def delete_thread(self, thread: str) -> None:
        """With its sessions."""
        with self._transaction() as rows:
            for table in (*_OF_A_THREAD, "sessions"):
                _ = rows.execute(f"DELETE FROM {table} WHERE thread = ?", (thread,))

    def delete_runs(self, runs: Iterable[str]) -> None:
        """What these runs wrote, but for what the delta channels of a later checkpoint are still told by."""
        with self._transaction() as rows:
            going: set[Place] = set()
            for run in runs:
                found = rows.execute("SELECT thread, ns, id FROM checkpoints WHERE run = ?", (run,)).fetchall()
                going |= {Place(*one) for one in found}
            for thread in {place.thread for place in going}:
                found = rows.execute("SELECT thread, ns, id FROM checkpoints WHERE thread = ?", (thread,)).fetchall()
                every = {Place(*one) for one in found}
                self._delete(rows, thread, (every & going) - _needed(rows, every - going))

    def keep_latest(self, thread: str) -> None:
        """The latest checkpoint of each namespace stays, with the ancestors that its delta channels are told by."""
        with self._transaction() as rows:
            found = rows.execute("SELECT thread, ns, id FROM checkpoints WHERE thread = ?", (thread,)).fetchall()
            every = {Place(*one) for one in found}
            latest: dict[str, Place] = {}
            for place in sorted(every):
                latest[place.ns] = place
            kept = set(latest.values())
            self._delete(rows, thread, every - kept - _needed(rows, kept))

    @staticmethod
    def _delete(rows: sqlite3.Connection, thread: str, going: set[Place]) -> None:
        for table in ("checkpoints", "versions", "writes"):
            _ = rows.executemany(f"DELETE FROM {table} WHERE (thread, ns, id) = (?, ?, ?)", list(going))
        _ = rows.execute(_UNUSED_VALUES, (thread,))

    def copy_thread(self, source: str, target: str) -> None:
        """Everything of it, sessions too; what the target has under the same ids is replaced."""
        if source == target:
            return
        with self._transaction() as rows:
            for table in _OF_A_THREAD:
                columns = [name for _, name, *_ in rows.execute(f"PRAGMA table_info({table})")]
                rest = ", ".join(name for name in columns if name != "thread")
                _ = rows.execute(
                    f"INSERT OR REPLACE INTO {table} (thread, {rest}) SELECT ?, {rest} FROM {table} WHERE thread = ?",
                    (target, source),
                )
            _ = rows.execute(
                "INSERT OR REPLACE INTO sessions (model, thread, name, state, data)"
                " SELECT model, ?, name, state, data FROM sessions WHERE thread = ? ORDER BY saved",
                (target, source),
            )

    # ---- sessions ---------------------------------------------------------------------------------------------------
    def put_session(self, model: str, thread: str, name: str, state: str, data: bytes) -> None:
        """`state` tells whether a session has changed since."""
        with self._transaction() as rows:
            _ = rows.execute(
                "INSERT OR REPLACE INTO sessions (model, thread, name, state, data) VALUES (?, ?, ?, ?, ?)",
                (model, thread, name, state, data),
            )
            _ = rows.execute(
                "DELETE FROM sessions WHERE (model, thread) = (?, ?) AND saved NOT IN"
                " (SELECT saved FROM sessions WHERE (model, thread) = (?, ?) ORDER BY saved DESC LIMIT ?)",
                (model, thread, model, thread, SESSIONS_OF_A_THREAD),
            )

    def session_states(self, model: str, thread: str) -> dict[str, str]:
        """By name."""
        found = self._all("SELECT name, state FROM sessions WHERE (model, thread) = (?, ?)", (model, thread))
        return dict(found)

    def sessions(self, model: str, thread: str) -> list[bytes]:
        """Oldest first."""
        found = self._all("SELECT data FROM sessions WHERE (model, thread) = (?, ?) ORDER BY saved", (model, thread))
        return [data for (data,) in found]


def _needed(rows: sqlite3.Connection, kept: Iterable[Place]) -> set[Place]:
    """Ancestors of `kept` whose writes, or whose values, tell what a delta channel of theirs holds."""
    needed: set[Place] = set()
    for place in kept:
        found = rows.execute(
            "SELECT parent, deltas FROM checkpoints WHERE (thread, ns, id) = (?, ?, ?)", place
        ).fetchone()
        parent, open_channels = found[0], set(json.loads(found[1]))
        open_channels -= _valued(rows, place)
        while parent is not None and open_channels:
            ancestor = Place(place.thread, place.ns, parent)
            above = rows.execute("SELECT parent FROM checkpoints WHERE (thread, ns, id) = (?, ?, ?)", ancestor)
            if (row := above.fetchone()) is None:
                break
            needed.add(ancestor)
            open_channels -= _valued(rows, ancestor)
            (parent,) = row
    return needed


def _valued(rows: sqlite3.Connection, place: Place) -> set[str]:
    """Channels that have a value at that checkpoint."""
    found = rows.execute(
        "SELECT channel FROM versions JOIN channel_values USING (thread, ns, channel, version)"
        " WHERE (thread, ns, id) = (?, ?, ?)",
        place,
    )
    return {channel for (channel,) in found}

"""Where items of conversations of the OpenAI Agents SDK are kept: in memory, or in a file that outlives the process.

An item is a JSON object, and belongs to the id of its conversation. The file is a database of SQLite; several processes
may use it, each call is one transaction.
"""

from __future__ import annotations

import copy
import json
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any, Final, Protocol, TypeAlias, final

from agentspeed.errors import InvalidRequest

Item: TypeAlias = Mapping[str, Any]
_MADE: Final = """
CREATE TABLE IF NOT EXISTS agentspeed_items (
    place INTEGER PRIMARY KEY AUTOINCREMENT, session_id TEXT NOT NULL, item TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS agentspeed_items_of ON agentspeed_items (session_id, place);
"""
_PATIENCE: Final = 10.0
"""Seconds that a call waits for another process's."""


class ItemStore(Protocol):
    """The items of one conversation. Calls block, those of a file for as long as a disk takes."""

    def latest(self, most: int | None) -> list[Any]:
        """The latest `most`, or all, in their order; the caller's own."""
        ...

    def add(self, items: Sequence[Item]) -> None:
        """Behind those that there are."""
        ...

    def pop(self) -> Any | None:
        """The latest, which goes; None where there is none."""
        ...

    def clear(self) -> None:
        """All go."""
        ...


@final
class ItemsInMemory:
    """Gone with the process."""

    def __init__(self) -> None:
        self._items: list[Item] = []

    def latest(self, most: int | None) -> list[Any]:
        return copy.deepcopy(self._items if most is None else self._items[max(0, len(self._items) - most) :])

    def add(self, items: Sequence[Item]) -> None:
        self._items += copy.deepcopy(list(items))

    def pop(self) -> Any | None:
        return self._items.pop() if self._items else None

    def clear(self) -> None:
        self._items.clear()


@final
class ItemsInFile:
    """In a file, from the first item on. Every call raises `InvalidRequest` for a file that cannot be used."""

    def __init__(self, path: str | os.PathLike[str], session_id: str) -> None:
        """Raises `InvalidRequest` for what SQLite takes for no file."""
        self._path = os.fspath(path)
        if self._path in ("", ":memory:"):
            raise InvalidRequest(
                f"path is {self._path!r}, which is no file: what is written there ends with each call.",
                remedy="Leave path out to keep the items in memory.",
            )
        self._session_id = session_id

    def latest(self, most: int | None) -> list[Any]:
        wanted = "SELECT item FROM agentspeed_items WHERE session_id = ? ORDER BY place DESC LIMIT ?"
        with self._opened() as file:
            rows = file.execute(wanted, (self._session_id, -1 if most is None else most)).fetchall()
        return [json.loads(item) for (item,) in reversed(rows)]

    def add(self, items: Sequence[Item]) -> None:
        rows = [(self._session_id, json.dumps(item)) for item in items]
        with self._opened() as file:
            _ = file.executemany("INSERT INTO agentspeed_items (session_id, item) VALUES (?, ?)", rows)

    def pop(self) -> Any | None:
        taken = (
            "DELETE FROM agentspeed_items WHERE place = (SELECT MAX(place) FROM agentspeed_items WHERE session_id = ?) "
            "RETURNING item"
        )
        with self._opened() as file:
            row = file.execute(taken, (self._session_id,)).fetchone()
        return None if row is None else json.loads(row[0])

    def clear(self) -> None:
        with self._opened() as file:
            _ = file.execute("DELETE FROM agentspeed_items WHERE session_id = ?", (self._session_id,))

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(sqlite3.connect(self._path, timeout=_PATIENCE)) as file:
                _ = file.executescript(_MADE)
                with file:
                    yield file
        except sqlite3.Error as error:
            raise InvalidRequest(
                f"{self._path} cannot hold the items of conversations: {error}.",
                remedy="Name a file of its own, in a folder that may be written.",
            ) from error

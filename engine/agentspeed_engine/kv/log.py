"""A branch's token log: append-only and shared, so that fork and rewind copy nothing."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import final

_MAX_DEPTH = 24
"""Parts a log may chain before it is flattened: forks of forks must not make reading slow."""


@final
class _Part:
    """Ids [start, start + len(ids)) of every log that reaches here through `base`."""

    __slots__ = ("base", "depth", "ids", "start")

    def __init__(self, base: _Part | None, start: int, ids: array[int]) -> None:
        self.base = base
        self.start = start
        self.ids = ids
        self.depth: int = 0 if base is None else base.depth + 1


@final
class Log:
    """The first `len(log)` ids of a chain of parts. Only the log that owns the last part may append to it."""

    __slots__ = ("_length", "_part")

    def __init__(self) -> None:
        self._part = _Part(None, 0, array("I"))
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def append(self, ids: Sequence[int]) -> None:
        """Ids at the end. Shared parts stay as they are."""
        part = self._part
        if part.start + len(part.ids) != self._length:  # someone else wrote past our end: start a part of our own
            part = self._part = self._extended()
        part.ids.extend(ids)
        self._length += len(ids)

    def fork(self) -> Log:
        """A log with the same ids; neither sees what the other appends."""
        child = Log()
        child._part = self._part
        child._length = self._length
        child._part = child._extended()
        return child

    def cut(self, length: int) -> None:
        """Forgets the ids from `length` on."""
        if length == self._length:
            return
        self._length = length
        part = self._part
        while part.base is not None and part.start > length:
            part = part.base
        self._part = part
        self._part = self._extended()

    def ids(self, start: int, stop: int) -> array[int]:
        """Ids [start, stop) as a fresh array."""
        stop = min(stop, self._length)
        part: _Part | None = self._part
        if self._part.start <= start:
            return self._part.ids[start - self._part.start : stop - self._part.start]
        pieces: list[array[int]] = []
        while part is not None and stop > start:
            if part.start < stop:
                pieces.append(part.ids[max(0, start - part.start) : stop - part.start])
                stop = part.start
            part = part.base
        joined = array("I")
        for piece in reversed(pieces):
            joined.extend(piece)
        return joined

    def packed(self, start: int, stop: int) -> bytes:
        """Ids [start, stop) as little-endian uint32, the form the tree compares."""
        return self.ids(start, stop).tobytes()

    def _extended(self) -> _Part:
        part = self._part
        if part.depth >= _MAX_DEPTH:
            return _Part(None, 0, self.ids(0, self._length))
        return _Part(part, self._length, array("I"))

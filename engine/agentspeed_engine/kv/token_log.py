"""A branch's token log: append-only and shared, so that fork and rewind copy nothing."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, final

_MAX_DEPTH = 24
"""Parts a log may chain before those below are made one: forks of forks must not make reading slow."""


@final
class Part:
    """Ids [start, start + len(ids)) of every log that reaches here through `base`."""

    __slots__ = ("base", "ids", "start")

    def __init__(self, base: Part | None, start: int, ids: array[int]) -> None:
        self.base = base
        self.start = start
        self.ids = ids

    def flatten(self) -> None:
        """Takes in the ids below it. All who reach here share the result, and to none of them does an id change."""
        self.ids = _read(self, 0, self.start + len(self.ids))
        self.base, self.start = None, 0


@final
class Log:
    """The first `len(log)` ids of a chain of parts. Only the log that owns the last part may append to it."""

    __slots__ = ("_length", "_part")

    def __init__(self) -> None:
        self._part = Part(None, 0, array("I"))
        self._length = 0

    if TYPE_CHECKING:

        @property
        def length(self) -> int:
            """`len` of it, without the call that a row of every step would make."""
            ...

    def __len__(self) -> int:
        return self._length

    def append(self, ids: Sequence[int]) -> None:
        """Ids at the end. Shared parts stay as they are."""
        part = self._part
        if part.start + len(part.ids) != self._length:  # someone else wrote past our end: start a part of our own
            part = self._part = _above(part, self._length)
        part.ids.extend(ids)
        self._length += len(ids)

    def fork(self) -> Log:
        """A log with the same ids; neither sees what the other appends."""
        child = Log()
        child._part = _above(self._part, self._length)
        child._length = self._length
        return child

    def cut(self, length: int) -> None:
        """Forgets the ids from `length` on."""
        if length == self._length:
            return
        self._part = _above(self._part, length)
        self._length = length

    def ids(self, start: int, stop: int) -> array[int]:
        """Ids [start, stop) as a fresh array."""
        return _read(self._part, start, min(stop, self._length))

    def packed(self, start: int, stop: int) -> bytes:
        """Ids [start, stop) as little-endian uint32, the form the tree compares."""
        return self.ids(start, stop).tobytes()


if not TYPE_CHECKING:
    Log.length = Log.__dict__["_length"]


def _read(part: Part, start: int, stop: int) -> array[int]:
    if part.start <= start:  # most reads are of the end
        return part.ids[start - part.start : stop - part.start]
    pieces: list[array[int]] = []
    here: Part | None = part
    while here is not None and stop > start:
        if here.start < stop:
            pieces.append(here.ids[max(0, start - here.start) : stop - here.start])
            stop = here.start
        here = here.base
    joined = array("I")
    for piece in reversed(pieces):
        joined.extend(piece)
    return joined


def _above(part: Part, length: int) -> Part:
    """An empty part after the first `length` ids of a chain."""
    while part.base is not None and part.start >= length:  # it has none of them
        part = part.base
    if part.base is not None and _depth(part) >= _MAX_DEPTH:
        part.base.flatten()  # not the new part: what its siblings share is copied once, not for each of them
    return Part(part, length, array("I"))


def _depth(part: Part) -> int:
    """Parts below it. Counted, not kept: flattening one makes every chain through it shorter."""
    depth = 0
    while part.base is not None:
        part = part.base
        depth += 1
    return depth

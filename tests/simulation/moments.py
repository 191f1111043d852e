"""What is still to happen in a run: one heap of moments, in the order of their time, then of their making."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heapify, heappop, heappush
from typing import final


@final
class Moments:
    """Actions and when they come, in virtual seconds."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, bool, Callable[[], None]]] = []
        """When, in which order, whether it is work of the machine, what."""
        self._serial = 0

    def add(self, when: float, action: Callable[[], None], *, work: bool = False) -> None:
        """`work`: it is the machine's own, and comes later when the machine stands still."""
        self._serial += 1
        heappush(self._heap, (when, self._serial, work, action))

    def next_at(self) -> float | None:
        """None: nothing is left that could happen."""
        return self._heap[0][0] if self._heap else None

    def pop(self) -> tuple[float, Callable[[], None]]:
        """The next one: when, and what. Raises IndexError when nothing is left."""
        when, _, _, action = heappop(self._heap)
        return when, action

    def put_off_work(self, seconds: float) -> None:
        """The machine stands still; tools and agents do not."""
        self._heap = [
            (when + seconds if work else when, serial, work, action) for when, serial, work, action in self._heap
        ]
        heapify(self._heap)

"""Free lists of device pages and host slots: the only place that knows which of them have no owner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar, final

from agentspeed_engine.errors import BrokenInvariant

T = TypeVar("T", bound=int)


@final
class Pool(Generic[T]):
    """`total` things numbered from 0. What is taken belongs to the taker until it is given back."""

    __slots__ = ("_free", "_is_free", "total")

    def __init__(self, numbers: Sequence[T]) -> None:
        self.total = len(numbers)
        self._free = list(reversed(numbers))
        self._is_free = bytearray(b"\x01" * len(numbers))

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> tuple[T, ...]:
        """`count` free ones, lowest numbers first when fresh. Asking for more than are free is our bug."""
        if count > len(self._free):
            raise BrokenInvariant(f"{count} asked of a pool with {len(self._free)} free")
        if count == 0:
            return ()
        taken = tuple(reversed(self._free[-count:]))
        del self._free[-count:]
        for number in taken:
            self._is_free[number] = 0
        return taken

    def give(self, numbers: Sequence[T]) -> None:
        """Back to the free list. Giving back what is free already is our bug."""
        for number in numbers:
            if self._is_free[number]:
                raise BrokenInvariant(f"{number} given back twice")
            self._is_free[number] = 1
        self._free.extend(reversed(numbers))

    def free_numbers(self) -> tuple[T, ...]:
        """For the ledger."""
        return tuple(self._free)

"""Objects that own something and give it away exactly once: what the states of both machines are built on."""

from __future__ import annotations

from typing import Generic, NoReturn, TypeVar

from agentspeed_engine.errors import BrokenInvariant

T = TypeVar("T")


class UseAfterMove(BrokenInvariant):
    """A state object was used after a verb had consumed it."""


def refuse_copy(self: object, *_: object) -> NoReturn:
    """`__copy__`, `__deepcopy__` and `__reduce__` of everything that owns pages."""
    raise BrokenInvariant(f"{type(self).__name__} owns pages and cannot be copied")


class Linear(Generic[T]):
    """Owns one value. A verb moves it out with `_take` and hands it to the successor; from then on every look at it
    raises `UseAfterMove`. It refuses to be copied and pickled, so there is never a second owner.

    Python checks none of this statically. What is static is which verbs a state has; that an object is used once is
    checked here, at run time."""

    __slots__ = ("_held",)
    __copy__ = __deepcopy__ = __reduce__ = refuse_copy

    def __init__(self, held: T) -> None:
        self._held: T | None = held

    def _look(self) -> T:
        """The value, which stays. Raises `UseAfterMove`."""
        if self._held is None:
            raise UseAfterMove(type(self).__name__)
        return self._held

    def _take(self) -> T:
        """The value, moved out. Raises `UseAfterMove`."""
        held, self._held = self._look(), None
        return held

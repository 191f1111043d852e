"""Objects that own something and give it away exactly once: what the states of both machines are built on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Generic, NoReturn, TypeVar

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
        self._held = held

    def _take(self) -> T:
        """The value, moved out. Raises `UseAfterMove`."""
        held = self._held
        del self._held
        return held

    if not TYPE_CHECKING:  # a checker would take every name for an attribute

        def __getattr__(self, name: str) -> NoReturn:
            """Python asks here for what is not there: the value that was moved out, or an attribute that never was, as
            it asks every object for hooks such as `__setstate__`."""
            try:
                HELD.__get__(self)
            except AttributeError:
                if not name.startswith("__"):
                    raise UseAfterMove(type(self).__name__) from None
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)


HELD: Final[Any] = Linear.__dict__["_held"]
"""The slot itself, which subclasses give a name of their own: what they own is looked at several times for every row of
every step, and a property would be a call each time. After a move it raises `UseAfterMove`, as `_take` does."""

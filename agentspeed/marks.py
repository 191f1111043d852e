"""Places in a session: a mark to come back to, and what a mark, a name or a number stands for."""

from __future__ import annotations

from collections.abc import Container
from typing import final

from agentspeed import errors
from agentspeed._base.validate import is_whole, shown
from agentspeed.chat.token_log import Checkpoint, TokenLog


@final
class Mark:
    """A token position that can be returned to, in the session that made it and in what was forked from it since."""

    __slots__ = ("_digest", "name", "point")

    def __init__(self, name: str | None, mirror: TokenLog) -> None:
        self.name = name
        self.point = mirror.checkpoint()
        self._digest = mirror.digest(self.tokens)

    def fits(self, mirror: TokenLog) -> bool:
        """Whether the log still begins with the ids that it had here."""
        return self.tokens <= len(mirror) and mirror.digest(self.tokens) == self._digest

    @property
    def tokens(self) -> int:
        return self.point.tokens

    def __repr__(self) -> str:
        return f"<Mark {self.name or ''}@{self.tokens}>"


def place_of(log: TokenLog, to: Mark | str | int, compacted: Container[str]) -> Checkpoint:
    """Where a mark, the name of one or a position in tokens is. `compacted`: names of marks that stood among what a
    compaction dropped. Raises `MarkNotFound`."""
    if isinstance(to, str):
        if to not in log.marks:
            known = ", ".join(log.marks) or "none"
            gone = f"The mark {to!r} stood among messages that compact() dropped"
            why = gone if to in compacted else f"There is no mark {to!r}"
            raise errors.MarkNotFound(f"{why}; the marks are: {known}.")
        return log.marks[to]
    if isinstance(to, Mark):
        if not to.fits(log):
            raise errors.MarkNotFound(
                f"{to!r} is not in this session any more.",
                remedy="It was rewound to before the mark, or compacted since; make a new one. Named marks move with "
                "what compact() keeps.",
            )
        return to.point
    if not is_whole(to):
        raise errors.MarkNotFound(
            f"{shown(to)} is no mark, name or position.",
            remedy="Give what mark() gave, a mark's name, or a number of tokens.",
        )
    if not 0 <= to <= len(log):
        raise errors.MarkNotFound(f"Position {shown(to)} is not in a session of {len(log)} tokens.")
    return log.at(to)


def end_of(log: TokenLog, messages: int) -> int:
    """Where the first `messages` messages end, in tokens. Raises `InvalidRequest`."""
    if not is_whole(messages) or not 0 <= messages <= len(log.spans):
        raise errors.InvalidRequest(f"messages is {messages!r}; the session has {len(log.spans)}.")
    return log.spans[messages].start if messages < len(log.spans) else len(log)

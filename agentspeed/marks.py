"""A place in a session to come back to."""

from __future__ import annotations

from typing import final

from agentspeed.chat.token_log import TokenLog


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

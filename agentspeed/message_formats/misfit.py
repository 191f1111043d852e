"""What is raised for a message that cannot be read."""

from __future__ import annotations

from typing import final

from agentspeed.errors import InvalidRequest


@final
class MessageMisfit(InvalidRequest):
    """A message or a tool that this product cannot read. `where`: its path in what was given."""

    def __init__(self, message: str, *, where: str) -> None:
        super().__init__(message)
        self.where = where


def misfit(message: str, where: str) -> MessageMisfit:
    """To be raised."""
    return MessageMisfit(message, where=where)

"""The marks around reasoning and tool calls: one record that the grammar writes by and the parser reads by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from agentspeed.chat.calls import DEFAULT_CALLS, CallFormat


@dataclass(frozen=True, slots=True, kw_only=True)
class Tags:
    """A family's marks. `ids` has the token id of each mark that is one special token of the vocabulary.

    A special token's text never appears in ordinary tokens of a grammar, so the grammar must name it by id; a mark
    that is ordinary text is matched byte by byte, however it is split over tokens."""

    calls: CallFormat = DEFAULT_CALLS
    think_open: str = "<think>"
    think_close: str = "</think>"
    lead: str = ""
    """What a model writes before its text when it does not think first, and no part of the text: a space, or an end of
    line."""
    roomy: bool = False
    """Ends of lines around reasoning are the template's, not the model's."""
    thinking: bool = False
    """The prompt opens the reasoning: a message begins inside of it."""
    thinks: bool = False
    """The template shows reasoning in every answer, so the model may always think, asked or not."""
    text_end: str = ""
    """A control token that the model may write after its text, where that token does not end the turn: calls may
    follow it."""
    ids: Mapping[str, int] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        marks = (self.call_open, self.think_open, self.think_close)
        if not all(marks) or len({*marks, self.call_close}) != len(marks) + 1:
            raise ValueError(f"tags must be different, non-empty marks, not {(*marks, self.call_close)}.")

    @property
    def call_open(self) -> str:
        """What in a text begins calls."""
        return self.calls.trigger

    @property
    def call_close(self) -> str:
        """The tag that ends a call; empty where its JSON ends it."""
        return self.calls.close_mark


DEFAULT_TAGS: Final = Tags()

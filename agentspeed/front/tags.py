"""The marks around reasoning and tool calls: one record that the grammar writes by and the parser reads by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Tags:
    """A family's marks. `ids` has the token id of each mark that is one special token of the vocabulary.

    A special token's text never appears in ordinary tokens of a grammar, so the grammar must name it by id; a mark
    that is ordinary text is matched byte by byte, however it is split over tokens."""

    call_open: str = "<tool_call>"
    call_close: str = "</tool_call>"
    think_open: str = "<think>"
    think_close: str = "</think>"
    ids: Mapping[str, int] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        marks = (self.call_open, self.call_close, self.think_open, self.think_close)
        if not all(marks) or len(set(marks)) != len(marks):
            raise ValueError(f"tags must be four different, non-empty marks, not {marks}.")


DEFAULT_TAGS: Final = Tags()

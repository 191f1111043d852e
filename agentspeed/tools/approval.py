"""Whether a call may run: who is asked, what they are shown, and what they may answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, final

from agentspeed.messages import ToolCall


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Approval:
    """An answer of `approve` that says more than yes or no."""

    allow: bool
    reason: str = ""
    """Told to the model when the call is denied."""
    arguments: Mapping[str, Any] | None = None
    """What the tool is run with instead of what the model wrote, checked as the model's own are; the model is told them
    with the result. None: as the model wrote them."""
    later: bool = False
    """With `allow=False`: nobody has decided. The call stays open; once the others have their results, the run ends
    with the reason "approval". The next run of the session, or of its snapshot anywhere, asks again."""


Answer: TypeAlias = bool | Approval
Approve: TypeAlias = Callable[[ToolCall], Answer | Awaitable[Answer]]
"""Asked about each call that needs approval. The call it is given has every argument that the tool will run with, the
defaults of those that the model left out among them."""

"""What a tool is told about the call it serves: given to any parameter annotated `ToolContext`, never to the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

D = TypeVar("D")


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolContext(Generic[D]):
    """The call, the session that made it and the user's own data (`session.run(..., tool_data=...)`).

    While tools run the session takes no turns and no messages (`SessionBusy`): they would come between a call and its
    result. A tool that needs the model forks it, or opens another session."""

    call_id: str
    tool: str
    session: object
    data: D

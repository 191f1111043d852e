"""What a tool is told about the call it serves: given to any parameter annotated `ToolContext`, never to the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

D = TypeVar("D")


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolContext(Generic[D]):
    """The call, the session that made it and the user's own data (`Session(..., tool_data=...)`)."""

    call_id: str
    tool: str
    session: object
    data: D

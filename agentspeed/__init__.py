"""agentspeed: async agent sessions on a session-aware LLM inference engine.

Importing it never imports torch; names are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agentspeed import errors as errors
    from agentspeed import events as events
    from agentspeed import messages as messages
    from agentspeed import search as search
    from agentspeed import testing as testing
    from agentspeed import tools as tools
    from agentspeed.chat.output import Choice as Choice
    from agentspeed.chat.output import Regex as Regex
    from agentspeed.chat.output import Schema as Schema
    from agentspeed.compaction import Compaction as Compaction
    from agentspeed.delegation import hand_off as hand_off
    from agentspeed.delegation import sub_agent as sub_agent
    from agentspeed.engine import Engine as Engine
    from agentspeed.limits import Limits as Limits
    from agentspeed.marks import Mark as Mark
    from agentspeed.messages import Assistant as Assistant
    from agentspeed.messages import System as System
    from agentspeed.messages import ToolCall as ToolCall
    from agentspeed.messages import ToolMessage as ToolMessage
    from agentspeed.messages import User as User
    from agentspeed.replies import Reply as Reply
    from agentspeed.replies import Result as Result
    from agentspeed.run_stream import RunStream as RunStream
    from agentspeed.sampling import Sampling as Sampling
    from agentspeed.score import Score as Score
    from agentspeed.session import Session as Session
    from agentspeed.tools import Approval as Approval
    from agentspeed.tools import Tool as Tool
    from agentspeed.tools import ToolContext as ToolContext
    from agentspeed.tools import tool as tool
    from agentspeed.trajectory import Trajectory as Trajectory
    from agentspeed.turn import Turn as Turn
    from agentspeed.usage import Lease as Lease
    from agentspeed.usage import Starting as Starting
    from agentspeed.usage import Usage as Usage

__version__ = "0.1.0"

_HOMES = {
    "Approval": "tools",
    "Compaction": "compaction",
    "Engine": "engine",
    "hand_off": "delegation",
    "sub_agent": "delegation",
    "Choice": "chat.output",
    "Regex": "chat.output",
    "Schema": "chat.output",
    "Assistant": "messages",
    "System": "messages",
    "ToolCall": "messages",
    "ToolMessage": "messages",
    "User": "messages",
    "RunStream": "run_stream",
    "Sampling": "sampling",
    "Limits": "limits",
    "Mark": "marks",
    "Score": "score",
    "Session": "session",
    "Tool": "tools",
    "ToolContext": "tools",
    "tool": "tools",
    "Reply": "replies",
    "Result": "replies",
    "Trajectory": "trajectory",
    "Turn": "turn",
    "Lease": "usage",
    "Starting": "usage",
    "Usage": "usage",
}
_MODULES = ("errors", "events", "messages", "search", "testing", "tools")
__all__ = [
    "Approval",
    "Assistant",
    "Choice",
    "Compaction",
    "Engine",
    "Lease",
    "Limits",
    "Mark",
    "Regex",
    "Reply",
    "Result",
    "RunStream",
    "Sampling",
    "Schema",
    "Score",
    "Session",
    "Starting",
    "System",
    "Tool",
    "ToolCall",
    "ToolContext",
    "ToolMessage",
    "Trajectory",
    "Turn",
    "Usage",
    "User",
    "__version__",
    "errors",
    "events",
    "hand_off",
    "messages",
    "search",
    "sub_agent",
    "testing",
    "tool",
    "tools",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"agentspeed.{_HOMES[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"agentspeed.{name}")
    raise AttributeError(f"module 'agentspeed' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

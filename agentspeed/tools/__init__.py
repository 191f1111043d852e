"""Typed functions as tools: what a model is told about them, and how its calls are checked and run."""

from agentspeed.tools.approval import Approval, Approve
from agentspeed.tools.context import Report, ToolContext, ToolSession
from agentspeed.tools.execution import (
    CANCELLED,
    ToolBatch,
    ToolResult,
    check_arguments,
    content_of,
    execute,
)
from agentspeed.tools.schema import DEFAULT_BOUNDS, Bounds
from agentspeed.tools.tool import NeedsApproval, OnError, Tool, declared_tool, tool, tools_from

__all__ = [
    "CANCELLED",
    "DEFAULT_BOUNDS",
    "Approval",
    "Approve",
    "Bounds",
    "NeedsApproval",
    "OnError",
    "Report",
    "Tool",
    "ToolBatch",
    "ToolContext",
    "ToolResult",
    "ToolSession",
    "check_arguments",
    "content_of",
    "declared_tool",
    "execute",
    "tool",
    "tools_from",
]

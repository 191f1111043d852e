"""Every error a user of agentspeed can meet, in three families: your input, the world, our bug.

The same classes locally and remotely; engine errors travel as codes and one border (`backends`) makes these of them.
"""

from __future__ import annotations


class AgentspeedError(Exception):
    """Base of all. `remedy` says what to do; `retryable` whether the same call may succeed later."""

    retryable: bool = False

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message} {self.remedy}" if self.remedy else self.message


# ---- your input -----------------------------------------------------------------------------------------------------
class InputError(AgentspeedError, ValueError):
    """What was asked cannot be done as asked."""


class RequestError(InputError):
    """One call's arguments."""


class SchemaUnsupported(RequestError):
    """A schema, regex or choice under which output might never end, or that the grammar cannot express."""


class ToolError(InputError):
    """One tool call did not succeed; its text is what the model is told."""

    def __init__(self, message: str, *, tool: str = "", remedy: str = "") -> None:
        super().__init__(message, remedy=remedy)
        self.tool = tool


class UnknownTool(ToolError):
    """The model named a tool that was not offered."""


class BadArguments(ToolError):
    """The model's arguments do not fit the tool's hints."""


class ToolDenied(ToolError):
    """The call needed approval and did not get it."""


class ToolTimeout(ToolError):
    """The tool took longer than its timeout."""


class ToolFailed(ToolError):
    """The tool raised; the cause is chained."""


class OutputError(InputError):
    """What the model wrote is not what `output=` asks for."""

    def __init__(self, message: str, *, text: str = "", remedy: str = "") -> None:
        super().__init__(message, remedy=remedy)
        self.text = text

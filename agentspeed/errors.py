"""Every error a user of agentspeed can meet, in three families: your input, the world, our bug.

The same classes locally and remotely; engine errors travel as codes and one border (`transport`) makes these of them.

    AgentspeedError
    ├── InputError (also ValueError)      your input: change the call
    │   ├── RequestError                  InvalidRequest InvalidSampling ContextOverflow SchemaUnsupported
    │   │                                 ModelUnsupported ModelBroken TemplateUnstable LimitReached
    │   ├── SessionError                  SessionClosed SessionBusy MarkNotFound TrunkMoved ChildUnrelated
    │   ├── ToolError                     UnknownTool BadArguments ToolDenied ToolTimeout ToolFailed
    │   └── OutputError                   the text is not what `output=` asks for
    ├── WorldError                        the world: `retryable` says whether the same call may succeed later
    │   ├── EngineError                   EngineOverloaded EngineDied EngineStartFailed ExtraMissing
    │   └── TransportError                ConnectFailed TurnTimeout
    └── InternalError                     our bug: the engine stops rather than going on wrongly
"""

from __future__ import annotations

from collections.abc import Mapping


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


class InvalidRequest(RequestError):
    """An argument is out of its range."""


class InvalidSampling(RequestError):
    """A sampling value is out of its range."""


class ContextOverflow(RequestError):
    """The tokens do not fit into the model's context, or into all the pages that a tenant may have."""


class ModelUnsupported(RequestError):
    """The model's type is not one this engine runs."""


class ModelBroken(RequestError):
    """The model folder contradicts itself, or a file of it is missing or damaged."""


class TemplateUnstable(RequestError):
    """The chat template renders an earlier message differently once later ones exist: ids cannot be appended."""


class LimitReached(RequestError):
    """A limit of the run that the turn belongs to is used up; the message says whose, and who spent it.

    `limit`: which of `Limits`; `spent`: of what it counts, by the id of the session that spent it."""

    def __init__(
        self, message: str, *, limit: str = "", spent: Mapping[str, int] | None = None, remedy: str = ""
    ) -> None:
        super().__init__(message, remedy=remedy)
        self.limit = limit
        self.spent: Mapping[str, int] = spent or {}


class SchemaUnsupported(RequestError):
    """A schema, regex or choice under which output might never end, or that the grammar cannot express."""


class SessionError(InputError):
    """The session is not in the state this call needs."""


class SessionClosed(SessionError):
    """The session's block has been left, or was never entered."""


class SessionBusy(SessionError):
    """A turn is running: one turn at a time; fork to go two ways at once."""


class MarkNotFound(SessionError):
    """There is no such mark, or the session was rewound to before it."""


class TrunkMoved(SessionError):
    """The trunk went on after the fork: adopting the child would lose what came since."""


class ChildUnrelated(SessionError):
    """Only a child of this very session can be adopted."""


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


# ---- the world ------------------------------------------------------------------------------------------------------
class WorldError(AgentspeedError):
    """Something outside the call failed."""


class EngineError(WorldError):
    """The engine cannot do it now."""


class EngineOverloaded(EngineError):
    """A bound of the engine is reached: sessions, branches, waiting turns, quotas."""

    retryable = True


class EngineDied(EngineError):
    """The engine process ended during the call. Committed messages are safe: the next use opens them anew."""

    retryable = True


class EngineStartFailed(EngineError):
    """The engine process could not be started."""


class ExtraMissing(EngineError):
    """A part of the distribution is not installed; `remedy` names the extra."""


class TransportError(WorldError):
    """The way to the engine."""


class ConnectFailed(TransportError):
    """No engine listens at the address."""

    retryable = True


class TurnTimeout(TransportError):
    """The turn took longer than its timeout; it was cancelled and the session is usable. `partial`: its text so far."""

    retryable = True

    def __init__(self, message: str, *, partial: str = "", remedy: str = "") -> None:
        super().__init__(message, remedy=remedy)
        self.partial = partial


# ---- our bug --------------------------------------------------------------------------------------------------------
class InternalError(AgentspeedError):
    """A rule of agentspeed's own was broken. Please report it with the engine's log."""

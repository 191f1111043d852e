"""What goes wrong, as HTTP says it: one table from the SDK's errors to statuses, and the shapes clients expect."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

from agentspeed import errors
from agentspeed.message_formats.misfit import MessageMisfit


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One refusal or failure. `retry_after`: seconds after which the same request may succeed."""

    status: int
    kind: str
    message: str
    code: str | None = None
    param: str | None = None
    retry_after: int | None = None

    def openai(self) -> dict[str, Any]:
        """The body that OpenAI's clients read."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def anthropic(self, request_id: str) -> dict[str, Any]:
        """The body that Anthropic's clients read."""
        kind = _ANTHROPIC.get(self.status, "api_error" if self.status >= 500 else "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": self.message}, "request_id": request_id}


_ANTHROPIC = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class RequestProblem(Exception):
    """A request that the server itself refuses."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


def refused(message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> RequestProblem:
    """A wrong request, to be raised."""
    return RequestProblem(Problem(status=status, kind="invalid_request_error", message=message, param=param, code=code))


def problem_of(error: errors.AgentspeedError) -> Problem:
    """What an error of the SDK is over HTTP."""
    message = str(error)
    match error:
        case MessageMisfit(where=where):
            return Problem(status=400, kind="invalid_request_error", message=message, param=where)
        case errors.ContextOverflow():
            return Problem(status=400, kind="invalid_request_error", message=message, code="context_length_exceeded")
        case errors.ModelUnsupported() | errors.ModelBroken() | errors.TemplateUnstable():
            return Problem(status=500, kind="server_error", message=message, code="model_broken")
        case errors.OutputError():
            return Problem(status=422, kind="invalid_request_error", message=message, code="output_invalid")
        case errors.SessionBusy():
            return Problem(status=409, kind="invalid_request_error", message=message, code="session_busy")
        case errors.SessionClosed():
            return Problem(status=410, kind="invalid_request_error", message=message, code="session_closed")
        case errors.InputError():
            return Problem(status=400, kind="invalid_request_error", message=message, code=_code(error))
        case errors.EngineOverloaded():
            return Problem(
                status=429, kind="rate_limit_error", message=message, code="engine_overloaded", retry_after=1
            )
        case errors.TurnTimeout():
            return Problem(status=504, kind="timeout_error", message=message, code="turn_timeout")
        case errors.WorldError():
            return Problem(status=503, kind="server_error", message=message, code=_code(error), retry_after=1)
        case _:
            return Problem(status=500, kind="server_error", message=message, code="internal_error")


def _code(error: errors.AgentspeedError) -> str:
    name = type(error).__name__
    return "".join(f"_{sign.lower()}" if sign.isupper() else sign for sign in name).lstrip("_")

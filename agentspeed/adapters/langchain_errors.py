"""Our errors as LangChain's: each is both, so that code that catches either goes on working."""

from __future__ import annotations

from typing import Any

from langchain_core import exceptions as lc

from agentspeed import errors

_KINDS: tuple[tuple[type[errors.AgentspeedError], type[lc.ModelError]], ...] = (
    (errors.ContextOverflow, lc.ContextOverflowError),
    (errors.TurnTimeout, lc.ModelTimeoutError),
    (errors.EngineOverloaded, lc.ModelRateLimitError),
    (errors.ModelBroken, lc.ModelNotFoundError),
    (errors.ConnectFailed, lc.ModelConnectionError),
    (errors.WorldError, lc.ModelAPIError),
    (errors.InputError, lc.ModelInvalidRequestError),
    (errors.InternalError, lc.ModelAPIError),
)
"""The first that fits."""
_MADE: dict[type[errors.AgentspeedError], type[errors.AgentspeedError]] = {}


def public(error: errors.AgentspeedError) -> errors.AgentspeedError:
    """The same error, as an instance of its own class and of LangChain's."""
    kind = type(error)
    if kind not in _MADE:
        theirs = next((theirs for ours, theirs in _KINDS if issubclass(kind, ours)), lc.ModelError)
        made: Any = type(
            kind.__name__,
            (kind, theirs),
            {"__doc__": kind.__doc__, "__module__": __name__, "is_retryable": kind.retryable},
        )
        _MADE[kind] = made
    found = _MADE[kind].__new__(_MADE[kind], *error.args)
    found.__dict__.update(error.__dict__)
    found.args = error.args
    return found

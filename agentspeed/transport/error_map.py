"""The one border where what an engine refuses becomes a public error."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from agentspeed import errors
from agentspeed.errors import AgentspeedError
from agentspeed_engine.protocol.codes import EngineFault
from agentspeed_engine.protocol.credential import credential

_CLASSES: dict[str, type[AgentspeedError]] = {
    "unsupported_model": errors.ModelUnsupported,
    "bad_config": errors.ModelBroken,
    "bad_options": errors.InvalidRequest,
    "bad_weights": errors.ModelBroken,
    "bad_tokenizer": errors.ModelBroken,
    "invalid_request": errors.InvalidRequest,
    "context_overflow": errors.ContextOverflow,
    "invalid_sampling": errors.InvalidSampling,
    "schema_unsupported": errors.SchemaUnsupported,
    "branch_unknown": errors.SessionClosed,
    "branch_busy": errors.SessionBusy,
    "branch_closed": errors.SessionClosed,
    "trunk_moved": errors.TrunkMoved,
    "child_unrelated": errors.ChildUnrelated,
    "position_unknown": errors.MarkNotFound,
    "bad_frame": errors.InternalError,
    "protocol_mismatch": errors.ConnectFailed,
    "bad_credential": errors.InvalidRequest,
    "overloaded": errors.EngineOverloaded,
    "too_many_links": errors.EngineOverloaded,
    "too_many_sessions": errors.EngineOverloaded,
    "too_many_branches": errors.EngineOverloaded,
    "quota_exceeded": errors.EngineOverloaded,
    "out_of_memory": errors.EngineStartFailed,
    "engine_stopping": errors.EngineDied,
    "rank_lost": errors.EngineDied,
    "device_lost": errors.EngineDied,
    "internal": errors.InternalError,
}


def public_error(code: str, message: str, remedy: str) -> AgentspeedError:
    """The public class for an engine's code; an unknown code is a bug of ours and says so."""
    return _CLASSES.get(code, errors.InternalError)(message, remedy=remedy)


def last_words(code: str, message: str, remedy: str) -> AgentspeedError:
    """Of an engine that ends: where no memory was left for a step, it was no start that failed."""
    return public_error("engine_stopping" if code == "out_of_memory" else code, message, remedy)


@contextlib.contextmanager
def converted() -> Iterator[None]:
    """What engine code raises in this process, as public errors."""
    try:
        yield
    except EngineFault as fault:
        raise public_error(fault.code, fault.message, fault.remedy) from fault


def shown_credential() -> str:
    """What this process shows an engine in its greeting. Raises `InvalidRequest` when its file is no use."""
    with converted():
        return credential(os.environ)

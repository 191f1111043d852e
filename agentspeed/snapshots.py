"""Sessions as bytes: everything that is needed to open one again, and no KV."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from agentspeed import errors
from agentspeed.front.mirror import Checkpoint, Span
from agentspeed.messages import Assistant, System, ToolMessage, User
from agentspeed.sampling import Sampling

if TYPE_CHECKING:
    from agentspeed.session import Session

VERSION = 1


class _Span(msgspec.Struct, frozen=True, array_like=True):
    message: System | User | Assistant | ToolMessage
    start: int
    end: int


class _Mark(msgspec.Struct, frozen=True, array_like=True):
    name: str
    tokens: int
    spans: list[_Span]
    open_at: int | None
    owed: tuple[int, ...]


class _Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    version: int
    name: str
    system: str | None
    tools: str
    """Digest of the tool definitions that the log's first message holds."""
    sampling: dict[str, float | int | None]
    private: bool
    tenant: str
    seed: int
    ids: bytes
    made: bytes
    logprobs: bytes
    spans: list[_Span]
    open_at: int | None
    owed: tuple[int, ...]
    marks: list[_Mark]


def dump(session: Session) -> bytes:
    """msgpack; readable by `load` of the same version."""
    mirror = session._branch.mirror
    sampling = session.defaults.sampling
    return msgspec.msgpack.encode(_Snapshot(
        version=VERSION, name=session.id, system=session.system, tools=_digest(session),
        sampling={"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p,
                  "min_p": sampling.min_p},
        private=session.opening.private, tenant=session.opening.tenant, seed=session.opening.seed,
        ids=mirror.ids.tobytes(), made=bytes(mirror.made), logprobs=mirror.logprobs.tobytes(),
        spans=_dumped(mirror.spans),
        open_at=mirror.open_at, owed=mirror.owed,
        marks=[_Mark(name, point.tokens, _dumped(point.spans), point.open_at, point.owed)
               for name, point in mirror.marks.items()],
    ))


def load(data: bytes, model: Any, options: dict[str, Any]) -> Session:
    """A session that has not been entered yet. Raises `InvalidRequest`."""
    from agentspeed.session import Session

    try:
        found = msgspec.msgpack.decode(data, type=_Snapshot)
        ids, logprobs = array("I"), array("d")
        ids.frombytes(found.ids)
        logprobs.frombytes(found.logprobs)
    except (msgspec.DecodeError, ValueError, TypeError) as error:
        raise errors.InvalidRequest(f"This is no session snapshot: {error}.") from error
    if found.version != VERSION:
        raise errors.InvalidRequest(f"The snapshot has version {found.version}; this agentspeed reads {VERSION}.")
    if not len(ids) == len(logprobs) == len(found.made):
        raise errors.InvalidRequest("The snapshot is damaged: its parts have different lengths.")
    if options.get("system", found.system) != found.system:
        raise errors.InvalidRequest("A restored session's system text is in the log and cannot be another.",
                                    remedy="Leave system= out, or start a new session.")
    given = {"system": found.system, "private": found.private, "tenant": found.tenant, "seed": found.seed,
             "name": found.name, "sampling": Sampling(**found.sampling)}  # type: ignore[arg-type]
    session = Session(model, **{**given, **options})
    if _digest(session) != found.tools:
        raise errors.InvalidRequest("The tools are not those of the snapshot.",
                                    remedy="Pass tools=[...] with the same functions: the log describes them.")
    mirror = session._branch.mirror
    mirror.ids, mirror.logprobs, mirror.made = ids, logprobs, bytearray(found.made)
    mirror.spans = list(_loaded(found.spans))
    mirror.open_at, mirror.owed = found.open_at, found.owed
    mirror.marks = {
        mark.name: Checkpoint(mark.tokens, _loaded(mark.spans), mark.open_at, mark.owed) for mark in found.marks
    }
    return session


def _dumped(spans: Sequence[Span]) -> list[_Span]:
    return [_Span(span.message, span.start, span.end) for span in spans]


def _loaded(spans: list[_Span]) -> tuple[Span, ...]:
    return tuple(Span(span.message, span.start, span.end) for span in spans)


def _digest(session: Session) -> str:
    definitions = msgspec.json.encode([tool.definition() for tool in session.tools])
    return hashlib.sha256(definitions).hexdigest()

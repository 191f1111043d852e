"""Sessions as bytes: everything that is needed to read one, or to open it again on any engine of its model; no KV."""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import msgspec

from agentspeed._core.options import SessionOptions
from agentspeed._core.session_core import SessionCore
from agentspeed.chat.codec import History
from agentspeed.chat.token_log import Checkpoint, Span
from agentspeed.errors import InvalidRequest
from agentspeed.messages import Assistant, System, ToolMessage, User
from agentspeed.sampling import Sampling

VERSION: Final = 4
_NOTES: Final = ("description", "title", "examples", "$comment")
"""Keywords of a schema that only say something to a reader."""


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


class _Sampling(msgspec.Struct, frozen=True, kw_only=True):
    temperature: float
    top_k: int | None
    top_p: float
    min_p: float
    frequency_penalty: float
    presence_penalty: float
    repetition_penalty: float
    logit_bias: dict[int, float]


class _Header(msgspec.Struct, frozen=True, kw_only=True):
    version: int


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """What `dump` wrote, read back."""

    version: int
    name: str
    system: str | None
    tools: str
    """The definitions that the log's first message holds, as JSON: their bounds may be numbers of any length."""
    sampling: _Sampling
    max_tokens: int | None = None
    timeout: float | None
    close_timeout: float
    idle_timeout: float | None = None
    record_logprobs: bool
    reasoning: bool
    history_reasoning: History
    template_variables: str
    """As JSON: numbers of any length."""
    private: bool
    tenant: str
    seed: int
    tokenizer: str
    ids: bytes
    made: bytes
    logprobs: bytes
    draw_logprobs: bytes
    spans: list[_Span]
    open_at: int | None
    owed: tuple[int, ...]
    marks: list[_Mark]
    hidden: list[tuple[int, int]]
    """Stop texts, as the log counts them."""
    plain: bool = False
    results: list[ToolMessage]
    """Of open calls: those that had arrived and waited for others."""
    births: int = 0
    """Children that it had: the next one's number is another than theirs."""

    @property
    def definitions(self) -> list[dict[str, Any]]:
        """Of the tools. Raises `ValueError` where they are none."""
        found = json.loads(self.tools)
        if not (isinstance(found, list) and all(isinstance(one, dict) for one in found)):
            raise ValueError("its tools are no list of definitions")
        return found


def dump(core: SessionCore, tokenizer: str) -> bytes:
    """msgpack; read by `load` of the same version. `tokenizer`: the fingerprint of the engine's."""
    log, defaults, opening = core.log, core.defaults, core.branch.opening
    sampling = defaults.sampling
    return msgspec.msgpack.encode(
        Snapshot(
            version=VERSION,
            name=core.id,
            system=core.system,
            tools=json.dumps(core.described),
            sampling=_Sampling(**{name: getattr(sampling, name) for name in _Sampling.__struct_fields__}),
            max_tokens=defaults.max_tokens,
            timeout=defaults.timeout,
            close_timeout=opening.close_timeout,
            idle_timeout=core.idle_timeout,
            record_logprobs=defaults.record_logprobs,
            reasoning=defaults.reasoning,
            history_reasoning=defaults.history_reasoning,
            template_variables=json.dumps(dict(defaults.template_variables)),
            private=opening.private,
            tenant=opening.tenant,
            seed=opening.seed,
            tokenizer=tokenizer,
            ids=log.ids.tobytes(),
            made=bytes(log.made),
            logprobs=log.logprobs.tobytes(),
            draw_logprobs=log.draw_logprobs.tobytes(),
            spans=_dumped(log.spans),
            open_at=log.open_at,
            owed=log.owed,
            marks=[
                _Mark(name, point.tokens, _dumped(point.spans), point.open_at, point.owed)
                for name, point in log.marks.items()
            ],
            hidden=log.hidden,
            plain=defaults.plain,
            results=list(core.pending.waiting()),
            births=core.births,
        )
    )


def load(data: bytes) -> Snapshot:
    """Raises `InvalidRequest` for what is no snapshot, is damaged, or has another version."""
    try:
        version = msgspec.msgpack.decode(data, type=_Header).version
        if version != VERSION:
            raise InvalidRequest(
                f"The snapshot has version {version}; this agentspeed reads version {VERSION}.",
                remedy="Read it with the agentspeed that wrote it, and add its messages to a new session here.",
            )
        found = msgspec.msgpack.decode(data, type=Snapshot)
        tokens = len(_array("I", found.ids))
        logprobs = {len(_array("d", found.logprobs)), len(_array("d", found.draw_logprobs))}
        _ = found.definitions
        if not isinstance(json.loads(found.template_variables), dict):
            raise ValueError("its template variables are no object")
    except InvalidRequest:
        raise
    except (msgspec.DecodeError, ValueError, TypeError, RecursionError) as error:
        raise InvalidRequest(f"This is no session snapshot: {error}.", remedy="Give what snapshot() gave.") from error
    if logprobs != {tokens} or len(found.made) != tokens:
        raise _damaged("its parts have different lengths")
    points = [(found.spans, found.open_at, tokens), *((mark.spans, mark.open_at, mark.tokens) for mark in found.marks)]
    if not all(length in range(tokens + 1) and _fits(spans, open_at, length) for spans, open_at, length in points):
        raise _damaged("it names places that its log does not have")
    return found


def _damaged(why: str) -> InvalidRequest:
    return InvalidRequest(
        f"The snapshot is damaged: {why}.",
        remedy="Restore an earlier one, or add the messages that you have to a new session.",
    )


def options_of(found: Snapshot, given: SessionOptions) -> SessionOptions:
    """What the session is made with: what is given, else what it had. Raises `InvalidRequest` for another system
    text."""
    if given.get("system", found.system) != found.system:
        raise InvalidRequest(
            "A restored session's system text is in the log and cannot be another.",
            remedy="Leave system= out, or start a new session.",
        )
    kept: SessionOptions = {
        "system": found.system,
        "sampling": Sampling(**{name: getattr(found.sampling, name) for name in _Sampling.__struct_fields__}),
        "max_tokens": found.max_tokens,
        "timeout": found.timeout,
        "close_timeout": found.close_timeout,
        "idle_timeout": found.idle_timeout,
        "record_logprobs": found.record_logprobs,
        "reasoning": found.reasoning,
        "history_reasoning": found.history_reasoning,
        "template_variables": json.loads(found.template_variables),
        "private": found.private,
        "tenant": found.tenant,
        "seed": found.seed,
        "name": found.name,
    }
    return {**kept, **given}


def fill(core: SessionCore, found: Snapshot) -> None:
    """Makes a session that was not entered yet go on where the snapshot was taken. Raises `InvalidRequest` for tools
    that the log does not describe so."""
    described = {str(definition.get("name")): definition for definition in found.definitions}
    given = {tool.name: tool.schema for tool in core.defaults.tools}
    if unknown := [name for name in given if name not in described]:
        raise InvalidRequest(
            f"The snapshot's first message does not describe the tools {', '.join(unknown)}.",
            remedy="Leave them out, or start a new session with them.",
        )
    if other := [name for name in given if _bare(given[name]) != _bare(described[name].get("parameters"))]:
        raise InvalidRequest(
            f"The snapshot's first message describes other parameters of the tools {', '.join(other)}.",
            remedy="Keep the parameters to go on with it; to read it, leave tools= out.",
        )
    core.defaults = replace(
        core.defaults, plain=found.plain, missing=tuple(name for name in described if name not in given)
    )
    core.described, core.tokenizer, core.births = found.definitions, found.tokenizer, found.births
    log = core.log
    log.ids, log.made = _array("I", found.ids), bytearray(found.made)
    log.logprobs, log.draw_logprobs = _array("d", found.logprobs), _array("d", found.draw_logprobs)
    log.spans = list(_loaded(found.spans))
    log.open_at, log.owed, log.plain = found.open_at, found.owed, found.plain
    log.marks = {
        mark.name: Checkpoint(mark.tokens, _loaded(mark.spans), mark.open_at, mark.owed) for mark in found.marks
    }
    log.hidden = list(found.hidden)
    for result in found.results:
        core.pending.arrived(result)


def _array(kind: str, data: bytes) -> array[Any]:
    values: array[Any] = array(kind)
    values.frombytes(data)
    return values


def _fits(spans: list[_Span], open_at: int | None, tokens: int) -> bool:
    """Whether the messages follow each other inside of a log of so many tokens."""
    places = [place for span in spans for place in (span.start, span.end)]
    return places == sorted(places) and all(0 <= place <= tokens for place in (*places, open_at or 0))


def _dumped(spans: Sequence[Span]) -> list[_Span]:
    return [_Span(span.message, span.start, span.end) for span in spans]


def _loaded(spans: list[_Span]) -> tuple[Span, ...]:
    return tuple(Span(span.message, span.start, span.end) for span in spans)


def _bare(schema: object) -> object:
    """The schema without what is only said to a reader: with other words it takes the same arguments."""
    if isinstance(schema, list):
        return [_bare(item) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    bare: dict[str, object] = {}
    for key, value in schema.items():
        if key in ("properties", "$defs", "definitions", "patternProperties") and isinstance(value, Mapping):
            bare[key] = {name: _bare(inner) for name, inner in value.items()}
        elif key in ("enum", "const", "default"):
            bare[key] = value
        elif key not in _NOTES:
            bare[key] = _bare(value)
    return bare

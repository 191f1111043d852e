"""One model call of a framework: its message list in OpenAI's form to one turn on the session that the list finds."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, final

import anyio

from agentspeed import errors, events
from agentspeed.adapters.runtime import Runtime
from agentspeed.chat.output import Schema
from agentspeed.history import Conversation
from agentspeed.message_formats.openai import conversation_parts, tool_definitions
from agentspeed.message_formats.tools import declared
from agentspeed.replies import Reply
from agentspeed.session import Session, TurnOptions
from agentspeed.turn import Turn
from agentspeed.usage import Usage

_LOG = logging.getLogger("agentspeed.adapters")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What a framework asks. `messages` and `tools` have OpenAI's form; `shape`: a JSON schema of the text."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    allowed: Collection[str] | None = None
    """Names of the tools that this turn may call; None: all of them."""
    shape: Mapping[str, Any] | None = None
    options: TurnOptions = field(default_factory=TurnOptions)
    tenant: str = ""
    hint: str | None = None


async def whole(runtime: Runtime, call: Call) -> Reply[Any]:
    """The turn's reply. Raises `MessageMisfit` for what cannot be read, and what a turn raises."""
    async with _turn(runtime, call) as turn:
        return await turn.reply()


@asynccontextmanager
async def _turn(runtime: Runtime, call: Call) -> AsyncIterator[Turn[Any]]:
    system, own = conversation_parts(call.messages)
    conversation = Conversation(
        messages=own,
        system=system,
        tools=declared(tool_definitions(call.tools)),
        tenant=call.tenant,
        hint=call.hint,
    )
    output: Any = str if call.shape is None else Schema.json(dict(call.shape))
    async with runtime.take(conversation) as taken:
        session, options = taken.session, call.options.copy()
        if call.allowed is not None:
            options["tools"] = [tool for tool in session.tools if tool.name in call.allowed]
        async with session.stream(taken.messages or None, output=output, **options) as turn:
            yield turn
        if calls := session.open_calls:
            await _pause(session, calls[0].name)


async def _pause(session: Session, tool: str) -> None:
    """The framework runs the tools now: the branch is held under a lease for as long as such a pause takes."""
    try:
        _ = await session.expect(None, tool=tool)
    except errors.WorldError as error:  # the turn is over, and its reply is worth more than a lease
        _LOG.info("no lease for session %s: %s", session.id, error)


@final
class Streamed:
    """A turn to iterate over: `async with Streamed(runtime, call) as events: async for event in events: ...`, then
    `events.reply`.

    The turn runs in a task of its own, since no scope may be open where an asynchronous generator of a framework
    yields. Leaving the block early cancels it."""

    def __init__(self, runtime: Runtime, call: Call) -> None:
        self._runtime, self._call = runtime, call
        self._send, self._receive = anyio.create_memory_object_stream[events.AnyEvent](256)
        self._task: asyncio.Task[Reply[Any]] | None = None
        self._reply: Reply[Any] | None = None

    @property
    def reply(self) -> Reply[Any]:
        """Once the iteration has ended."""
        assert self._reply is not None
        return self._reply

    async def __aenter__(self) -> Streamed:
        self._task = asyncio.ensure_future(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the turn if it runs; calling it again does nothing."""
        self._receive.close()
        if self._task is not None and not self._task.done():
            _ = self._task.cancel()
            _ = await asyncio.wait([self._task])

    async def _run(self) -> Reply[Any]:
        with self._send:
            async with _turn(self._runtime, self._call) as turn:
                async for event in turn:
                    await self._send.send(event)
                return turn.result()

    async def __aiter__(self) -> AsyncIterator[events.AnyEvent]:
        assert self._task is not None
        async for event in self._receive:
            yield event
        self._reply = await self._task


def new_call_id() -> str:
    """Frameworks need ids that no other call has; a model that numbers its calls begins again in a later turn."""
    return f"call_{secrets.token_hex(8)}"


def prompt_tokens(usage: Usage) -> int:
    """Tokens of the prompt, those that were not computed again among them."""
    return usage.new + usage.resumed + usage.recomputed

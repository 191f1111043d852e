"""One call served by hand: a block in which the caller makes its result, while the branch is held under a lease."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Any, Final, final, get_args

import anyio

from agentspeed import errors
from agentspeed._base.validate import check_seconds, shown
from agentspeed._core.session_core import SERVING, SessionCore
from agentspeed._core.turn_record import TurnRecord
from agentspeed.messages import ToolCall
from agentspeed.observing import Ending
from agentspeed.tools import CANCELLED, OnError, ToolResult, content_of
from agentspeed.tools.execution import message_of, told_of

_LOG = logging.getLogger("agentspeed.session")
_NOTHING: Final = object()


@final
class Pending:
    """A call that is being served: set `result`."""

    def __init__(self, call: ToolCall) -> None:
        self.call = call
        self.name = call.name
        self.result: object = _NOTHING

    @property
    def arguments(self) -> dict[str, Any]:
        """As the model wrote them. Raises `BadArguments` when they are not a JSON object."""
        try:
            found = json.loads(self.call.arguments or "{}")
        except ValueError as error:
            raise errors.BadArguments(f"{self.name}: its arguments are not JSON: {error}", tool=self.name) from error
        if not isinstance(found, dict):
            raise errors.BadArguments(f"{self.name}: its arguments are not an object", tool=self.name)
        return found


@asynccontextmanager
async def tool_call(
    core: SessionCore, call: ToolCall, *, timeout: float | None, expect: float | None, on_error: OnError
) -> AsyncIterator[Pending]:
    """See `Session.tool_call`."""
    _check_serving(core, call, timeout, expect, on_error)
    pending = Pending(call)
    try:
        with _block(core, call, expect) as first:
            if first and not core.pending.on:
                await core.pause(core.open_calls(), expect, lambda event: None)
            started = anyio.current_time()
            outcome = CANCELLED
            watch = core.watch("tool", tool=call.name, call_id=call.id, content=lambda: call.arguments or "{}")
            try:
                with anyio.move_on_after(timeout) as scope:
                    yield pending
                if scope.cancelled_caught:
                    raise errors.ToolTimeout(f"{call.name}: no result after {timeout} s", tool=call.name)
                outcome = ToolResult(content=_content(pending), ok=True)
            except Exception as error:
                failed = (
                    error
                    if isinstance(error, errors.ToolError)
                    else errors.ToolFailed(f"{call.name}: {told_of(error)}", tool=call.name)
                )
                outcome = ToolResult(content=f"error: {failed}", ok=False, error=failed)
                _LOG.info("tool call %s failed", call.name, exc_info=error)
                if on_error == "raise":
                    raise
            finally:
                seconds = anyio.current_time() - started
                core.pending.took(call.name, seconds)
                core.pending.arrived(message_of(call, replace(outcome, seconds=seconds)))
                told_result = outcome
                watch.ended(
                    lambda: Ending(
                        reason="ok" if told_result.ok else "error",
                        error=told_result.error,
                        content=lambda: told_result.content,
                    )
                )
    finally:
        await _deliver(core)


def _check_serving(
    core: SessionCore, call: ToolCall, timeout: float | None, expect: float | None, on_error: OnError
) -> None:
    if not isinstance(call, ToolCall):
        raise errors.InvalidRequest(
            f"call is {shown(call)}; it must be a ToolCall.",
            remedy="Serve what reply.tool_calls or a ToolCallReady event holds.",
        )
    check_seconds("timeout", timeout)
    check_seconds("expect", expect, zero=True)
    if on_error not in get_args(OnError):
        raise errors.InvalidRequest(f"on_error is {shown(on_error)}; it must be 'return' or 'raise'.")
    busy = core.busy
    if busy not in (None, SERVING) and not isinstance(busy, TurnRecord):
        core.must_be_idle()
    calls = busy.calls if isinstance(busy, TurnRecord) else core.open_calls()
    if call.id not in [one.id for one in calls]:
        raise errors.InvalidRequest(
            f"Session {core.id} has no open call {call.id!r} of {call.name}.",
            remedy="Serve the calls of its last reply, before anything else is said.",
        )
    if call.id in core.pending.served:
        raise errors.InvalidRequest(f"The call {call.id!r} of {call.name} is being served already.")


@contextmanager
def _block(core: SessionCore, call: ToolCall, expect: float | None) -> Iterator[bool]:
    """While blocks are open the session is busy: whatever it said would come between a call and its result. Gives
    whether this is the first of them."""
    served = core.pending.served
    served[call.id] = expect
    first = core.busy is None
    if first:
        core.busy = SERVING
    try:
        yield first
    finally:
        _ = served.pop(call.id, None)
        if not served and core.busy == SERVING:
            core.busy = None


def _content(pending: Pending) -> str:
    if pending.result is _NOTHING:
        raise errors.ToolFailed(f"{pending.name}: its block gave no result", tool=pending.name)
    try:
        return content_of(pending.result)
    except ValueError as error:  # no JSON type, or a value that holds itself
        raise errors.ToolFailed(
            f"{pending.name}: its result cannot be written as JSON: {error}", tool=pending.name
        ) from error


async def _deliver(core: SessionCore) -> None:
    """Once every call of the turn has its result, they enter the log in call order. While the turn still runs, or
    another block is open, they wait for its end."""
    if core.busy is not None or core.state != "open":
        return
    calls = core.open_calls()
    if calls and not core.pending.waits(calls):
        with core.doing(SERVING):
            _ = await core.resume(calls)

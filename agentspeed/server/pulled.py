"""An ASGI application's answer for who pulls it piece by piece, at most so many messages ahead."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, Final

from starlette.types import ASGIApp

from agentspeed import errors

MOST_AHEAD: Final = 64
"""Messages that an application sends before somebody takes one; then its sends wait, as those to a connection do."""
Headers = list[tuple[bytes, bytes]]


async def pulled(
    application: ASGIApp, head: dict[str, Any], body: bytes
) -> AsyncGenerator[tuple[int, Headers] | bytes]:
    """Status and headers, then the body in the pieces that there are at once. `head` is the scope without its type.

    Raises what the application raises. Who leaves cancels it, and waits until it is through."""
    sent: asyncio.Queue[dict[str, Any]] = asyncio.Queue(MOST_AHEAD)
    given = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        return given.pop() if given else await asyncio.Future()  # whoever goes away cancels this call

    scope = {"type": "http", "asgi": {"version": "3.0"}, **head}
    task: asyncio.Task[None] = asyncio.create_task(application(scope, receive, sent.put))  # type: ignore[arg-type]
    try:
        first = await _next(sent, task)
        yield first["status"], list(first["headers"])
        more = True
        while more:
            message = await _next(sent, task)
            pieces, more = [message.get("body", b"")], message.get("more_body", False)
            while more and not sent.empty():
                message = sent.get_nowait()
                pieces.append(message.get("body", b""))
                more = message.get("more_body", False)
            yield b"".join(pieces)
    finally:
        task.cancel()
        _ = await asyncio.wait([task])


async def _next(sent: asyncio.Queue[dict[str, Any]], task: asyncio.Task[None]) -> dict[str, Any]:
    """The next message of the application. Raises what ended it before that."""
    if sent.empty():
        got = asyncio.ensure_future(sent.get())
        try:
            _ = await asyncio.wait([got, task], return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not got.done():
                got.cancel()
        if got.done() and not got.cancelled():
            return got.result()
        task.result()
        raise errors.InternalError("The application ended before its answer.")
    return sent.get_nowait()

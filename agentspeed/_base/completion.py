"""Carries a step out to its end, whatever cancels who asked for it: under anyio, and by asyncio's own `Task.cancel`.

What the engine was told cannot be untold by not listening: a verb whose answer is missed leaves two logs that differ.
A shield of anyio's holds off its own scopes only; `asyncio.timeout`, `wait_for` and `task.cancel()` reach through it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar
from weakref import WeakSet

import anyio

from agentspeed.errors import InternalError

T = TypeVar("T")
_LOG = logging.getLogger("agentspeed.session")
_tasks: WeakSet[asyncio.Task[Any]] = WeakSet()
"""Tasks that carry a step out. Only `run_to_completion` has them, so nothing else can cancel them."""


async def run_to_completion(
    work: Callable[[], Coroutine[Any, Any, T]], undo: Callable[[T], Awaitable[object]] | None = None
) -> T:
    """What `work` gives. A scope of anyio's that was cancelled meanwhile is heard at the caller's next checkpoint, when
    the step counts as done; a task that was cancelled raises here, after `undo` of what came of it."""
    with anyio.CancelScope(shield=True):
        current = _asyncio_task()
        if current is None or current in _tasks:
            return await work()
        task, cancelled = await _outlasting(work())
        if cancelled is None:
            return task.result()
        error = None if task.cancelled() else task.exception()
        if error is not None:
            _LOG.info("a step failed whose caller was cancelled: %s", error)
        elif undo is not None and not task.cancelled():
            taken_back, _ = await _outlasting(_awaited(undo(task.result())))
            if not taken_back.cancelled() and (error := taken_back.exception()) is not None:
                _LOG.info("undoing a step whose caller was cancelled: %s", error)
        raise cancelled
    raise InternalError("A shield was cancelled, which nobody can do.")


async def _outlasting(work: Coroutine[Any, Any, T]) -> tuple[asyncio.Task[T], asyncio.CancelledError | None]:
    """The task of `work`, ended, and the last cancellation that came meanwhile."""
    task = asyncio.create_task(work)
    _tasks.add(task)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait((task,))
        except asyncio.CancelledError as error:
            cancelled = error
    return task, cancelled


async def _awaited(work: Awaitable[object]) -> object:
    return await work


def _asyncio_task() -> asyncio.Task[Any] | None:
    """The running task of asyncio; None under trio."""
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None

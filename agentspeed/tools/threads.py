"""Runs a sync tool in a thread that nothing has to wait for: no other tool, no call of the SDK, no process that ends.

anyio's own worker threads would be shared: forty calls, the SDK's among them, and the next one waits, for ever when the
forty wait for it. So each call has its own place. Under asyncio the process would also wait at its end for a thread
that was given up, since anyio starts them as non-daemon threads, which cannot be changed once they run. So there each
call gets a daemon thread, made known to anyio as one of its workers, as `anyio.from_thread` in a tool needs it. trio's
threads are daemons.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import copy_context
from functools import partial
from threading import Thread
from typing import Any, Final, Never, TypeVar

import anyio
import anyio.lowlevel
import anyio.to_thread

from agentspeed.errors import InternalError

T = TypeVar("T")
_ANYIO: Final[Any] = sys.modules.get("anyio._core._eventloop")
_OWN_THREADS = all(
    hasattr(_ANYIO, name) for name in ("claim_worker_thread", "set_current_async_library", "threadlocals")
)
"""What makes a thread a worker of anyio's is not public: with a release that has it elsewhere, tools run in anyio's
threads, for which a process waits."""


async def in_thread(work: Callable[[], T]) -> T:
    """What `work` gives, or raises. When the caller is cancelled it is given up: it runs on, and its result is dropped.

    There is no bound but the system's own, at which a thread that cannot be started is a `RuntimeError`: with any other
    bound, tools that wait for tools could wait for ever."""
    fit = partial(_fit_to_raise, work)
    if asyncio_runs() and _OWN_THREADS:
        return await _in_daemon(fit)
    return await anyio.to_thread.run_sync(fit, abandon_on_cancel=True, limiter=anyio.CapacityLimiter(1))


def _fit_to_raise(work: Callable[[], T]) -> T:
    """No coroutine can raise `StopIteration` (PEP 479): its text would be lost."""
    try:
        return work()
    except StopIteration as error:
        raise RuntimeError(f"StopIteration: {error}") from error


def asyncio_runs() -> bool:
    """Whether the event loop of the caller is asyncio's."""
    return anyio.get_cancelled_exc_class() is asyncio.CancelledError


async def _in_daemon(work: Callable[[], T]) -> T:
    await anyio.lowlevel.checkpoint_if_cancelled()
    token = anyio.lowlevel.current_token()
    ended: Future[Callable[[], T]] = Future()
    with anyio.CancelScope() as scope:
        Thread(
            target=copy_context().run, args=(_run, work, ended, token, scope), name="agentspeed tool", daemon=True
        ).start()
        return (await asyncio.wrap_future(ended))()
    raise InternalError("A scope was cancelled that only its own block knows.")


def _run(
    work: Callable[[], T],
    ended: Future[Callable[[], T]],
    token: anyio.lowlevel.EventLoopToken,
    scope: anyio.CancelScope,
) -> None:
    """Gives what came of `work` as a function: a future would take some exceptions for its own (`CancelledError`)."""
    if not ended.set_running_or_notify_cancel():
        return
    try:
        with _anyio_worker(token, scope):
            value = work()
    except BaseException as error:  # noqa: BLE001 - raised where the caller waits
        ended.set_result(partial(_raise, error))
    else:
        ended.set_result(lambda: value)


@contextmanager
def _anyio_worker(token: anyio.lowlevel.EventLoopToken, scope: anyio.CancelScope) -> Iterator[None]:
    """This thread may call back into the loop; what it runs there is cancelled with `scope`."""
    _ = _ANYIO.set_current_async_library(None)
    with _ANYIO.claim_worker_thread(token.backend_class, token.native_token):
        _ANYIO.threadlocals.current_cancel_scope = scope
        try:
            yield
        finally:
            del _ANYIO.threadlocals.current_cancel_scope


def _raise(error: BaseException) -> Never:
    raise error

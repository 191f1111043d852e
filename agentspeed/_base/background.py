"""A task that belongs to no block: the code that started it ends it, from any task, under asyncio and trio.

A task group would tie it to the task that entered it, and everything in between to the group's cancel scope. What is
handed out over an async generator's `yield` (every streamed response of a web framework) must not: a generator may be
closed by another task, or by nobody until it is collected.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextvars import copy_context
from typing import Final, final

import anyio

from agentspeed._base.completion import run_to_completion

_running: Final[set[asyncio.Task[None]]] = set()
"""asyncio keeps no task alive by itself."""


@final
class Background:
    """`work`, begun at once, with the caller's context variables. `work` may raise nothing but what ends a process."""

    def __init__(self, work: Callable[[], Awaitable[None]]) -> None:
        self._work = work
        self._scope = anyio.CancelScope()
        self._ended = anyio.Event()
        if anyio.get_cancelled_exc_class() is asyncio.CancelledError:
            task = asyncio.create_task(self._run())
            _running.add(task)
            task.add_done_callback(_running.discard)
            # A loop that ends cancels all tasks: one that has not begun yet ends without having run at all.
            task.add_done_callback(lambda _: self._ended.set())
        else:
            import trio

            _ = trio.lowlevel.spawn_system_task(self._run, context=copy_context())

    async def _run(self) -> None:
        try:
            with self._scope:
                await self._work()
        finally:
            self._ended.set()

    @property
    def ended(self) -> bool:
        return self._ended.is_set()

    async def end(self) -> None:
        """Cancels it, and returns once it has ended, whatever cancels the caller meanwhile."""
        self._scope.cancel()
        await run_to_completion(self._ended.wait)

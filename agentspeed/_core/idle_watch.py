"""Closes what nobody has used for a while: sessions of web applications, whose users may never come back."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import final

import anyio

from agentspeed._base.background import Background


@final
class IdleWatch:
    """`used_at`: when it was used last (`time.monotonic`), None while it is in use. `close` is called once, `seconds`
    later at the earliest; nothing is awaited between the decision and the call."""

    def __init__(
        self, seconds: float, used_at: Callable[[], float | None], close: Callable[[], Awaitable[None]]
    ) -> None:
        self._seconds = seconds
        self._used_at = used_at
        self._close = close
        self._task = Background(self._watch)

    async def _watch(self) -> None:
        left = self._seconds
        while left > 0:
            await anyio.sleep(left)
            at = self._used_at()
            left = self._seconds if at is None else at + self._seconds - time.monotonic()
        await self._close()

    async def end(self) -> None:
        """Not to be called by `close`."""
        await self._task.end()

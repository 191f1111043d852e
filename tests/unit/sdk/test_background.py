"""Work that belongs to no block has ended when its task has, however that ended."""

from __future__ import annotations

import asyncio

import anyio
import pytest

from agentspeed._base.background import Background
from tests.support.loops import on_asyncio as on_asyncio

pytestmark = pytest.mark.anyio


async def test_work_whose_task_was_cancelled_before_it_began_has_ended() -> None:
    before = asyncio.all_tasks()
    work = Background(anyio.sleep_forever)
    (task,) = asyncio.all_tasks() - before
    _ = task.cancel()  # as a loop that ends does with all tasks
    _ = await asyncio.wait([task])
    await asyncio.sleep(0)
    assert work.ended
    await work.end()

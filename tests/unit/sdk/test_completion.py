"""What `run_to_completion` promises: a step that began ends, whatever cancels its caller, and is undone or stands."""

from __future__ import annotations

import asyncio

import anyio
import anyio.lowlevel
import pytest

from agentspeed._base.completion import run_to_completion

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def test_a_step_gives_its_result_and_raises_its_error() -> None:
    async def good() -> int:
        await anyio.lowlevel.checkpoint()
        return 3

    async def bad() -> int:
        raise KeyError("wrong")

    assert await run_to_completion(good) == 3
    with pytest.raises(KeyError, match="wrong"):
        _ = await run_to_completion(bad)


async def test_a_cancelled_scope_is_heard_at_the_next_checkpoint_and_the_result_is_there() -> None:
    undone: list[int] = []

    async def step() -> int:
        await anyio.sleep(0.02)
        return 3

    async def undo(result: int) -> None:
        undone.append(result)

    result = 0
    with anyio.move_on_after(0.001) as scope:
        result = await run_to_completion(step, undo)
        await anyio.sleep(1)
    assert (result, undone, scope.cancelled_caught) == (3, [], True)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_cancelled_task_ends_its_step_undoes_it_and_is_cancelled() -> None:
    seen: list[str] = []

    async def step() -> str:
        await anyio.sleep(0.02)
        seen.append("ended")
        return "result"

    async def undo(result: str) -> None:
        await anyio.sleep(0.02)
        seen.append(f"undone {result}")

    task = asyncio.create_task(run_to_completion(step, undo))
    for _ in range(4):
        await asyncio.sleep(0.006)
        _ = task.cancel()
    with pytest.raises(asyncio.CancelledError):
        _ = await task
    assert seen == ["ended", "undone result"]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_timeout_around_a_step_is_a_timeout_and_nothing_is_left_to_cancel() -> None:
    async def step() -> None:
        await anyio.sleep(0.02)

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.001):
            await run_to_completion(step)
    task = asyncio.current_task()
    assert task is not None and task.cancelling() == 0
    await asyncio.sleep(0.001)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_step_that_fails_while_its_caller_is_cancelled_is_not_undone() -> None:
    undone: list[object] = []

    async def step() -> None:
        await anyio.sleep(0.02)
        raise KeyError("wrong")

    async def undo(result: object) -> None:
        undone.append(result)

    task = asyncio.create_task(run_to_completion(step, undo))
    await asyncio.sleep(0)
    _ = task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert undone == []


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_step_inside_of_a_step_is_part_of_it() -> None:
    seen: list[str] = []

    async def undo(_: object) -> None:
        seen.append("undone")

    async def inner() -> None:
        await anyio.sleep(0.02)
        seen.append("inner")

    async def outer() -> None:
        await run_to_completion(inner, undo)
        seen.append("outer")

    task = asyncio.create_task(run_to_completion(outer))
    await asyncio.sleep(0.005)
    _ = task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert seen == ["inner", "outer"]

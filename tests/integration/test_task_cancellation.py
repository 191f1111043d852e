"""Cancelling with asyncio's own means (`asyncio.timeout`, `task.cancel()`), which reach through every shield of
anyio's: the session's log stays the engine's, nothing leaks, and the session goes on."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio
import pytest

from agentspeed import Engine, Session
from agentspeed.transport.engine_process import EngineSlot

pytestmark = pytest.mark.anyio
LOOPS = {"asyncio": {"use_uvloop": False}, "uvloop": {"use_uvloop": True}}


@pytest.fixture(params=LOOPS.items(), ids=LOOPS.keys())
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    return "asyncio", request.param[1]


def counting(checkpoint: Path) -> Engine:
    """Its model counts, a millisecond a step."""
    return Engine.over(EngineSlot({"model": "noop:512:1", "pages": 2000}), checkpoint)


async def cancelled(verb: Callable[[], Awaitable[object]], rounds: int) -> bool:
    """Cancels the verb after so many rounds of the event loop; False when it was faster."""

    async def task() -> None:
        _ = await verb()

    running = asyncio.create_task(task())
    for _ in range(rounds):
        await asyncio.sleep(0)
    _ = running.cancel()
    try:
        await running
    except asyncio.CancelledError:
        return True
    return False


async def agrees(session: Session) -> bool:
    return (await session.inspect()).known == session.tokens


async def test_turns_that_time_out_leave_the_log_that_the_engine_has(checkpoint: Path) -> None:
    draw = random.Random(3)
    timeouts = 0

    async def chat(engine: Engine) -> None:
        nonlocal timeouts
        async with engine.session() as s:
            for _ in range(12):
                before = s.ids
                try:
                    async with asyncio.timeout(draw.random() * 0.03):
                        _ = await s.generate("Say a lot about Oslo. " * 10, max_tokens=16)
                except TimeoutError:
                    timeouts += 1
                    assert s.ids == before
                assert await agrees(s)

    async with counting(checkpoint) as engine, asyncio.TaskGroup() as group:
        for _ in range(12):
            _ = group.create_task(chat(engine))
    assert timeouts > 10


async def test_what_is_drawn_after_a_timeout_is_what_an_undisturbed_session_draws(checkpoint: Path) -> None:
    async with Engine(checkpoint, dtype="float64") as engine, engine.session() as undisturbed:
        expected = (await undisturbed.generate("What now?", max_tokens=8)).ids
        for step in range(20):
            async with engine.session() as s:
                try:
                    async with asyncio.timeout(0.0005 * step):
                        _ = await s.generate("My secret word is tangerine.", max_tokens=200)
                except TimeoutError:
                    assert (await s.generate("What now?", max_tokens=8)).ids == expected


@pytest.mark.parametrize(
    "verb", ["add", "add much", "add and compute", "fork", "live fork", "rewind", "expect", "keep"]
)
async def test_a_verb_cancelled_at_any_moment_has_happened_wholly_or_not(checkpoint: Path, verb: str) -> None:
    much = "word " * 4000  # tokenised in a worker thread
    async with counting(checkpoint) as engine, engine.session() as s:
        _ = await s.generate("One.", max_tokens=3)
        for rounds in range(12):
            ids = s.ids
            mark = await s.mark()

            async def fork() -> None:
                async with s.fork(4):
                    pass

            async def live_fork() -> None:
                async with s.stream("Go.", max_tokens=500) as turn:
                    _ = await anext(aiter(turn))
                    async with s.fork(2):
                        pass

            async def keep() -> None:
                async with s.stream("Go.", max_tokens=500, keep_on_cancel=True) as turn:
                    async for _ in turn:
                        pass

            verbs: dict[str, Callable[[], Awaitable[object]]] = {
                "add": lambda: s.add("More."),
                "add much": lambda: s.add(much),
                "add and compute": lambda: s.add(much, prefill=True),
                "fork": fork,
                "live fork": live_fork,
                "rewind": lambda: s.rewind(0),
                "expect": lambda: s.expect(5.0),
                "keep": keep,
            }
            was = await cancelled(verbs[verb], rounds * 3)
            assert await agrees(s)
            if verb in ("add", "add much", "fork", "live fork", "expect") and was:
                assert s.ids == ids
            if verb != "rewind":
                await s.rewind(mark)
            assert (await engine.stats()).counts["branches"] == 1
            assert (await s.generate("On.", max_tokens=2)).usage.drawn == 2


async def test_a_close_that_is_cancelled_has_closed(checkpoint: Path) -> None:
    async with counting(checkpoint) as engine:
        for rounds in range(8):
            session = engine.session()
            _ = await session.__aenter__()
            _ = await cancelled(session.close, rounds + 1)  # before its first step nothing was asked for
            counts = (await engine.stats()).counts
            assert (counts["sessions"], counts["branches"]) == (0, 0)


async def test_an_adoption_that_is_cancelled_is_whole(checkpoint: Path) -> None:
    async with counting(checkpoint) as engine, engine.session() as s:
        for rounds in range(8):
            async with s.fork(1) as (child,):
                _ = await child.generate("On.", max_tokens=2)
                ids, mine = child.ids, s.ids
                _ = await cancelled(lambda child=child: s.adopt(child), rounds)  # type: ignore[misc]
                assert s.ids in (ids, mine)
                assert await agrees(s)
            assert (await engine.stats()).counts["branches"] == 1


async def test_a_tool_that_is_cancelled_twice_still_leaves_its_result(checkpoint: Path) -> None:
    from agentspeed.testing import ScriptedEngine, tool_call

    started = anyio.Event()

    async def wait() -> str:
        """Waits for ever."""
        started.set()
        await anyio.sleep_forever()
        return ""

    async with ScriptedEngine([tool_call("wait"), "Done."]) as engine, engine.session(tools=[wait]) as s:
        running = asyncio.create_task(s.run("Go."))
        await started.wait()
        _ = running.cancel()
        for _ in range(3):
            await asyncio.sleep(0)
            _ = running.cancel()
        with pytest.raises(asyncio.CancelledError):
            _ = await running
        assert s.messages[-1].text == "error: cancelled before it finished"

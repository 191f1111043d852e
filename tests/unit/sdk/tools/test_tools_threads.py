"""Sync tools run in threads that nobody waits for: no other tool, no call of the SDK, no process that ends."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import CancelledError
from contextvars import ContextVar

import anyio
import anyio.from_thread
import anyio.lowlevel
import anyio.to_thread
import pytest

from agentspeed.errors import ToolFailed, ToolTimeout
from agentspeed.tools import execute, threads, tool

pytestmark = pytest.mark.anyio
MORE_THAN_ANYIO_HAS_THREADS = 48
WHO: ContextVar[str] = ContextVar("who", default="nobody")


def hold(seconds: float) -> str:
    time.sleep(seconds)
    return "held"


# ---- nobody waits for a thread --------------------------------------------------------------------------------------
async def test_more_tools_than_there_are_worker_threads_run_at_once() -> None:
    together = threading.Barrier(MORE_THAN_ANYIO_HAS_THREADS, timeout=10)

    def meet() -> int:
        _ = together.wait()
        return 1

    results: list[str] = []

    async def call() -> None:
        results.append((await execute(tool(meet), "{}")).content)

    async with anyio.create_task_group() as group:
        for _ in range(MORE_THAN_ANYIO_HAS_THREADS):
            _ = group.start_soon(call)
    assert results == ["1"] * MORE_THAN_ANYIO_HAS_THREADS


async def test_sync_tools_that_run_sync_tools_through_the_loop_cannot_wait_for_each_other() -> None:
    inner = tool(name="inner")(lambda: "in")
    started = threading.Barrier(MORE_THAN_ANYIO_HAS_THREADS, timeout=10)

    def outer() -> str:
        async def ask() -> str:
            return (await execute(inner, "{}")).content

        _ = started.wait()
        return anyio.from_thread.run(ask)

    contents: set[str] = set()

    async def call() -> None:
        contents.add((await execute(tool(outer), "{}")).content)

    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            for _ in range(MORE_THAN_ANYIO_HAS_THREADS):
                _ = group.start_soon(call)
    assert contents == {"in"}


async def test_a_timeout_counts_no_other_tools_time() -> None:
    brief = tool(timeout=2.5)(hold)
    contents: list[str] = []

    async def call() -> None:
        contents.append((await execute(brief, {"seconds": 1.0})).content)

    async with anyio.create_task_group() as group:
        for _ in range(2 * MORE_THAN_ANYIO_HAS_THREADS):
            _ = group.start_soon(call)
    assert contents == ["held"] * 2 * MORE_THAN_ANYIO_HAS_THREADS


async def test_running_tools_hold_none_of_the_worker_threads_of_others() -> None:
    limiter = anyio.to_thread.current_default_thread_limiter()
    async with anyio.create_task_group() as group:
        for _ in range(3):
            _ = group.start_soon(lambda: execute(tool(hold), {"seconds": 0.2}))
        await anyio.sleep(0.1)
        assert limiter.borrowed_tokens == 0


# ---- what a sync tool may do ----------------------------------------------------------------------------------------
async def test_a_sync_tool_reaches_its_event_loop_and_sees_the_context_of_its_caller() -> None:
    loop_thread = threading.get_ident()

    def who() -> str:
        async def on_the_loop() -> str:
            await anyio.lowlevel.checkpoint()
            return WHO.get()

        assert anyio.from_thread.run_sync(threading.get_ident) == loop_thread != threading.get_ident()
        anyio.from_thread.check_cancelled()
        told = f"{WHO.get()} {anyio.from_thread.run(on_the_loop)}"
        _ = WHO.set("the tool")
        return told

    token = WHO.set("ada")
    try:
        assert (await execute(tool(who), "{}")).content == "ada ada"
        assert WHO.get() == "ada"
    finally:
        WHO.reset(token)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
async def test_a_sync_tool_may_run_an_event_loop_of_its_own(backend: str) -> None:
    def own() -> str:
        async def work() -> str:
            await anyio.lowlevel.checkpoint()
            return "mine"

        return anyio.run(work, backend=backend)

    def outer() -> str:
        return anyio.from_thread.run(lambda: _content(own))

    assert (await execute(tool(own), "{}")).content == "mine"
    assert (await execute(tool(outer), "{}")).content == "mine"


async def _content(function: object) -> str:
    return (await execute(tool(function), "{}")).content  # type: ignore[call-overload, no-any-return]


async def test_a_tool_that_was_given_up_can_find_out() -> None:
    heard = threading.Event()

    def patient() -> None:
        for _ in range(1000):
            time.sleep(0.01)
            try:
                anyio.from_thread.check_cancelled()
            except BaseException:
                heard.set()
                raise

    assert isinstance((await execute(tool(timeout=0.1)(patient), "{}")).error, ToolTimeout)
    assert await anyio.to_thread.run_sync(heard.wait, 5)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])  # trio gives what an abandoned thread began to nobody
async def test_what_a_tool_that_was_given_up_runs_on_the_loop_is_cancelled() -> None:
    cancelled = anyio.Event()

    def waits() -> None:
        async def forever() -> None:
            try:
                await anyio.sleep_forever()
            finally:
                cancelled.set()

        anyio.from_thread.run(forever)

    assert isinstance((await execute(tool(timeout=0.1)(waits), "{}")).error, ToolTimeout)
    with anyio.fail_after(5):
        await cancelled.wait()


@pytest.mark.parametrize(
    ("error", "told"),
    [(StopIteration("x"), "StopIteration: x"), (CancelledError("x"), "CancelledError: x"), (SystemExit(3), "Exit: 3")],
)
async def test_whatever_a_sync_tool_raises_is_told(error: BaseException, told: str) -> None:
    def fails() -> None:
        raise error

    result = await execute(tool(fails), "{}")
    assert isinstance(result.error, ToolFailed)
    assert told in result.content


async def test_a_run_that_was_cancelled_starts_no_tool() -> None:
    ran: list[int] = []

    def touch() -> None:
        ran.append(1)

    with anyio.CancelScope() as scope:
        scope.cancel()
        _ = await execute(tool(touch), "{}")
    await anyio.sleep(0.05)
    assert ran == []


async def test_without_anyios_own_functions_tools_run_in_anyios_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_OWN_THREADS", False)

    def who() -> str:
        assert anyio.from_thread.run_sync(lambda: 1) == 1
        return threading.current_thread().name

    assert (await execute(tool(who), "{}")).ok


# ---- the end of the process -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("end", ["timeout", "cancelled"])
@pytest.mark.parametrize("loop", ["asyncio", "trio"])
def test_a_tool_that_was_given_up_does_not_keep_the_process_alive(loop: str, end: str) -> None:
    script = f"""
        import time, anyio
        from agentspeed.tools import execute, tool

        def hang() -> None:
            time.sleep(60)

        async def main():
            with anyio.move_on_after(0.2 if {end!r} == "cancelled" else None):
                print((await execute(tool(timeout=0.2)(hang) if {end!r} == "timeout" else tool(hang), "{{}}")).content)
            print("over")

        anyio.run(main, backend={loop!r})
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], timeout=30, check=True, capture_output=True, text=True
    )
    assert ended.stdout.splitlines()[-1] == "over"
    assert ended.stderr == ""

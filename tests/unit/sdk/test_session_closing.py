"""A session that is closed while something of it runs: whoever waits is told, nobody waits for ever."""

from __future__ import annotations

import anyio
import anyio.lowlevel
import pytest

from agentspeed import Session
from agentspeed.errors import SessionClosed, SessionError
from agentspeed.testing import ScriptedEngine, say

pytestmark = pytest.mark.anyio


async def _told_that_it_closed(session: Session) -> None:
    with pytest.raises(SessionClosed, match="closed while a turn of it ran"):
        _ = await session.generate("Hi")


async def test_a_turn_whose_session_is_closed_by_another_task_ends_at_once() -> None:
    async with ScriptedEngine([say("A long answer indeed.", seconds=0.01)]) as engine, engine.session() as s:
        with anyio.fail_after(10):
            async with anyio.create_task_group() as group:
                group.start_soon(_told_that_it_closed, s)
                await anyio.sleep(0.03)
                await s.close()
        assert s.messages == ()
        assert engine.live_branches == 0


async def test_a_turn_of_a_child_ends_when_the_block_of_the_fork_is_left() -> None:
    async with ScriptedEngine([say("A long answer indeed.", seconds=0.01), "Hello."]) as engine:
        async with engine.session() as s:
            with anyio.fail_after(10):
                async with anyio.create_task_group() as group, s.fork(1) as (child,):
                    group.start_soon(_told_that_it_closed, child)
                    await anyio.sleep(0.03)
            assert (await s.generate("Hi")).text == "Hello."
        assert engine.live_branches == 0


async def test_a_turn_that_is_read_after_its_session_was_closed_says_so() -> None:
    script = [say("A long answer indeed.", seconds=0.01)]
    async with ScriptedEngine(script) as engine, engine.session() as s, s.stream("Hi") as turn:
        await s.close()
        with anyio.fail_after(10), pytest.raises(SessionClosed, match="closed while a turn of it ran"):
            _ = await turn.reply()


async def test_a_session_may_be_opened_without_a_block_and_is_closed_by_hand() -> None:
    async with ScriptedEngine(["Hello."]) as engine:
        s = await engine.session().open()
        assert (await s.generate("Hi")).text == "Hello."
        await s.close()
        assert engine.live_branches == 0
        with pytest.raises(SessionClosed):
            _ = await s.open()


async def test_a_session_of_given_messages_that_is_opened_without_a_block_has_them() -> None:
    async with ScriptedEngine(["Hello."]) as engine:
        given = [{"role": "user", "content": "One."}, {"role": "assistant", "content": "Two."}]
        s = await Session.from_messages(given, engine.engine).open()
        assert [message.text for message in s.messages] == ["One.", "Two."]
        await s.close()


async def test_a_session_that_nobody_uses_closes_itself_and_says_why() -> None:
    async with ScriptedEngine(["Hello."]) as engine:
        s = await engine.session(idle_timeout=0.1).open()
        for _ in range(500):
            await anyio.sleep(0.01 if engine.live_branches else 0)
        assert (s.state, engine.live_branches) == ("closed", 0)
        with pytest.raises(SessionClosed, match=r"nobody had used it for 0\.1 s"):
            _ = await s.generate("Hi")


async def test_copies_and_restored_sessions_close_themselves_too_unless_they_are_given_another_time() -> None:
    async with ScriptedEngine([]) as engine, engine.session(idle_timeout=0.4) as s:
        saved = await s.snapshot()
        given = await Session.restore(saved, engine.engine, idle_timeout=None).open()
        copies = [await s.copy().open(), await Session.restore(saved, engine.engine).open()]
        for _ in range(500):
            await anyio.sleep(0.01 if "open" in [one.state for one in copies] else 0)
        assert [one.state for one in (*copies, given)] == ["closed", "closed", "open"]
        await given.close()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_session_with_a_child_in_use_is_not_idle_however_long_that_takes() -> None:
    async with ScriptedEngine([say("one two three four", seconds=0.15)]) as engine:
        async with engine.session(idle_timeout=1.0) as s, s.fork(1) as (child,):
            assert (await child.generate("Count")).text == "one two three four"
            assert s.state == "open"
        assert engine.live_branches == 0


async def test_a_fork_is_entered_once_and_closes_its_children_all_the_same() -> None:
    async with ScriptedEngine([]) as engine, engine.session() as s:
        forks = s.fork(2)
        async with forks:
            with pytest.raises(SessionError, match="entered once") as refused:
                async with forks:
                    raise AssertionError("entered again")
            assert refused.value.remedy and engine.live_branches == 3
        assert engine.live_branches == 1
        with pytest.raises(SessionError, match="entered once"):
            async with forks:
                raise AssertionError("entered again")


async def test_a_session_that_is_closed_while_it_opens_is_closed_and_leaves_no_branch() -> None:
    async with ScriptedEngine([]) as engine:

        async def opened(session: Session) -> None:
            try:
                _ = await session.open()
            except SessionClosed:
                assert session.state == "closed"

        for steps in range(20):
            s = engine.session()
            async with anyio.create_task_group() as group:
                group.start_soon(opened, s)
                for _ in range(steps):
                    await anyio.lowlevel.checkpoint()
                await s.close()
            assert (s.state, engine.live_branches) == ("closed", 0)


async def test_a_session_that_is_closed_while_it_comes_back_after_a_death_leaves_no_branch() -> None:
    async with ScriptedEngine(["One."]) as engine:
        for steps in range(20):
            s = await engine.session().open()
            (await s.engine.link()).close()  # the engine goes
            for _ in range(500):
                await anyio.sleep(0.01 if engine.live_branches else 0)

            async def asked(session: Session) -> None:
                try:
                    _ = await session.add("Still there?")
                except SessionClosed:
                    assert session.state == "closed"

            async with anyio.create_task_group() as group:
                group.start_soon(asked, s)
                for _ in range(steps):
                    await anyio.lowlevel.checkpoint()
                await s.close()
            assert (s.state, engine.live_branches) == ("closed", 0), steps

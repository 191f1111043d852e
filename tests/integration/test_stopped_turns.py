"""What a turn that is left early costs and leaves: its usage, where the rows are, and who hangs below whom."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import anyio
import pytest

from agentspeed import Engine, Session, errors, events, tool
from tests.support.loops import without_uvloop as without_uvloop

pytestmark = pytest.mark.anyio


async def left_after(session: Session, tokens: int, **options: Any) -> int:
    """A turn that is left once so many tokens were read; how many those were."""
    drawn = 0
    async with session.stream("Speak.", max_tokens=200, **options) as turn:
        async for event in turn:
            drawn += isinstance(event, events.TextDelta)
            if drawn >= tokens:
                break
    return drawn


@pytest.mark.parametrize("keep", [False, True])
async def test_a_turn_that_is_left_counts_what_it_drew(checkpoint: Path, keep: bool) -> None:
    async with Session(checkpoint, private=True) as s:
        _ = await left_after(s, 3, keep_on_cancel=keep)
        first = s.usage
        assert first.drawn >= 3 and first.decode_seconds > 0 and first.turns == 1
        _ = await left_after(s, 3, keep_on_cancel=keep)
        assert s.usage.drawn >= first.drawn + 3
        if keep:
            assert s.usage.drawn >= sum(s.trajectory().made)


async def test_a_turn_that_is_left_while_its_prompt_is_computed_counts_what_was_computed(checkpoint: Path) -> None:
    async with slow_to_fill(checkpoint) as s:
        async with s.stream(LONG, max_tokens=3):
            await some_rows(s)
        left = s.usage
        assert 32 <= left.new < 2000, "not the whole prompt"
        reply = await s.generate(LONG, max_tokens=3)
        assert reply.usage.shared + reply.usage.resumed == left.new, "what the turn that was taken back had computed"


async def test_a_prefill_that_is_cancelled_counts_what_was_computed_and_claims_no_more(checkpoint: Path) -> None:
    async with slow_to_fill(checkpoint) as s:
        async with anyio.create_task_group() as group:
            _ = group.start_soon(lambda: s.add(LONG, prefill=True))
            await some_rows(s)
            group.cancel_scope.cancel()
        assert 32 <= s.usage.new < 2000 and s.usage.turns == 0
        assert s.tokens > 2400, "the message stays"
        left = s.usage.new
        assert s.engine.pid is not None
        os.kill(s.engine.pid, signal.SIGKILL)
        usage = (await s.generate(max_tokens=2)).usage
        assert usage.recomputed == left


LONG = "word " * 600


def slow_to_fill(checkpoint: Path) -> Session:
    """In an engine of many short steps, which the tests that want one share."""
    return Session(checkpoint, pages=400, prefill_chunk=16, private=True)


async def some_rows(session: Session) -> None:
    """Until some of a long prompt's chunks are computed, and by far not all."""
    while (await session.inspect()).residence.device < 32:  # noqa: ASYNC110 - it tells only when it is asked
        await anyio.sleep(0.001)


@pytest.mark.parametrize("keep", [False, True])
async def test_after_a_turn_was_left_the_session_knows_where_its_rows_are(checkpoint: Path, keep: bool) -> None:
    async with Session(checkpoint, private=True) as s:
        _ = await left_after(s, 3, keep_on_cancel=keep)
        told = s.residence
        assert told.device + told.host + told.lost == s.tokens
        assert (await s.inspect()).residence.device == told.device


async def test_children_of_an_adopted_child_are_the_trunks_and_close_with_it(checkpoint: Path) -> None:
    async with Engine(checkpoint, pages=64) as engine:
        async with engine.session() as s:
            _ = await s.generate("One.", max_tokens=2)
            (child,) = await s.fork(1).__aenter__()
            _ = await child.generate("Two.", max_tokens=2)
            (grandchild,) = await child.fork(1).__aenter__()
            await s.adopt(child)
            assert grandchild.parent is s and "b1" in str(s.tree())
            assert (await grandchild.generate("Three.", max_tokens=2)).usage.drawn == 2
        counts = (await engine.stats()).counts
        assert counts["branches"] == 0


async def test_a_grandchild_is_adopted_where_its_parent_was_and_not_where_that_went_on(checkpoint: Path) -> None:
    async with Session(checkpoint) as s:
        (child,) = await s.fork(1).__aenter__()
        _ = await child.generate("Two.", max_tokens=2)
        _ = await child.add("And?")
        (young,) = await child.fork(1).__aenter__()
        await s.adopt(child)
        _ = await young.generate("Three.", max_tokens=2)
        said = young.ids
        await s.adopt(young)
        assert s.ids == said

        (child,) = await s.fork(1).__aenter__()
        mark = await child.mark()
        _ = await child.generate("Four.", max_tokens=2)
        (old,) = await child.fork(1).__aenter__()
        await child.rewind(mark)
        _ = await child.generate("Five.", max_tokens=2)
        said = child.ids
        await s.adopt(child)
        with pytest.raises(errors.TrunkMoved):
            await s.adopt(old)
        assert s.ids == said


async def test_a_lease_that_changes_while_a_tool_runs_is_told_to_who_listens(checkpoint: Path) -> None:
    """The tool's own sub-agent takes the pages that the paused session rests on."""
    seen: list[events.AnyEvent] = []
    async with Engine(checkpoint, pages=40, page_tokens=16, context_limit=600, threads=1) as engine:

        @tool
        async def think() -> str:
            """Think."""
            async with engine.session() as other:
                _ = await other.generate("word " * 140, max_tokens=2)
            return "thought"

        async with engine.session(tools=[think]) as s:
            _ = await s.run(
                "Go.", tool_choice="think", parallel_calls=1, max_turns=2, max_tokens=100, on_event=seen.append
            )
            kinds = [type(event) for event in seen]
            changed = next(event for event in seen if isinstance(event, events.LeaseChanged))
            assert kinds.index(events.Paused) < kinds.index(events.LeaseChanged) < kinds.index(events.ToolFinished)
            assert "a running turn needed its device pages" in changed.lease.why


async def test_a_turn_that_its_tenants_quota_ends_says_so_and_one_that_ends_as_asked_says_nothing(
    checkpoint: Path,
) -> None:
    async with Engine(checkpoint, pages=64, page_tokens=16, tenant_pages=3, context_limit=600) as engine:
        async with engine.session(tenant="small") as s:
            reply = await s.generate("Speak.", max_tokens=500)
            assert (reply.finish_reason, reply.bound) == ("max_tokens", "the tenant's quota of 3 pages")
            with pytest.raises(errors.ContextOverflow, match="may have 3 pages") as refused:
                _ = await s.generate("Go on.")
            assert not refused.value.retryable
        async with engine.session(tenant="other") as s:
            assert (await s.generate("Speak.", max_tokens=3)).bound == ""


async def test_a_timeout_in_the_queue_says_what_the_turn_waited_for(checkpoint: Path) -> None:
    async with (
        Engine(checkpoint, pages=100, page_tokens=16, context_limit=1500) as engine,
        engine.session() as long,
        engine.session() as late,
        long.stream("word " * 220, max_tokens=600) as turn,
    ):
        assert isinstance(await anext(turn), events.TurnStarted)
        with pytest.raises(errors.TurnTimeout, match=r"still waited for room after 0.2 s") as caught:
            _ = await late.generate("other " * 220, max_tokens=2, timeout=0.2)
        assert "more pages or fewer turns" in caught.value.remedy and caught.value.partial == ""
        assert late.messages == ()


async def test_a_timeout_while_the_engine_starts_again_says_so(checkpoint: Path) -> None:
    async with Engine(checkpoint, pages=64) as engine, engine.session() as s:
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)
        with pytest.raises(errors.TurnTimeout, match="still waited for the engine to take it"):
            _ = await s.generate("Hi", timeout=0.01)
        assert (await s.generate("Hi", max_tokens=2)).usage.drawn == 2

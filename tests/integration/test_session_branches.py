"""What forks, marks, adoption and snapshots promise, on every event loop, against a real engine process."""

from __future__ import annotations

import math
from pathlib import Path
from uuid import uuid4

import anyio
import pytest

from agentspeed import Assistant, Engine, Session, User, errors, events
from tests.support.loops import without_uvloop as without_uvloop

pytestmark = pytest.mark.anyio


async def test_children_say_what_fresh_sessions_with_the_same_context_say(checkpoint: Path) -> None:
    async with Session(checkpoint) as s, Session(checkpoint, private=True) as fresh:
        _ = await s.generate("The context.", max_tokens=8)
        _ = await fresh.generate("The context.", max_tokens=8)
        async with s.fork(3) as children:
            replies = [await child.generate(f"Way {number}.", max_tokens=8) for number, child in enumerate(children)]
        mark = await fresh.mark()
        for number, reply in enumerate(replies):
            assert (await fresh.generate(f"Way {number}.", max_tokens=8)).ids == reply.ids
            await fresh.rewind(mark)


async def test_a_child_computes_none_of_the_context_again(checkpoint: Path) -> None:
    async with Session(checkpoint, private=True) as s:
        _ = await s.generate("A long context. " * 40, max_tokens=4)
        async with s.fork(4) as children:
            for child in children:
                usage = (await child.generate("Now you.", max_tokens=2)).usage
                assert usage.resumed_device == s.tokens - 1
                assert usage.recomputed == 0


async def test_children_are_closed_with_their_block_and_the_engine_holds_nothing_of_them(checkpoint: Path) -> None:
    async with Engine(checkpoint) as engine, engine.session() as s:
        async with s.fork(3) as children:
            assert (await engine.stats()).counts["branches"] == 4
            assert s.tree().count("held") == 4
        assert (await engine.stats()).counts["branches"] == 1
        for child in children:
            with pytest.raises(errors.SessionClosed):
                _ = await child.generate("x")


async def test_the_adopted_child_becomes_the_trunk(checkpoint: Path) -> None:
    async with Session(checkpoint) as s:
        _ = await s.generate("The context.", max_tokens=4)
        async with s.fork(2) as (left, right):
            _ = await left.generate("Left.", max_tokens=4)
            reply = await right.generate("Right.", max_tokens=4)
            ids = right.ids
            await s.adopt(right)
            with pytest.raises(errors.SessionClosed):
                _ = await right.generate("x")
        assert s.ids == ids
        assert s.messages[2:] == (User("Right."), Assistant(reply.text, raw=reply.text))
        assert (await s.generate("Go on.", max_tokens=2)).usage.recomputed == 0


async def test_a_child_is_adopted_by_its_own_parent_and_before_it_goes_on(checkpoint: Path) -> None:
    async with Session(checkpoint) as s, Session(checkpoint) as other:
        _ = await s.generate("The context.", max_tokens=4)
        async with s.fork(2) as (child, sibling):
            with pytest.raises(errors.ChildUnrelated):
                await other.adopt(child)
            async with child.fork() as (grandchild,):
                with pytest.raises(errors.ChildUnrelated):
                    await s.adopt(grandchild)
            async with child.stream("Speak.", max_tokens=300) as turn:
                _ = await anext(turn)
                with pytest.raises(errors.SessionBusy):
                    await s.adopt(child)
            _ = await s.generate("On.", max_tokens=2)
            with pytest.raises(errors.TrunkMoved):
                await s.adopt(sibling)


async def test_a_live_fork_goes_on_with_the_open_message_and_the_parent_does_not_notice(checkpoint: Path) -> None:
    async with Session(checkpoint) as s, Session(checkpoint) as alone:
        undisturbed = (await alone.generate("Speak.", max_tokens=40)).ids
        seen = 0
        async with s.stream("Speak.", max_tokens=40) as turn:
            async for event in turn:
                seen += isinstance(event, events.TextDelta)
                if seen == 5:
                    async with s.fork(2) as (same, other):
                        assert same.tokens == other.tokens
                        begun = same.tokens
                        assert same.ids == alone.ids[:begun]
                        _ = await same.generate(max_tokens=6)
                        assert same.ids == alone.ids[: begun + 6]
                        _ = await other.generate("Stop. Something else.", max_tokens=3)
                        assert [type(message) for message in other.messages] == [User, Assistant, User, Assistant]
            assert turn.result().ids == undisturbed


async def test_a_live_fork_beside_a_cancelled_turn_keeps_what_was_committed(checkpoint: Path) -> None:
    async with Session(checkpoint) as s:
        async with s.stream("Speak.", max_tokens=2000) as turn:
            for _ in range(4):
                _ = await anext(turn)
            forks = s.fork(2)
            children = await forks.__aenter__()
        assert s.messages == ()
        assert all(child.tokens > s.tokens for child in children)
        async with anyio.create_task_group() as group:
            for child in children:
                _ = group.start_soon(go_on, child)
        await forks.__aexit__(None, None, None)


async def go_on(child: Session) -> None:
    known = child.tokens
    _ = await child.generate(max_tokens=3)
    assert child.tokens == known + 3 == (await child.inspect()).known


async def test_rewinding_to_a_mark_is_exact(checkpoint: Path) -> None:
    async with Session(checkpoint) as s:
        _ = await s.generate("One.", max_tokens=4)
        before = s.ids, s.messages
        mark = await s.mark("one")
        first = await s.generate("Two.", max_tokens=6)
        await s.rewind("one")
        assert (s.ids, s.messages) == before
        again = await s.generate("Two.", max_tokens=6)
        assert again.ids == first.ids
        assert again.usage.recomputed == 0
        await s.rewind(mark)
        assert (s.ids, s.messages) == before


async def test_any_token_is_a_place_to_return_to(checkpoint: Path) -> None:
    async with Session(checkpoint) as s:
        reply = await s.generate("One.", max_tokens=12)
        cut = s.tokens - 7
        await s.rewind(cut)
        assert s.tokens == cut
        assert (await s.generate(max_tokens=7)).text == reply.text
        await s.rewind(0)
        assert s.ids == ()


async def test_a_mark_after_a_rewind_to_before_it_is_gone(checkpoint: Path) -> None:
    async with Session(checkpoint) as s:
        start = await s.mark()
        _ = await s.generate("One.", max_tokens=4)
        late = await s.mark("late")
        await s.rewind(start)
        with pytest.raises(errors.MarkNotFound, match="late"):
            await s.rewind("late")
        with pytest.raises(errors.MarkNotFound):
            await s.rewind(late)
        with pytest.raises(errors.MarkNotFound):
            await s.rewind(10_000)
        _ = await s.generate("Quite another text, and longer.", max_tokens=30)
        assert s.tokens > late.tokens
        with pytest.raises(errors.MarkNotFound):
            await s.rewind(late)


async def test_a_fork_at_a_mark_leaves_the_trunk_alone(checkpoint: Path) -> None:
    async with Session(checkpoint) as s:
        _ = await s.generate("One.", max_tokens=4)
        mark = await s.mark("one")
        _ = await s.generate("Two.", max_tokens=4)
        async with s.fork(1, at="one") as (child,):
            assert child.ids == s.ids[: mark.tokens]
            assert len(child.messages) == 2 and len(s.messages) == 4
            assert (await child.generate("Another two.", max_tokens=2)).usage.recomputed == 0


async def test_a_snapshot_opens_again_as_it_was(checkpoint: Path) -> None:
    async with Session(checkpoint, system="Be brief.", record_logprobs=True) as s:
        _ = await s.generate("One.", max_tokens=4)
        _ = await s.mark("one")
        _ = await s.generate("Two.", max_tokens=4)
        data = await s.snapshot()
        said, path = (await s.generate("Three.", max_tokens=6)).ids, s.trajectory()
    async with Session.restore(data, checkpoint, record_logprobs=True) as again:
        assert (await again.generate("Three.", max_tokens=6)).ids == said
        other = again.trajectory()
        assert (other.ids, other.made) == (path.ids, path.made)
        for one, two in zip(path.logprobs, other.logprobs, strict=True):
            assert (math.isnan(one) and math.isnan(two)) or abs(one - two) < 1e-4
        await again.rewind("one")
        assert len(again.messages) == 2


async def test_what_is_no_snapshot_is_refused(checkpoint: Path) -> None:
    with pytest.raises(errors.InvalidRequest, match="no session snapshot"):
        _ = Session.restore(b"nothing", checkpoint)
    async with Session(checkpoint) as s:
        data = await s.snapshot()

    def lookup(name: str) -> str:
        """Looks a name up."""
        return name

    with pytest.raises(errors.InvalidRequest, match="does not describe the tools lookup"):
        _ = Session.restore(data, checkpoint, tools=[lookup])


async def test_the_trajectory_is_exact_across_forks_and_rewinds(checkpoint: Path) -> None:
    async with Session(checkpoint) as s:
        drawn: list[int] = []
        drawn += (await s.generate("One.", max_tokens=4)).ids
        mark = await s.mark()
        _ = await s.generate("Forgotten.", max_tokens=4)
        await s.rewind(mark)
        async with s.fork(2) as (child, _other):
            drawn += (await child.generate("Two.", max_tokens=4)).ids
            await s.adopt(child)
        path = s.trajectory()
        assert [number for number, made in zip(path.ids, path.made, strict=True) if made] == drawn
        assert path.ids == s.ids


async def test_expect_is_answered_with_what_was_granted_and_why(checkpoint: Path) -> None:
    async with Session(checkpoint) as s:
        _ = await s.generate("One.", max_tokens=4)
        soft = await s.expect(2.0)
        assert (soft.keep, soft.seconds) == ("soft", 2.0) and soft.why
        assert soft.residence.device == s.tokens - 1
        firm = await s.expect(2.0, keep="firm")
        assert firm.why and f"{firm.keep} lease" in repr(s)
        with pytest.raises(errors.InvalidRequest, match="seconds"):
            _ = await s.expect(-1.0)
        _ = await s.generate("Two.", max_tokens=2)
        assert s.lease is None


async def test_a_private_session_shares_with_nobody_and_others_share_by_themselves(checkpoint: Path) -> None:
    text = "A prefix that several sessions have in common. " * 12
    ours, theirs = uuid4().hex, uuid4().hex
    async with Session(checkpoint, tenant=ours) as first:
        _ = await first.generate(text, max_tokens=2)
        async with Session(checkpoint, tenant=ours) as second:
            assert (await second.generate(text, max_tokens=2)).usage.shared > 0
        async with Session(checkpoint, tenant=theirs) as stranger:
            assert (await stranger.generate(text, max_tokens=2)).usage.shared == 0
        async with Session(checkpoint, tenant=ours, private=True) as private:
            assert (await private.generate(text, max_tokens=2)).usage.shared == 0

"""A session that is nearly full goes on as the same object over a shorter log."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from agentspeed import Session, User, errors, tool
from agentspeed.testing import ScriptedEngine, tool_call
from agentspeed.transport.base import wire
from tests.support.loops import without_uvloop as without_uvloop

pytestmark = pytest.mark.anyio


@tool
def add(a: int, b: int) -> int:
    """Add."""
    return a + b


def texts(session: Session) -> list[str]:
    return [message.text for message in session.messages]


async def talk(session: Session, turns: int) -> None:
    for turn in range(turns):
        _ = await session.mark(f"before {turn}")
        _ = await session.generate(f"Question {turn}.")


async def test_the_same_session_goes_on_over_its_root_a_summary_and_the_last_messages() -> None:
    script = ["One.", "Two.", "Three.", "Four."]
    async with ScriptedEngine(script) as engine, engine.session(system="Be brief.", tools=[add]) as s:
        await talk(s, 3)
        before, usage, kept = s.tokens, s.usage, s.ids[s.position(4) :]
        done = await s.compact(keep=2, summary="We counted to two.")
        assert texts(s) == ["We counted to two.", "Question 2.", "Three."]
        assert (done.dropped, done.tokens_before, done.tokens) == (4, before, s.tokens)
        assert s.tokens < before
        assert s.ids[-len(kept) :] == kept, "the kept messages have other ids"
        assert s.usage == usage
        assert (await s.generate("Question 3.")).text == "Four."
        assert engine.live_branches == 1


async def test_what_the_model_drew_is_known_of_the_kept_messages() -> None:
    async with ScriptedEngine(["One.", "Two."]) as engine, engine.session(record_logprobs=True) as s:
        await talk(s, 1)
        reply = await s.generate("And?")
        _ = await s.compact(keep=2)
        path = s.trajectory()
        assert tuple(number for number, made in zip(path.ids, path.made, strict=True) if made) == reply.ids
        assert reply.logprobs == tuple(p for p, made in zip(path.logprobs, path.made, strict=True) if made)
        assert reply.draw_logprobs == tuple(p for p, made in zip(path.draw_logprobs, path.made, strict=True) if made)


async def test_marks_move_with_what_is_kept_and_say_what_became_of_them() -> None:
    script = ["One.", "Two.", "Three.", "Third."]
    async with ScriptedEngine(script) as engine, engine.session() as s:
        unnamed = await s.mark()
        await talk(s, 3)
        inside = await s.mark("end")
        done = await s.compact(keep=2, summary="Two questions.")
        assert done.marks["before 1"] is None
        assert done.marks["end"] == s.tokens
        assert done.marks["before 2"] == s.position(1)
        with pytest.raises(errors.MarkNotFound, match=r"'before 1' stood among messages that compact\(\) dropped"):
            await s.rewind("before 1")
        with pytest.raises(errors.MarkNotFound, match="or compacted since"):
            await s.rewind(inside)
        await s.rewind("end")
        assert texts(s) == ["Two questions.", "Question 2.", "Three."]
        await s.rewind("before 2")
        assert texts(s) == ["Two questions."]
        assert (await s.generate("Question 2.")).text == "Third."
        await s.rewind(unnamed)
        assert texts(s) == []


async def test_results_stay_with_their_calls() -> None:
    script = ["One.", tool_call("add", a=1, b=2) + tool_call("add", a=3, b=4), "3 and 7.", "Fine."]
    async with ScriptedEngine(script) as engine, engine.session(tools=[add]) as s:
        await talk(s, 1)
        _ = await s.run("Add.")
        assert len(s.messages) == 7
        done = await s.compact(keep=2, summary="A question.")
        assert (done.dropped, texts(s)) == (3, ["A question.", "", "3", "7", "3 and 7."])
        assert (await s.generate("And now?")).text == "Fine."


async def test_calls_that_are_open_are_kept_and_served_afterwards() -> None:
    script = ["One.", tool_call("add", a=1, b=2), "3."]
    async with ScriptedEngine(script) as engine, engine.session(tools=[add]) as s:
        await talk(s, 1)
        _ = await s.generate("Add.")
        _ = await s.compact(keep=1, summary="Add one and two.")
        assert [call.name for call in s.open_calls] == ["add"]
        assert (await s.run()).text == "3."


async def test_a_message_that_was_cut_goes_on_afterwards() -> None:
    async with ScriptedEngine(["One.", "Two three four.", " Five."]) as engine, engine.session() as s:
        await talk(s, 1)
        cut = await s.generate("Count.", max_tokens=4)
        _ = await s.compact(keep=2, summary="Counting.")
        assert (await s.generate()).text == cut.text + " Five."


async def test_a_function_writes_the_summary_on_a_fork_that_has_the_room_of_what_is_kept() -> None:
    seen: list[list[str]] = []

    async def sum_up(branch: Session) -> str:
        seen.append(texts(branch))
        return "So far: " + (await branch.generate("Sum up.")).text

    async with ScriptedEngine(["One.", "Two.", "One thing.", "Fine."]) as engine, engine.session() as s:
        await talk(s, 2)
        _ = await s.compact(keep=2, summary=sum_up)
        assert seen == [["Question 0.", "One."]]
        assert texts(s) == ["So far: One thing.", "Question 1.", "Two."]
        assert engine.live_branches == 1
        assert (await s.generate("And?")).text == "Fine."


async def test_nothing_changes_when_it_is_refused_or_its_summary_fails() -> None:
    async def fails(branch: Session) -> str:
        raise ZeroDivisionError

    async def says_nothing(branch: Session) -> Any:
        return None

    async with ScriptedEngine(["One.", "Two.", "Fine."], context_limit=300) as engine, engine.session() as s:
        await talk(s, 2)
        ids = s.ids
        with pytest.raises(ZeroDivisionError):
            _ = await s.compact(keep=2, summary=fails)
        for wrong in (says_nothing, "", 3):
            given: Any = wrong
            with pytest.raises(errors.InvalidRequest, match="summary is"):
                _ = await s.compact(keep=2, summary=given)
        with pytest.raises(errors.InvalidRequest, match="keep is"):
            _ = await s.compact(keep=-1)
        with pytest.raises(errors.ContextOverflow, match="after compaction"):
            _ = await s.compact(keep=2, summary="many words " * 300)
        async with s.stream("Busy."):
            with pytest.raises(errors.SessionBusy):
                _ = await s.compact()
        assert s.ids == ids
        assert engine.live_branches == 1


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_one_that_is_cancelled_once_the_engine_has_the_shorter_log_is_carried_out_to_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with ScriptedEngine(["One.", "Two.", "Three.", "Four."]) as engine, engine.session() as s:
        await talk(s, 3)
        link = type(await s.engine.link())
        call = link.call

        async def answered_and_cancelled(self: Any, *how: Any, **more: Any) -> Any:
            reply = await call(self, *how, **more)
            if isinstance(reply, wire.Opened):
                _ = compacting.cancel()
            return reply

        monkeypatch.setattr(link, "call", answered_and_cancelled)
        compacting = asyncio.ensure_future(s.compact(keep=2))
        with pytest.raises(asyncio.CancelledError):
            _ = await compacting
        monkeypatch.undo()
        assert texts(s) == ["Question 2.", "Three."]
        with pytest.raises(errors.MarkNotFound, match=r"'before 1' stood among messages that compact\(\) dropped"):
            await s.rewind("before 1")
        assert (await s.generate("Question 3.")).text == "Four."
        assert engine.live_branches == 1


async def test_with_nothing_to_drop_nothing_changes() -> None:
    async with ScriptedEngine(["One."]) as engine, engine.session() as s:
        await talk(s, 1)
        ids, mark = s.ids, await s.mark()
        done = await s.compact(keep=2, summary="Never needed.")
        assert (done.dropped, s.ids) == (0, ids)
        await s.rewind(mark)


async def test_everything_may_go() -> None:
    async with ScriptedEngine(["One.", "Fine."]) as engine, engine.session(system="Be brief.") as s:
        root = s.ids
        await talk(s, 1)
        done = await s.compact()
        assert (done.dropped, s.messages, s.ids) == (2, (), root)
        assert (await s.generate(User("Again."))).text == "Fine."


async def test_a_session_works_without_end_in_a_context_that_is_small() -> None:
    engine, compactions = ScriptedEngine(lambda turn: "An answer of some words.", context_limit=200), 0
    async with engine, engine.session(system="Be brief.") as s:
        for turn in range(30):
            if s.room < 60:
                compactions += 1
                _ = await s.compact(keep=2, summary=f"{turn} questions so far.")
            assert (await s.generate(f"Question {turn}?")).text == "An answer of some words."
    assert compactions > 2


async def test_a_child_that_was_forked_before_cannot_be_adopted_afterwards_and_lives() -> None:
    async with ScriptedEngine(["One.", "Two.", "Child."]) as engine, engine.session() as s:
        await talk(s, 2)
        async with s.fork() as (child,):
            _ = await s.compact(keep=2)
            assert (await child.generate("And?")).text == "Child."
            with pytest.raises(errors.TrunkMoved):
                await s.adopt(child)


async def test_a_child_that_was_compacted_can_be_adopted() -> None:
    async with ScriptedEngine(["One.", "Two.", "Fine."]) as engine, engine.session() as s:
        await talk(s, 2)
        async with s.fork() as (child,):
            _ = await child.compact(keep=2, summary="One question.")
            await s.adopt(child)
        assert texts(s) == ["One question.", "Question 1.", "Two."]
        assert (await s.generate("And?")).text == "Fine."
    assert engine.live_branches == 0


async def test_a_snapshot_of_it_is_the_shorter_session() -> None:
    async with ScriptedEngine(["One.", "Two.", "Fine."]) as engine:
        async with engine.session() as s:
            await talk(s, 2)
            _ = await s.compact(keep=2, summary="One question.")
            data, ids = await s.snapshot(), s.ids
        async with Session.restore(data, engine.engine) as again:
            assert again.ids == ids
            await again.rewind("before 1")
            assert texts(again) == ["One question."]

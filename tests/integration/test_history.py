"""Lists of messages find their session on a real engine: what was kept is resumed."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import anyio.lowlevel
import pytest

from agentspeed import Engine, Session, errors
from agentspeed.history import Conversation, History, Limits
from agentspeed.messages import Assistant, Message, ToolCall, ToolMessage, User
from agentspeed.tools import tool
from tests.support.loops import without_uvloop as without_uvloop

pytestmark = pytest.mark.anyio


@tool
def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


@asynccontextmanager
async def _history(limits: Limits | None = None) -> AsyncIterator[History]:
    async with Engine.shared(None, {"pages": 256}) as engine:
        made = History(
            lambda asked: engine.session(system=asked.system, tools=asked.tools, tenant=asked.tenant or None),
            limits=limits,
        )
        yield made
        await made.close()
        assert (await engine.stats()).counts["sessions"] == 0


def _asked(*messages: Message, tenant: str = "", hint: str | None = None) -> Conversation:
    return Conversation(messages=messages, system="You are brief.", tools=(add,), tenant=tenant, hint=hint)


async def test_a_conversation_goes_on_in_its_session_and_computes_only_what_is_new() -> None:
    async with _history() as history:
        first = User("What is 17 plus 25?")
        async with history.take(_asked(first)) as taken:
            assert taken.verb == "new"
            reply = await taken.session.generate(taken.messages)
        (call,) = reply.tool_calls
        theirs = ToolCall(id="their-own-id", name=call.name, arguments='{"b": 25, "a": 17}')
        result = ToolMessage(call_id="their-own-id", name="add", text="42")
        async with history.take(_asked(first, Assistant("", (theirs,)), result)) as taken:
            assert (taken.verb, taken.shared, taken.why) == ("continue", 2, "")
            answer = await taken.session.generate(taken.messages)
            assert answer.usage.recomputed == 0
            assert answer.usage.resumed >= reply.usage.new
            assert "42" in answer.text
        assert history.open == history.idle == 1


async def test_a_conversation_that_differs_branches_and_both_go_on() -> None:
    async with _history() as history:
        first, other = User("What is 17 plus 25?"), User("Say hi.")
        async with history.take(_asked(first)) as taken:
            reply = await taken.session.generate(taken.messages)
        said = Assistant(reply.text, reply.tool_calls)
        result = ToolMessage(call_id=reply.tool_calls[0].id, name="add", text="42")
        async with history.take(_asked(first, said, result)) as taken:
            end = await taken.session.generate(taken.messages)
        changed = ToolMessage(call_id=reply.tool_calls[0].id, name="add", text="43")
        async with history.take(_asked(first, said, changed)) as taken:
            assert (taken.verb, taken.shared) == ("branch", 2)
            assert "differs" in taken.why
            different = await taken.session.generate(taken.messages)
            assert different.usage.prefill_saved >= taken.shared_tokens - 1
        async with history.take(_asked(first, said, result, Assistant(end.text), other)) as taken:
            assert (taken.verb, taken.shared) == ("continue", 4)
        async with history.take(_asked(first, said, changed, Assistant(different.text), other)) as taken:
            assert (taken.verb, taken.shared) == ("continue", 4)


async def test_the_same_conversation_by_its_hint_goes_back_instead() -> None:
    async with _history() as history:
        first = User("Say hi.")
        async with history.take(_asked(first, hint="thread")) as taken:
            reply = await taken.session.generate(taken.messages, max_tokens=8)
        later = (first, Assistant(reply.text), User("Again."))
        async with history.take(_asked(*later, hint="thread")) as taken:
            _ = await taken.session.generate(taken.messages, max_tokens=8)
        edited = (first, Assistant(reply.text), User("Something else."))
        async with history.take(_asked(*edited, hint="thread")) as taken:
            assert (taken.verb, taken.shared) == ("rewind", 2)
            _ = await taken.session.generate(taken.messages, max_tokens=8)
        assert history.open == 1


async def test_what_a_branch_says_is_what_a_fresh_session_says() -> None:
    async with Engine.shared(None, {"pages": 256, "dtype": "float64"}) as engine:
        history = History(lambda asked: engine.session(system=asked.system, tools=asked.tools))
        first = User("What is 17 plus 25?")
        async with history.take(_asked(first)) as taken:
            reply = await taken.session.generate(taken.messages)
        said = Assistant(reply.text, reply.tool_calls)
        for text in ("42", "error: no network"):
            result = ToolMessage(call_id=reply.tool_calls[0].id, name="add", text=text)
            async with history.take(_asked(first, said, result)) as taken:
                answer = await taken.session.generate(taken.messages)
                ids = taken.session.ids
            async with engine.session(system="You are brief.", tools=[add]) as fresh:
                _ = await fresh.generate(first)
                again = await fresh.generate(
                    ToolMessage(call_id=fresh.messages[-1].tool_calls[0].id, name="add", text=text)
                )  # type: ignore[union-attr]
                assert (again.text, fresh.ids) == (answer.text, ids)
        await history.close()


async def test_two_calls_at_once_never_have_the_same_session() -> None:
    async with _history() as history:
        first = User("Say hi.")
        async with history.take(_asked(first)) as taken:
            reply = await taken.session.generate(taken.messages, max_tokens=8)
        base = (first, Assistant(reply.text))
        verbs: list[str] = []
        sessions: set[str] = set()

        async def one(number: int) -> None:
            async with history.take(_asked(*base, User(f"Question {number}."))) as taken:
                verbs.append(taken.verb)
                sessions.add(taken.session.id)
                _ = await taken.session.generate(taken.messages, max_tokens=8)

        async with anyio.create_task_group() as group:
            for number in range(6):
                group.start_soon(one, number)
        assert sorted(verbs) == ["branch"] * 5 + ["continue"]
        assert len(sessions) == 6


async def test_a_cancelled_call_leaves_the_session_where_it_was() -> None:
    async with _history() as history:
        first = User("Say hi.")
        async with history.take(_asked(first)) as taken:
            reply = await taken.session.generate(taken.messages, max_tokens=8)
        base = (first, Assistant(reply.text))
        with anyio.move_on_after(0.05):
            async with history.take(_asked(*base, User("Again."))) as taken:
                await anyio.sleep(1)
        assert history.idle == 1
        async with history.take(_asked(*base, User("Once more."))) as taken:
            assert (taken.verb, taken.shared) == ("continue", 2)


async def test_tenants_never_share_a_session() -> None:
    async with _history() as history:  # the engine is that of other runs, so the tenants are this one's own
        one, other = secrets.token_hex(4), secrets.token_hex(4)
        first = User("Say hi.")
        async with history.take(_asked(first, tenant=one)) as taken:
            reply = await taken.session.generate(taken.messages, max_tokens=8)
        async with history.take(_asked(first, Assistant(reply.text), User("Again."), tenant=other)) as taken:
            assert (taken.verb, taken.shared) == ("new", 0)
            answer = await taken.session.generate(taken.messages, max_tokens=8)
            assert answer.usage.prefill_saved == 0


async def test_the_pool_is_bounded_by_count_by_tenant_and_by_time() -> None:
    async with _history(Limits(idle=3, idle_per_tenant=2, idle_seconds=1e9)) as history:
        for number in range(4):
            async with history.take(_asked(User(f"Question {number}."), tenant="a")):
                pass
        assert history.idle == 2
        for number in range(4):
            async with history.take(_asked(User(f"Question {number}."), tenant=f"b{number}")):
                pass
        assert history.idle == 3


async def test_idle_sessions_end_after_their_time() -> None:
    now = 0.0
    async with Engine.shared(None, {"pages": 256}) as engine:
        history = History(lambda asked: engine.session(), limits=Limits(idle_seconds=10.0), clock=lambda: now)
        async with history.take(_asked(User("One."))):
            pass
        now = 5.0
        async with history.take(_asked(User("Two."))):
            pass
        now = 12.0
        await history.sweep()
        assert history.idle == 1
        await history.close()


async def test_what_cannot_be_opened_leaves_nothing_behind() -> None:
    async with _history() as history:
        with pytest.raises(errors.InvalidRequest):
            async with history.take(_asked(ToolMessage(call_id="none", name="add", text="1"))) as taken:
                _ = await taken.session.generate(taken.messages)
        assert history.idle == history.open == 1
        assert (await _turns(history)) == 0


async def _turns(history: History) -> int:
    async with history.take(_asked(User("Say hi."))) as taken:
        return taken.session.usage.turns


async def test_idle_sessions_go_out_as_bytes_and_come_back_with_their_ids() -> None:
    async with _history() as history:
        first = User("Say hi.")
        async with history.take(_asked(first, hint="a")) as taken:
            reply = await taken.session.generate(taken.messages, max_tokens=8)
            ids = taken.session.ids
        async with history.take(_asked(first, hint="b")):
            pass
        (kept,) = [one async for one in history.kept(lambda hint: hint == "a", {})]
        assert [one async for one in history.kept(lambda hint: hint == "a", {kept.name: kept.state})] == []
        await history.forget(lambda hint: hint == "a")
        assert history.open == 1
        restored = Session.restore(kept.data, taken.session.engine, tools=[add])
        asked = _asked(first, Assistant(reply.text), User("Again."))
        await history.put(restored, asked)
        async with history.take(asked) as taken:
            assert (taken.verb, taken.shared, taken.session.ids) == ("continue", 2, ids)


async def test_one_that_has_closed_itself_does_not_keep_the_others_from_going_out() -> None:
    async with _history() as history:
        async with history.take(_asked(User("Say hi."), hint="a")) as first:
            pass
        async with history.take(_asked(User("Say ho."), hint="b")) as second:
            pass
        await first.session.close()
        assert [one.name async for one in history.kept(lambda hint: True, {})] == [second.session.id]


async def test_a_session_that_is_in_use_is_not_among_those_that_go_out() -> None:
    async with _history() as history, history.take(_asked(User("Say hi."), hint="a")):
        assert [one async for one in history.kept(lambda hint: True, {})] == []
        await history.forget(lambda hint: True)
        assert history.open == 1


async def test_a_conversation_that_comes_while_its_session_is_opened_again_does_not_wait_for_it() -> None:
    async with _history() as history:
        first = User("Say hi.")
        async with history.take(_asked(first)) as taken:
            reply = await taken.session.generate(taken.messages, max_tokens=8)
        data = await taken.session.snapshot()
        await history.forget(lambda hint: True)
        restored = Session.restore(data, taken.session.engine, tools=[add])
        asked = _asked(first, Assistant(reply.text), User("Again."))

        async def ask() -> None:
            async with history.take(asked) as taken:
                _ = await taken.session.generate(taken.messages, max_tokens=2)

        async with anyio.create_task_group() as group:
            group.start_soon(history.put, restored, asked)
            await anyio.lowlevel.checkpoint()
            await ask()
        assert history.open == 2


async def test_a_restored_session_that_cannot_be_entered_is_not_in_the_pool() -> None:
    async with _history() as history, Engine.shared(None, {"pages": 256}) as engine:
        closed = engine.session()
        async with closed:
            pass
        with pytest.raises(errors.SessionClosed):
            await history.put(closed, _asked(User("Say hi.")))
        assert history.open == 0


@pytest.mark.parametrize("hints", [("one", "two"), (None, None)], ids=["hints", "no hints"])
async def test_two_conversations_that_say_the_same_each_go_on_in_their_own_session(
    hints: tuple[str | None, str | None],
) -> None:
    said: dict[int, list[Message]] = {0: [], 1: []}
    of: dict[int, str] = {}
    async with _history() as history:
        for number in range(3):
            for way, hint in enumerate(hints):
                said[way].append(User(f"Say hi, for the time {number}."))
                async with history.take(_asked(*said[way], hint=hint)) as taken:
                    if number == 0 and way == 1 and taken.verb == "branch":
                        assert taken.shared == 1  # the first said it before
                    elif number:
                        assert taken.verb == "continue"
                        assert hint is None or taken.session.id == of[way]
                    of[way] = taken.session.id
                    reply = await taken.session.generate(taken.messages, max_tokens=8, temperature=0.0)
                said[way].append(Assistant(reply.text))
        assert said[0] == said[1]
        assert history.open == 2


async def test_what_the_model_said_in_another_conversation_is_branched_off_and_not_read_again() -> None:
    async with _history() as history:
        first = User("Say hi.")
        async with history.take(_asked(first, hint="one")) as taken:
            _ = await taken.session.add(first)  # a log of the first message alone waits
        async with history.take(_asked(first, hint="two")) as taken:
            reply = await taken.session.generate(taken.messages, max_tokens=8)
        longer = (first, Assistant(reply.text), User("Go on."))
        async with history.take(_asked(*longer, hint="two")) as taken:
            _ = await taken.session.generate(taken.messages, max_tokens=8)
        async with history.take(_asked(*longer, hint="one")) as taken:
            assert (taken.verb, taken.shared) == ("branch", 3)

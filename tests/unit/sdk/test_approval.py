"""Who approves a call sees what will run, may change it and say why not; what does not run is never said to have."""

from __future__ import annotations

import json
from typing import Any

import anyio
import pytest

from agentspeed import Session, events, tool
from agentspeed.messages import ToolCall
from agentspeed.testing import ScriptedEngine, tool_call
from agentspeed.tools import Approval, declared_tool

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@tool(needs_approval=True)
def pay(amount: int = 5000, to: str = "mallory") -> str:
    """Pay."""
    return f"paid {amount} to {to}"


async def told(script: list[str], approve: Any, **options: Any) -> tuple[list[str], list[events.AnyEvent]]:
    """The tools' results, and all events."""
    seen: list[events.AnyEvent] = []
    async with ScriptedEngine([*script, "Ok."]) as engine, engine.session(tools=[pay, *options.pop("tools", [])]) as s:
        result = await s.run("Go.", approve=approve, on_event=seen.append, **options)
    return [message.text for message in result.tools], seen


async def test_the_approver_sees_the_defaults() -> None:
    asked: list[ToolCall] = []
    results, _ = await told([tool_call("pay", amount=1)], lambda call: not asked.append(call))
    assert [call.arguments for call in asked] == ['{"amount":1,"to":"mallory"}']
    assert results == ["paid 1 to mallory"]


async def test_the_defaults_of_a_declared_tool_are_seen_too() -> None:
    schema = {"type": "object", "properties": {"path": {"type": "string", "default": "/"}}}
    wipe = declared_tool({"name": "wipe", "parameters": schema}, lambda path="/": f"wiped {path}")
    asked: list[str] = []
    object.__setattr__(wipe, "needs_approval", True)
    _ = await told([tool_call("wipe")], lambda call: bool(asked.append(call.arguments)), tools=[wipe])
    assert asked == ['{"path":"/"}']


async def test_a_denial_may_say_why() -> None:
    results, seen = await told([tool_call("pay")], lambda call: Approval(allow=False, reason="too much"))
    assert results == ["error: pay: not approved by the user: too much"]
    assert not [event for event in seen if isinstance(event, events.ToolStarted)]
    assert [event.ok for event in seen if isinstance(event, events.ToolFinished)] == [False]


async def test_the_approver_may_change_the_arguments_and_the_model_is_told() -> None:
    results, seen = await told(
        [tool_call("pay")], lambda call: Approval(allow=True, arguments={"amount": 5, "to": "alice"})
    )
    assert results == ['(run with other arguments, as the user decided: {"amount":5,"to":"alice"})\npaid 5 to alice']
    (started,) = [event.call for event in seen if isinstance(event, events.ToolStarted)]
    assert (started.name, started.arguments) == ("pay", '{"amount":5,"to":"alice"}')


@pytest.mark.parametrize(
    "answer",
    [
        Approval(allow=True, arguments={"amount": "much"}),
        Approval(allow=True, arguments={"whom": "me"}),
        Approval(allow=True, arguments=[1]),
        Approval(allow=True, arguments={1: object()}),  # type: ignore[arg-type, dict-item]
        Approval(allow=1),
        None,
        1,
        "yes",
        ("allow", True),  # type: ignore[arg-type]
    ],
)
async def test_what_is_no_clear_yes_denies(answer: Any) -> None:
    results, seen = await told([tool_call("pay")], lambda call: answer)
    assert results[0].startswith("error: pay: not approved")
    assert not [event for event in seen if isinstance(event, events.ToolStarted)]


async def test_a_call_is_said_to_start_after_it_was_approved() -> None:
    order: list[str] = []

    async def approve(call: ToolCall) -> bool:
        await anyio.sleep(0.01)
        order.append("approved")
        return True

    async with ScriptedEngine([tool_call("pay"), "Ok."]) as engine, engine.session(tools=[pay]) as s:
        _ = await s.run("Go.", approve=approve, on_event=lambda event: order.append(type(event).__name__))
    assert order.index("approved") < order.index("ToolStarted") < order.index("ToolFinished")


@pytest.mark.parametrize(("at_once", "most"), [(False, 1), (True, 3)])
async def test_questions_come_one_at_a_time_in_call_order_unless_asked_otherwise(at_once: bool, most: int) -> None:
    open_now, seen, order = 0, 0, list[str]()

    async def approve(call: ToolCall) -> bool:
        nonlocal open_now, seen
        open_now += 1
        seen = max(seen, open_now)
        order.append(call.arguments)
        await anyio.sleep(0.02)
        open_now -= 1
        return True

    script = "".join(tool_call("pay", amount=amount, to="me") for amount in (1, 2, 3))
    _ = await told([script], approve, approve_at_once=at_once)
    assert seen == most
    if not at_once:
        assert order == [f'{{"amount":{amount},"to":"me"}}' for amount in (1, 2, 3)]


async def test_a_question_waits_for_no_tool_that_runs() -> None:
    done = anyio.Event()

    @tool(needs_approval=True)
    async def waits() -> str:
        """Wait."""
        await done.wait()
        return "waited"

    async def approve(call: ToolCall) -> bool:
        if call.name == "pay":
            done.set()
        return True

    with anyio.fail_after(10):
        results, _ = await told([tool_call("waits") + tool_call("pay")], approve, tools=[waits])
    assert results == ["waited", "paid 5000 to mallory"]


class Odd(Exception):
    def __str__(self) -> str:
        raise AttributeError("missing")


@pytest.mark.parametrize("raised", [Odd(), ExceptionGroup("several", [Odd(), ValueError("x")])])
async def test_an_exception_that_cannot_be_written_is_told_by_its_name(raised: Exception) -> None:
    @tool
    def f() -> str:
        """Fail."""
        raise raised

    async with ScriptedEngine([tool_call("f"), "Ok."]) as engine, engine.session(tools=[f]) as s:
        result = await s.run("Go.")
    assert result.tools[0].text.startswith("error: f: Odd (its text cannot be had)")


async def test_a_run_may_end_with_calls_that_nobody_decided_about_and_go_on_in_another_process() -> None:
    asked: list[int] = []

    def later(call: ToolCall) -> bool | Approval:
        asked.append(json.loads(call.arguments)["amount"])
        return True if asked[-1] < 5 else Approval(allow=False, later=True)

    script = [tool_call("pay", amount=1) + tool_call("pay", amount=5) + tool_call("pay", amount=2), "All is paid."]
    async with ScriptedEngine(script) as engine, engine.session(tools=[pay]) as s:
        result = await s.run("Pay.", approve=later)
        assert (result.reason, result.turns, result.tools, result.limit) == ("approval", 1, (), None)
        assert len(s.open_calls) == 3
        again = await s.run(approve=later)
        assert (again.reason, again.turns, again.reply.tool_calls) == ("approval", 0, s.open_calls)
        stored = await s.snapshot()
    assert asked == [1, 5, 2, 5]
    async with ScriptedEngine(script[1:]) as engine, Session.restore(stored, engine.engine, tools=[pay]) as s:
        result = await s.run(approve=lambda call: True)
        assert (result.text, result.reason) == ("All is paid.", "answered")
        assert [one.text for one in result.tools] == [f"paid {amount} to mallory" for amount in (1, 5, 2)]


async def test_a_call_that_waits_for_a_decision_is_told_to_nobody_as_finished() -> None:
    seen: list[events.AnyEvent] = []
    async with ScriptedEngine([tool_call("pay", amount=5), "Not now."]) as engine, engine.session(tools=[pay]) as s:
        _ = await s.run("Pay.", approve=lambda call: Approval(allow=False, later=True), on_event=seen.append)
        assert not any(isinstance(event, events.ToolStarted | events.ToolFinished) for event in seen)
        reply = await s.generate("Never mind.")
        assert reply.text == "Not now." and s.open_calls == ()

"""Sessions without async: the same verbs, from a plain function; an interrupt cancels what runs."""

from __future__ import annotations

import inspect
import re
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

import agentspeed
from agentspeed import Limits, errors, events, tool
from agentspeed._core.engine_options import EngineOptions
from agentspeed._core.options import RestoreOptions, SessionOptions
from agentspeed.sync import Session, entered
from agentspeed.testing import ScriptedEngine, ScriptedText, say, tool_call


@tool
def add(a: int, b: int) -> int:
    """Add."""
    return a + b


def loops() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "portal" in thread.name]


@pytest.fixture(autouse=True)
def no_loop_is_left() -> Iterator[None]:
    yield
    assert loops() == []


def test_turns_runs_and_branches_are_as_in_an_async_session() -> None:
    script = ["Hello.", tool_call("add", a=17, b=25), "42.", "One.", "Two.", "Three."]
    with entered(ScriptedEngine(script)) as engine, Session(engine.engine, tools=[add], name="plain") as s:
        assert s.generate("Hi!").text == "Hello."
        here = s.mark("here")
        result = s.run("17 plus 25?", limits=Limits(tool_calls=2))
        assert (result.text, [message.text for message in result.tools]) == ("42.", ["42"])
        s.rewind(here)
        assert [message.text for message in s.messages] == ["Hi!", "Hello."]
        with s.fork(2) as (one, two):
            told = {branch.generate("Say.").text for branch in (one, two)}
            assert told == {"One.", "Two."}
            two.close()
            s.adopt(one)
        assert s.messages[-1].text in told
        assert s.compact(keep=2, summary="We met.").dropped == 2
        assert s.generate("And?").text == "Three."
        assert s.usage.turns == 5
        assert s.room > 0
        data, ids = s.snapshot(), s.trajectory().ids
        with Session.restore(data, engine.engine, tools=[add]) as again:
            assert again.trajectory().ids == ids
        assert engine.live_branches == 1


def test_a_stream_is_an_iterator_and_may_be_left() -> None:
    script: list[str | ScriptedText] = [
        "Hello there.",
        tool_call("add", a=1, b=2),
        "3.",
        say("A long answer indeed.", seconds=0.05),
        "Fine.",
    ]
    with entered(ScriptedEngine(script)) as engine, Session(engine.engine, tools=[add]) as s:
        with s.stream("Hi!") as turn:
            text = "".join(event.text for event in turn if isinstance(event, events.TextDelta))
        assert text == turn.result().text == "Hello there."
        with s.stream_run("Add.") as run:
            names = [type(event).__name__ for event in run]
        assert "ToolFinished" in names
        assert run.result().text == "3."
        with s.stream_run("Long.") as run:
            _ = next(run)
        assert s.messages[-1].text == "3."
        assert s.generate("And now?").text == "Fine."


def test_it_is_open_between_open_and_close_and_says_so_outside() -> None:
    with entered(ScriptedEngine(["Hello."])) as engine:
        s = Session(engine.engine)
        with pytest.raises(errors.SessionClosed, match="call open"):
            _ = s.generate("Hi!")
        assert s.open() is s
        assert s.generate("Hi!").text == "Hello."
        s.close()
        s.close()
        with pytest.raises(errors.SessionClosed):
            _ = s.generate("Hi!")
        with pytest.raises(errors.SessionClosed):
            _ = s.open()
        assert engine.live_branches == 0


def test_errors_are_those_of_an_async_session() -> None:
    with entered(ScriptedEngine([])) as engine, Session(engine.engine) as s:
        with pytest.raises(errors.MarkNotFound):
            s.rewind("nowhere")
        with pytest.raises(errors.InvalidRequest, match="max_tokens"):
            _ = s.generate("Hi!", max_tokens=0)
        other: Any = "a session"
        with pytest.raises(errors.ChildUnrelated):
            s.adopt(other)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C raises `KeyboardInterrupt`, also where the tests run as a shell's job in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    _ = signal.signal(signal.SIGINT, before)


def test_an_interrupt_cancels_the_turn_and_the_session_goes_on(ctrl_c: None) -> None:
    script: list[str | ScriptedText] = [say("A long answer indeed. " * 20, seconds=0.2), "Fine."]
    with entered(ScriptedEngine(script)) as engine, Session(engine.engine) as s:
        main = threading.main_thread().ident or 0
        timer = threading.Timer(0.3, signal.pthread_kill, (main, signal.SIGINT))  # as Ctrl-C does
        timer.start()
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            _ = s.generate("Long.")
        timer.join()
        assert time.monotonic() - began < 10
        assert s.messages == ()
        assert s.generate("And now?").text == "Fine."


NOT_THE_SAME = {
    "open": "it gives the plain session",
    "tool_call": "nothing can stop a plain block from outside, so it has no timeout",
    "compact": "a function that writes the summary is a plain one",
}
"""Verbs whose arguments differ from the async ones, and why."""
_PLAIN = {"Forks[Session]": "Generator[tuple[Session, ...], None, None]", "Turn[Any]": "Stream[Turn[Any]]"}
_PLAIN |= {"RunStream[Any]": "Stream[RunStream[Any]]"}


def members(kind: type) -> dict[str, Any]:
    found = {name: value for one in reversed(kind.__mro__[:-1]) for name, value in vars(one).items()}
    return {name: value for name, value in found.items() if not name.startswith("_")}


def signature(value: Any) -> str:
    call = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
    return str(inspect.signature(inspect.unwrap(call))).replace("'", "").replace("asynchronous.", "")


def test_every_verb_and_value_of_an_async_session_is_here_with_the_same_arguments() -> None:
    theirs, ours = members(agentspeed.Session), members(Session)
    assert theirs.keys() - ours.keys() == {"parent"} and ours.keys() - theirs.keys() == set()
    assert Session("a folder").parent is None  # it is the plain session, so each has its own
    for name, value in theirs.items():
        if name in NOT_THE_SAME or name == "parent":
            continue
        wanted = signature(value)
        for theirs_gives, ours_gives in _PLAIN.items():
            wanted = re.sub(f"-> {re.escape(theirs_gives)}$", f"-> {ours_gives}", wanted)
        assert signature(ours[name]) == wanted, name


def test_sessions_take_the_same_options_wherever_they_are_made() -> None:
    made = inspect.signature(agentspeed.Session.__init__).parameters.values()
    own = {one.name for one in made if one.kind is inspect.Parameter.KEYWORD_ONLY}
    assert own == SessionOptions.__annotations__.keys() | {"on_start"}  # which an engine that runs has behind it
    assert RestoreOptions.__annotations__.keys() == own | EngineOptions.__annotations__.keys()


def test_calls_are_served_sessions_scored_and_copied_from_plain_code() -> None:
    script = [tool_call("add", a=17, b=25), "42.", "We added.", "Twice."]
    with entered(ScriptedEngine(script)) as engine, Session(engine.engine, tools=[add], name="plain") as s:
        (call,) = s.generate("17 plus 25?").tool_calls
        with s.tool_call(call, expect=0.0) as pending:
            pending.result = pending.arguments["a"] + pending.arguments["b"]
        assert s.open_calls == () and s.generate().text == "42."
        assert s.expect(1.0).keep == "soft"
        assert (s.inspect().state, s.inspect().known) == ("Held", s.tokens)
        with pytest.raises(errors.InvalidRequest, match="nothing to score"):
            _ = s.score("")
        with s.copy() as other, s.fork() as (child,):
            assert (other.messages, other.parent, child.parent) == (s.messages, None, s)
        assert s.compact(summary=lambda fork: fork.generate("Sum up.").text).dropped == 4
        assert "We added." in s.messages[0].text
        with Session.from_messages(s.to_messages(), engine.engine, tools=[add]) as again:
            assert again.messages == s.messages and again.position(1) == s.position(1)


def test_a_child_that_is_used_when_everything_is_closed_says_so() -> None:
    with entered(ScriptedEngine([])) as engine, Session(engine.engine) as s, s.fork() as (child,):
        pass
    with pytest.raises(errors.SessionClosed):
        _ = child.generate("Hi")
    child.close()

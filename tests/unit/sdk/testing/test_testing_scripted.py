"""What the scripted engine promises to tests of other people's agents."""

from __future__ import annotations

import logging
import math
import shutil
import time
from pathlib import Path
from typing import Any

import anyio
import pytest

from agentspeed import Sampling, Session
from agentspeed.engine import NANO
from agentspeed.errors import (
    InvalidRequest,
    InvalidSampling,
    ModelBroken,
    OutputError,
    SessionBusy,
    TrunkMoved,
    TurnTimeout,
)
from agentspeed.messages import Assistant, ToolCall, User
from agentspeed.testing import ScriptedEngine, ScriptedText, Turn, say, tool_call
from agentspeed.testing.scripted_server import ScriptedServer
from agentspeed_engine.protocol import messages as wire
from agentspeed_engine.protocol.frames import encode_command

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


async def test_texts_are_said_in_order_and_enter_the_log() -> None:
    async with ScriptedEngine(["Hello.", "Again."]) as engine, engine.session() as s:
        assert (await s.generate("Hi")).text == "Hello."
        assert (await s.generate("Hi")).text == "Again."
        assert [message.text for message in s.messages] == ["Hi", "Hello.", "Hi", "Again."]


async def test_a_run_calls_tools_and_answers() -> None:
    script = ["Adding. " + tool_call("add", a=1, b=2) + tool_call("add", a=3, b=4), "3 and 7."]
    async with ScriptedEngine(script) as engine, engine.session(tools=[add]) as s:
        result = await s.run("Add.")
        assert (result.text, result.turns) == ("3 and 7.", 2)
        assert [message.text for message in result.tools] == ["3", "7"]
        first = next(message for message in s.messages if isinstance(message, Assistant))
        assert [call.arguments for call in first.tool_calls] == ['{"a":1,"b":2}', '{"a":3,"b":4}']


async def test_wrong_arguments_are_fed_back_to_the_model() -> None:
    def positive(n: int) -> int:
        """Give back a number above zero."""
        if n < 1:
            raise ValueError("n must be above 0")
        return n

    heard: list[str] = []

    def model(turn: Turn) -> str:
        heard.append(turn.log)
        return [tool_call("positive", n=-1), tool_call("positive", n=1), "It is 1."][turn.turn - 1]

    async with ScriptedEngine(model) as engine, engine.session(tools=[positive]) as s:
        assert (await s.run("Go.")).text == "It is 1."
    assert "error: positive: ValueError: n must be above 0" in heard[1]


@pytest.mark.parametrize("text", [tool_call("sub", a=1), tool_call("add", a="x", b=1), '<tool_call>{"name":"add"'])
async def test_a_text_that_the_grammar_does_not_allow_is_an_error_that_quotes_it(text: str) -> None:
    async with ScriptedEngine([text, "fine"]) as engine, engine.session(tools=[add]) as s:
        with pytest.raises(OutputError, match="the scripted text"):
            _ = await s.generate("Add.")


async def test_an_output_must_fit_its_schema() -> None:
    async with ScriptedEngine(["[1,2]", "[1,]"]) as engine, engine.session() as s:
        assert (await s.generate("Numbers.", output=list[int])).output == [1, 2]
        with pytest.raises(OutputError, match=r"does not fit the turn's grammar after '\[1"):
            _ = await s.generate("Numbers.", output=list[int])


async def test_a_script_that_is_too_short_says_so() -> None:
    async with ScriptedEngine([]) as engine, engine.session() as s:
        with pytest.raises(OutputError, match="the script has no text for turn 1"):
            _ = await s.generate("Hi")


async def test_a_function_sees_the_log_and_counts_turns() -> None:
    seen: list[tuple[int, int]] = []

    def model(turn: Turn) -> str:
        assert turn.log.endswith("<|assistant|>")
        seen.append((turn.turn, turn.session_turn))
        return "ok"

    async with ScriptedEngine(model) as engine:
        for _ in range(2):
            async with engine.session() as s:
                _ = await s.generate("a")
                _ = await s.generate("b")
    assert seen == [(1, 1), (2, 2), (3, 1), (4, 2)]


async def test_a_slow_turn_can_be_cancelled_and_times_out() -> None:
    async with ScriptedEngine(lambda _: say("word " * 100, seconds=0.02)) as engine, engine.session() as s:
        before = s.tokens
        with anyio.move_on_after(0.1) as scope:
            _ = await s.generate("Go.")
        assert scope.cancelled_caught
        assert s.tokens == before
        with pytest.raises(TurnTimeout):
            _ = await s.generate("Go.", timeout=0.1)


async def test_a_slow_turn_is_busy_and_can_be_forked_alive() -> None:
    script: list[str | ScriptedText] = [say("one two three four", seconds=0.02), " and more"]
    async with ScriptedEngine(script) as engine, engine.session() as s, s.stream("Count.") as turn:
        while not turn.text:
            _ = await anext(turn)
        with pytest.raises(SessionBusy):
            _ = await s.generate("Now.")
        async with s.fork(1) as (child,):
            reply = await child.generate()
        assert reply.text.endswith(" and more")
        assert (await turn.reply()).text == "one two three four"


async def test_stop_strings_and_max_tokens_end_a_turn() -> None:
    async with ScriptedEngine(["one\ntwo", "a b c d e f"]) as engine, engine.session() as s:
        assert (await s.generate("Go.", stop="\n")).text == "one"
        reply = await s.generate("Go.", max_tokens=2)
        assert (reply.finish_reason, reply.usage.drawn) == ("max_tokens", 2)


async def test_forks_adoption_and_kinship_are_as_in_the_engine() -> None:
    async with ScriptedEngine(lambda turn: f"answer {turn.turn}") as engine, engine.session() as s:
        async with s.fork(2) as (one, two):
            _ = await one.generate("Go.")
            _ = await two.generate("Go.")
            await s.adopt(two)
            with pytest.raises(TrunkMoved):
                await s.adopt(one)
            assert engine.live_branches == 2
        assert s.messages[-1].text == "answer 2"
        assert engine.live_branches == 1


async def test_what_each_turn_asked_of_the_engine_can_be_asserted() -> None:
    async with ScriptedEngine(["a", "b"]) as engine, engine.session(tools=[add]) as s:
        _ = await s.generate("Go.", temperature=0.7, max_tokens=9, seed=5)
        asked = engine.turns[0]
        assert (asked.sampling.temperature, asked.max_tokens, asked.seed) == (0.7, 9, 5)
        assert asked.grammar is not None


async def test_users_tests_may_add_history_without_a_turn() -> None:
    call = ToolCall(id="c", name="add", arguments="{}")
    async with ScriptedEngine(["done"]) as engine, engine.session(tools=[add]) as s:
        _ = await s.add(User("Add."), Assistant("", tool_calls=(call,), raw=tool_call("add", a=1, b=2)))
        assert len(s.messages) == 2


async def test_nothing_is_left_when_the_engine_is_closed_first() -> None:
    engine = ScriptedEngine(["a"])
    async with engine:
        session: Session = engine.session()
        _ = await session.__aenter__()
        _ = await session.generate("Hi")
    await session.close()
    assert engine.live_branches == 0


class _SlowToClear(dict[int, Any]):
    def clear(self) -> None:
        time.sleep(0.2)
        super().clear()


def test_a_closed_server_holds_no_branch_also_when_its_client_went_first() -> None:
    server = ScriptedServer(NANO, lambda asked: None)
    peer = server.open()
    (link,) = server._links
    link.branches = _SlowToClear()
    with peer:
        peer.sendall(encode_command(wire.Open(request=1, ids=b"")))
        assert peer.recv(1 << 16)
        assert server.live_branches == 1
    time.sleep(0.05)  # the server's thread has closed its socket, and is about to forget its branches
    anyio.run(server.close)
    assert server.live_branches == 0


def test_a_tool_call_is_written_as_the_model_writes_it() -> None:
    expected: Any = '<tool_call>{"name":"find","arguments":{"text":"é \\" x","n":[1]}}</tool_call>'
    assert tool_call("find", text='é " x', n=[1]) == expected


@pytest.mark.parametrize("item", [5, None, say("x", seconds=-1), "\ud800"])
def test_a_text_of_a_script_that_cannot_be_said_is_refused_when_the_engine_is_made(item: Any) -> None:
    with pytest.raises((TypeError, InvalidRequest), match=r"script|say seconds"):
        _ = ScriptedEngine([item])


async def test_a_script_that_raises_ends_its_turn_with_what_it_raised(caplog: pytest.LogCaptureFixture) -> None:
    def model(turn: Turn) -> str:
        assert turn.turn > 1, "not yet"
        return "Fine."

    async with ScriptedEngine(model) as engine, engine.session() as s:
        with pytest.raises(OutputError, match="the script raised AssertionError: not yet"):
            _ = await s.generate("Hi")
        assert (await s.generate("Hi")).text == "Fine."
        assert engine.live_branches == 1
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_a_function_that_gives_no_text_ends_its_turn_with_what_was_wrong() -> None:
    async with ScriptedEngine(lambda turn: 5) as engine, engine.session() as s:  # type: ignore[arg-type, return-value]
        with pytest.raises(OutputError, match="a turn writes 5"):
            _ = await s.generate("Hi")


@pytest.mark.parametrize(("logprobs", "count"), [(0, 0), (1, 1), (3, 3)])
async def test_the_most_likely_ids_come_with_each_token_when_asked_for(logprobs: int, count: int) -> None:
    async with ScriptedEngine(["a b c"]) as engine, engine.session() as s:
        reply = await s.generate("Hi", logprobs=logprobs)
    assert len(reply.logprobs) == len(reply.draw_logprobs) == len(reply.ids)
    assert len(reply.top_logprobs) == (len(reply.ids) if count else 0)
    for number, logprob, top in zip(reply.ids, reply.logprobs, reply.top_logprobs, strict=False):
        assert top[0] == (number, logprob)
        assert len({other for other, _ in top}) == len(top) == count
        assert [value for _, value in top] == sorted((value for _, value in top), reverse=True)
        assert sum(math.exp(value) for _, value in top) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"logprobs": 21}, "logprobs is 21"),
        ({"temperature": -1}, "-1"),
        ({"sampling": Sampling(frequency_penalty=3)}, "frequency_penalty is 3"),
        ({"sampling": Sampling(logit_bias={10**6: 1.0})}, "an id of logit_bias is 1000000"),
    ],
)
async def test_how_to_draw_is_refused_as_the_engine_refuses_it(options: Any, told: str) -> None:
    async with ScriptedEngine(["Fine."]) as engine, engine.session() as s:
        with pytest.raises(InvalidSampling, match=told):
            _ = await s.generate("Hi", **options)
        assert s.messages == ()
        assert (await s.generate("Hi")).text == "Fine."


@pytest.mark.parametrize("model", ["/nope", "~/nope", "./nope"])
def test_a_model_folder_that_is_none_is_refused_as_an_engine_refuses_it(model: str) -> None:
    with pytest.raises(ModelBroken, match="nope is not a folder"):
        _ = ScriptedEngine([], model=model)


def test_a_model_that_is_no_path_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequest, match="model is 5"):
        _ = ScriptedEngine([], model=5)  # type: ignore[arg-type]


def test_a_folder_without_a_usable_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelBroken, match=r"has no tokenizer\.json"):
        _ = ScriptedEngine([], model=tmp_path)
    _ = (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelBroken, match="is not a tokenizer"):
        _ = ScriptedEngine([], model=tmp_path)


async def test_a_model_folder_may_be_given(tmp_path: Path) -> None:
    folder = shutil.copytree(NANO, tmp_path / "model")
    async with ScriptedEngine(["Fine."], model=folder) as engine, engine.session() as s:
        assert (await s.generate("Hi")).text == "Fine."

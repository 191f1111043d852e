"""A message that a turn was cut in and another goes on with: what of the reply is the whole and what the new part."""

from __future__ import annotations

import pytest

from agentspeed import Session, events, tool
from agentspeed.chat.stop_filter import StopFilter
from agentspeed.testing import ScriptedEngine, tool_call

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@tool
def add(a: int, b: int) -> int:
    """Add."""
    return a + b


async def test_text_is_of_the_whole_message_and_ids_deltas_and_usage_are_of_the_turn() -> None:
    async with ScriptedEngine(["One two three.", " four five."]) as engine, engine.session() as s:
        first = await s.generate("Count.", max_tokens=4)
        known = s.tokens
        async with s.stream() as turn:
            assert (turn.text, turn.new_text) == (first.text, "")
            told = [event.text async for event in turn if isinstance(event, events.TextDelta)]
            reply = turn.result()
        assert reply.text == s.messages[-1].text == first.text + reply.new_text
        assert "".join(told) == turn.new_text == reply.new_text == " four five."
        assert len(reply.ids) == s.tokens - known == reply.usage.drawn
        assert first.new_text == first.text


async def test_calls_of_a_message_keep_their_ids_when_it_goes_on() -> None:
    one, other = tool_call("add", a=1, b=2), tool_call("add", a=3, b=4)
    async with ScriptedEngine([one + other, other]) as engine, engine.session(tools=[add]) as s:
        length = len(engine.engine.codec.tokenizer.template_ids(one))
        first = await s.generate("Add.", max_tokens=length)
        assert len(first.tool_calls) == 1 and first.finish_reason == "tool_calls"
        reply = await s.generate()
        assert reply.tool_calls[:1] == first.tool_calls and len(reply.tool_calls) == 2
        assert s.open_calls == reply.tool_calls


async def test_a_hidden_stop_text_does_not_come_back() -> None:
    script = ["one STOP two", "three STOP four", "five"]
    async with ScriptedEngine(script) as engine, engine.session() as s:
        texts = [(await s.generate("Go.", stop="STOP")).text]
        texts += [(await s.generate(stop="STOP")).text for _ in range(2)]
        assert texts == ["one ", "one three ", "one three five"]
        assert s.messages[-1].text == s.messages[-1].raw == "one three five"


async def test_a_stop_text_that_is_asked_for_is_part_of_the_text_and_stays_it() -> None:
    async with ScriptedEngine(["one\n", "two\nthree", "four"]) as engine, engine.session() as s:
        first = await s.generate("Go.", stop="\n", include_stop=True)
        assert (first.text, first.finish_reason) == ("one\n", "stop_string")
        reply = await s.generate(stop="\n", include_stop=True)
        assert (reply.text, reply.new_text) == ("one\ntwo\n", "two\n")
        assert (await s.generate(stop="zzz", max_tokens=1)).text.startswith("one\ntwo\n")


@pytest.mark.parametrize("way", ["fork", "rewind", "restore", "close"])
async def test_a_hidden_stop_text_stays_hidden_wherever_the_message_goes(way: str) -> None:
    async with ScriptedEngine(lambda turn: "one STOP" if turn.turn == 1 else "two") as engine, engine.session() as s:
        _ = await s.generate("Go.", stop="STOP")
        mark = await s.mark()
        match way:
            case "fork":
                async with s.fork() as (child,):
                    assert (await child.generate()).text == "one two"
            case "rewind":
                _ = await s.generate()
                await s.rewind(mark)
                assert (await s.generate()).text == "one two"
            case "restore":
                async with Session.restore(await s.snapshot(), engine.engine) as again:
                    assert (await again.generate()).text == "one two"
            case _:
                _ = await s.generate(max_tokens=1)
                await s.rewind(s.tokens - 1)  # in the middle of it: no turn ended here
                _ = await s.add("Next.")
                assert [message.text for message in s.messages] == ["Go.", "one ", "Next."]


async def test_a_rewind_into_a_stop_text_shows_what_is_left_of_it() -> None:
    async with ScriptedEngine(["one STOP", "AGE"]) as engine, engine.session() as s:
        _ = await s.generate("Go.", stop="STOP")
        await s.rewind(s.tokens - 1)
        reply = await s.generate()
        assert reply.text.startswith("one ST") and reply.text.endswith("AGE")


async def test_a_stop_text_begun_before_a_cut_is_seen_after_it() -> None:
    async with ScriptedEngine(["abcdSTOPef", "Pef more"]) as engine, engine.session() as s:
        first = await s.generate("Go.", max_tokens=6, stop="STOP")
        assert first.text.startswith("abcdS") and first.finish_reason == "max_tokens"
        cut = len("abcdSTOP") - len(first.text)
        assert cut > 0
    rest = "STOP"[-cut:]
    async with ScriptedEngine(["abcdSTOPef", f"{rest}ef more"]) as engine, engine.session() as s:
        _ = await s.generate("Go.", max_tokens=6, stop="STOP")
        async with s.stream(stop="STOP") as turn:
            told = [event async for event in turn if isinstance(event, events.TextDelta)]
            reply = turn.result()
        assert (reply.text, reply.new_text, reply.finish_reason, told) == ("abcd", "", "stop_string", [])
        assert s.messages[-1].text == "abcd"


async def test_what_had_begun_like_a_stop_text_and_is_none_is_told_once() -> None:
    async with ScriptedEngine(["abcdSTOPef", "UFF"]) as engine, engine.session() as s:
        first = await s.generate("Go.", max_tokens=6, stop="STOP")
        async with s.stream(stop="STOP") as turn:
            told = "".join([event.text async for event in turn if isinstance(event, events.TextDelta)])
            reply = turn.result()
        assert reply.text == first.text + "UFF" and told == reply.new_text == "UFF"


async def test_a_stop_text_of_a_later_turn_is_not_found_in_what_an_earlier_one_wrote() -> None:
    async with ScriptedEngine(["one STOP two three", " four"]) as engine, engine.session() as s:
        first = await s.generate("Go.", max_tokens=9)
        assert "STOP" in first.text
        reply = await s.generate(stop="STOP")
        assert reply.text == f"{first.text} four" and reply.finish_reason == "stop_id"


async def test_a_real_engine_sees_a_stop_text_across_a_cut_too() -> None:
    async with Session(seed=3, threads=1) as s:
        whole = await s.generate("Say something.", max_tokens=24, seed=1)
        text = whole.text
        stop = text[4:8]
        assert stop and text.find(stop) == 4
        await s.rewind(s.starts[-1])
        for most in range(1, 24):
            async with s.fork() as (child,):
                first = await child.generate(max_tokens=most, seed=1)
                if not 4 < len(first.text) < 8:
                    continue
                reply = await child.generate(stop=stop, temperature=0.0, max_tokens=24)
                assert reply.text == text[:4] and reply.finish_reason == "stop_string"
                return
        pytest.skip("no cut of this text falls into the stop text")


def test_the_filter_is_the_same_however_the_text_is_split() -> None:
    text = "aaSTaSTOPbSTO"
    for cut in range(len("aaSTaSTO")):
        for stops in (("STOP",), ("STOP", "aS"), ("OPb", "STOP")):
            plain, resumed = StopFilter(stops), StopFilter(stops)
            whole = plain.feed(text[:cut])
            if plain.stopped:
                continue
            got = resumed.go_on_from(text[:cut])
            assert got == whole
            assert got + resumed.feed(text[cut:]) + resumed.finish() == whole + plain.feed(text[cut:]) + plain.finish()

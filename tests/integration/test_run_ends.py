"""How a run or a turn may end, and what is said of it: answered, forced, cut, rejected, or left with calls."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
from pydantic import BaseModel, field_validator

from agentspeed import Assistant, Choice, Regex, Schema, ToolCall, ToolMessage, errors, events, tool
from agentspeed.chat.transcript import NO_RESULT
from agentspeed.testing import ScriptedEngine, say, tool_call

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class M(BaseModel):
    n: int

    @field_validator("n")
    @classmethod
    def natural(cls, n: int) -> int:
        if n < 0:
            raise ValueError("must not be negative")
        return n


def f(a: int) -> int:
    """Doubles."""
    return 2 * a


BAD, GOOD, CALL = '{"n":-1}', '{"n":1}', tool_call("f", a=1)


# ---- rejected outputs -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("script", "max_turns"), [([BAD], 1), ([CALL, BAD], 2), ([CALL, BAD, BAD], 3)])
async def test_an_output_rejected_in_the_last_turn_is_an_output_error(script: list[str], max_turns: int) -> None:
    async with ScriptedEngine(script) as engine, engine.session(tools=[f]) as s:
        with pytest.raises(errors.OutputError, match="must not be negative") as refused:
            _ = await s.run("go", output=M, max_turns=max_turns)
        assert refused.value.text == BAD
        assert len(engine.turns) == len(script)


async def test_an_output_rejected_before_the_last_turn_is_asked_for_again() -> None:
    async with ScriptedEngine([CALL, BAD, GOOD]) as engine, engine.session(tools=[f]) as s:
        result = await s.run("go", output=M, max_turns=3)
        assert (result.output, result.turns) == (M(n=1), 3)


async def test_a_tool_choice_of_none_holds_when_the_output_is_asked_for_again() -> None:
    async with ScriptedEngine([BAD, GOOD]) as engine, engine.session(tools=[f]) as s:
        result = await s.run("go", output=M, tool_choice="none")
        assert (result.output, result.reason) == (M(n=1), "answered")
        sources = [turn.grammar.source for turn in engine.turns if turn.grammar]
        assert len(sources) == 2 and not any("calls" in source for source in sources)


async def test_a_turn_that_ended_in_calls_has_no_output_of_the_asked_type() -> None:
    async with ScriptedEngine([CALL]) as engine, engine.session(tools=[f]) as s:
        reply = await s.generate("go", output=M)
        assert reply.output is None and reply.tool_calls[0].name == "f"


# ---- cut turns ------------------------------------------------------------------------------------------------------
async def cut_inside_a_call(s: Any) -> Any:
    """The shortest turn that ends after the call's arguments have begun."""
    for bound in range(2, 40):
        start = await s.mark()
        reply = await s.generate("go", max_tokens=bound)
        if '"a":' in (reply.partial_call or ""):
            return reply
        await s.rewind(start)
    raise AssertionError("never cut there")


async def test_half_a_call_is_no_text_and_the_model_can_go_on_with_it() -> None:
    whole = "I try. " + tool_call("f", a=12345)

    def said(turn: Any) -> str:
        begun = turn.log.rpartition("<|assistant|>")[2]
        return whole[len(begun) :] if whole.startswith(begun) else "24690."

    async with ScriptedEngine(said) as engine, engine.session(tools=[f]) as s:
        reply = await cut_inside_a_call(s)
        assert (reply.text, reply.finish_reason, reply.tool_calls) == ("I try. ", "max_tokens", ())
        message = s.messages[-1]
        assert isinstance(message, Assistant)
        assert message.text == "I try. " and message.raw == "I try. <tool_call>" + reply.partial_call
        assert (await s.generate()).tool_calls[0].arguments == '{"a":12345}'


@pytest.mark.parametrize(
    "text",
    ["Tags: <tool_call> opens.", "<tool_call>not JSON</tool_call> is none.", '<tool_call>{"name":5}</tool_call>'],
)
async def test_what_only_stands_between_a_calls_marks_is_text_with_its_marks(text: str) -> None:
    async with ScriptedEngine([text] * 2) as engine, engine.session() as s:
        reply = await s.generate("Explain.")
        assert (reply.text, reply.partial_call, reply.finish_reason) == (text, None, "stop_id")
        result = await s.run("Explain.")
        assert (result.text, result.reason) == (text, "answered")


@pytest.mark.parametrize("more", [1, 3, 5])
async def test_a_run_cut_inside_a_call_says_what_to_do(more: int) -> None:
    async with ScriptedEngine(["Hm. " + tool_call("f", a=12345)] * 2) as engine, engine.session(tools=[f]) as s:
        bound = len(s.engine.codec.tokenizer.content_ids("Hm. ")) + more
        heard: list[str] = []

        def note(event: events.AnyEvent) -> None:
            if isinstance(event, events.TextDelta):
                heard.append(event.text)

        with pytest.raises(errors.OutputError, match="cut inside a call, by max_tokens") as refused:
            _ = await s.run("go", max_tokens=bound, on_event=note)
        assert "Raise max_tokens" in refused.value.remedy
        assert refused.value.text == "Hm. " == "".join(heard)
        with pytest.raises(errors.OutputError, match="cut inside a call"):
            _ = await s.run("go", max_tokens=bound, output_retries=1)


async def test_a_typed_turn_cut_inside_a_call_is_an_output_error_that_is_not_retried() -> None:
    async with ScriptedEngine([CALL] * 2) as engine, engine.session(tools=[f]) as s:
        for ask in (s.generate, s.run):
            with pytest.raises(errors.OutputError, match="cut inside a call"):
                _ = await ask("go", output=M, max_tokens=2)
        assert len(engine.turns) == 2


async def test_a_stop_text_inside_a_call_names_itself() -> None:
    async with ScriptedEngine([CALL] * 2) as engine, engine.session(tools=[f]) as s:
        reply = await s.generate("go", stop="arguments")
        assert (reply.text, reply.finish_reason) == ("", "stop_string") and reply.partial_call is not None
        with pytest.raises(errors.OutputError, match="by a stop text") as refused:
            _ = await s.run("go", stop="arguments")
        assert "stop texts" in refused.value.remedy


async def test_of_calls_of_which_the_last_was_cut_none_is_run() -> None:
    ran: list[int] = []

    @tool
    def g(a: int) -> None:
        """Notes."""
        ran.append(a)

    one = tool_call("g", a=1)
    async with ScriptedEngine([one + tool_call("g", a=12345)] * 30) as engine, engine.session(tools=[g]) as s:
        size = len(s.engine.codec.tokenizer.template_ids(one))
        with pytest.raises(errors.OutputError, match="cut inside a call"):
            _ = await s.run("go", max_tokens=size + 3)
        assert ran == []


async def test_a_run_whose_answer_was_cut_says_so() -> None:
    async with ScriptedEngine(["one two three four five", "one. two"]) as engine, engine.session(tools=[f]) as s:
        result = await s.run("go", max_tokens=3)
        assert (result.reason, result.reply.finish_reason) == ("cut", "max_tokens")
        stopped = await s.run("go", stop=".")
        assert (stopped.text, stopped.reason) == ("one", "answered")


@pytest.mark.parametrize(
    ("output", "text", "told"),
    [
        (M, '{"n":12345}', "M"),
        ({"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}, '{"n":12345}', "JSON"),
        (Regex("[a-z]{40}"), "a" * 40, "Regex"),
        (Choice("a long option, word for word", "no"), "a long option, word for word", "Choice"),
    ],
)
async def test_an_output_that_was_cut_is_not_asked_for_again(output: Any, text: str, told: str) -> None:
    async with ScriptedEngine([text] * 2) as engine, engine.session() as s:
        for ask in (s.generate, s.run):
            with pytest.raises(errors.OutputError, match="cut inside its output, by max_tokens") as refused:
                _ = await ask("go", output=output, max_tokens=2)
            assert refused.value.remedy == "Raise max_tokens, or let generate() go on with the message."
            assert refused.value.text and text.startswith(refused.value.text)
        assert len(engine.turns) == 2, told


async def test_an_output_cut_by_a_stop_text_names_it() -> None:
    async with ScriptedEngine(['{"n":1}']) as engine, engine.session() as s:
        with pytest.raises(errors.OutputError, match="cut inside its output, by a stop text") as refused:
            _ = await s.run("go", output=M, stop=":")
        assert "stop texts" in refused.value.remedy and len(engine.turns) == 1


async def test_an_output_that_is_whole_when_the_turn_is_cut_is_asked_for_again() -> None:
    """`max_tokens` was enough for it: it fails for what it says."""
    async with ScriptedEngine([BAD, GOOD]) as engine, engine.session() as s:
        size = len(s.engine.codec.tokenizer.content_ids(BAD))
        assert (await s.run("go", output=M, max_tokens=size)).output == M(n=1)


async def test_the_model_can_go_on_with_an_output_that_was_cut() -> None:
    def said(turn: Any) -> str:
        whole = '{"n":12345}'
        begun = turn.log.rpartition("<|assistant|>")[2]
        return whole[len(begun) :]

    async with ScriptedEngine(said) as engine, engine.session() as s:
        with pytest.raises(errors.OutputError, match="cut inside its output"):
            _ = await s.run("go", output=M, max_tokens=3)
        _ = await s.generate()
        assert s.messages[-1].text == '{"n":12345}'


@pytest.mark.parametrize(
    "output",
    [Schema(M), Schema.json({"type": "array", "items": {"type": "null"}}), Choice("yes", "no"), Regex("[ab]{3}")],
)
def test_what_is_not_whole_names_what_to_do(output: Any) -> None:
    with pytest.raises(errors.OutputError) as refused:
        _ = output.decode('{"n":')
    assert refused.value.remedy == "Raise max_tokens if it was cut short."


def test_what_is_whole_and_wrong_blames_no_bound() -> None:
    with pytest.raises(errors.OutputError, match="must not be negative") as refused:
        _ = Schema(M).decode(BAD)
    assert refused.value.remedy == ""


# ---- the last turn --------------------------------------------------------------------------------------------------
async def test_an_answer_in_the_last_turn_in_which_no_tool_could_be_called_is_forced() -> None:
    async with ScriptedEngine([CALL, "Enough.", "2.", "Now."]) as engine, engine.session(tools=[f]) as s:
        assert (await s.run("go", max_turns=2)).reason == "forced"
        assert (await s.run("go", max_turns=2)).reason == "answered"
        assert (await s.run("go", max_turns=1, tool_choice="none")).reason == "answered"


async def test_a_session_without_tools_is_never_forced() -> None:
    async with ScriptedEngine(["Yes.", CALL]) as engine, engine.session() as s:
        assert (await s.run("go", max_turns=1)).reason == "answered"
        ended = await s.run("go", max_turns=1)
        assert (ended.reason, ended.tools[0].text) == ("max_turns", "error: there is no tool 'f'; the tools are: none")


# ---- a turn that offers no tool -------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [{"tools": []}, {"tools": [], "tool_choice": "none"}, {"tool_choice": "none"}])
@pytest.mark.parametrize("verb", ["generate", "run"])
async def test_a_turn_that_offers_none_of_the_sessions_tools_can_call_none(options: Any, verb: str) -> None:
    async with ScriptedEngine([CALL, "Fine."]) as engine, engine.session(tools=[f]) as s:
        with pytest.raises(errors.OutputError, match="does not fit the turn's grammar"):
            _ = await getattr(s, verb)("go", **options)
        assert (await getattr(s, verb)("go", **options)).text == "Fine."


async def test_a_turn_that_offers_no_tool_may_still_be_asked_for_an_output() -> None:
    async with ScriptedEngine([GOOD]) as engine, engine.session(tools=[f]) as s:
        assert (await s.generate("go", tools=[], output=M)).output == M(n=1)


async def test_a_tool_of_a_turn_has_the_parameters_that_the_model_was_told() -> None:
    @tool(name="f")
    def other(b: str) -> str:
        """Other."""
        return b

    @tool(name="f")
    def same(a: int) -> int:
        """Triples."""
        return 3 * a

    async with ScriptedEngine([CALL, "3."]) as engine, engine.session(tools=[f]) as s:
        for verb in (s.generate, s.run):
            with pytest.raises(errors.InvalidRequest, match="describes other parameters of the tools f"):
                _ = await verb("go", tools=[other])
        assert (await s.run("go", tools=[same])).tools[0].text == "3"


# ---- calls that an earlier turn left --------------------------------------------------------------------------------
async def test_a_run_serves_the_calls_that_an_earlier_turn_left() -> None:
    async with ScriptedEngine([CALL + tool_call("f", a=2), "2 and 4."]) as engine, engine.session(tools=[f]) as s:
        _ = await s.generate("go")
        result = await s.run()
        assert ([message.text for message in result.tools], result.text) == (["2", "4"], "2 and 4.")
        assert [type(message).__name__ for message in s.messages[2:]] == ["ToolMessage", "ToolMessage", "Assistant"]


async def test_a_run_serves_them_before_its_prompt_also_when_it_offers_no_tool() -> None:
    async with ScriptedEngine([CALL, "2."]) as engine, engine.session(tools=[f]) as s:
        _ = await s.generate("go")
        result = await s.run("Well?", tools=[])
        assert [message.text for message in s.messages[2:]] == ["2", "Well?", "2."]
        assert [message.text for message in result.tools] == ["2"]


async def test_a_run_that_is_refused_has_run_no_call() -> None:
    async with ScriptedEngine([CALL, "2."]) as engine, engine.session(tools=[f]) as s:
        _ = await s.generate("go")
        with pytest.raises(errors.InvalidRequest, match="max_tokens is 0"):
            _ = await s.run("Well?", max_tokens=0)
        assert len(s.messages) == 2


async def test_a_run_takes_what_another_task_served_during_its_turn() -> None:
    async with ScriptedEngine([say(CALL, seconds=0.001), "Ok."]) as engine, engine.session(tools=[f]) as s:
        calls, heard = anyio.create_memory_object_stream[ToolCall](1)

        def note(event: events.AnyEvent) -> None:
            if isinstance(event, events.ToolCallReady):
                calls.send_nowait(event.call)

        async def serve() -> None:
            async with s.tool_call(await heard.receive()) as pending:
                pending.result = "by another"

        async with calls, heard, anyio.create_task_group() as group:
            _ = group.start_soon(serve)
            result = await s.run("go", on_event=note)
        assert [message.text for message in result.tools] == ["by another"]


async def test_a_run_runs_no_call_that_was_answered_by_hand() -> None:
    script = [CALL + tool_call("f", a=2), "Ok.", CALL, "Ok."]
    async with ScriptedEngine(script) as engine, engine.session(tools=[f]) as s:
        async with s.stream("go") as turn:
            async for event in turn:
                if isinstance(event, events.ToolCallReady) and event.call.arguments == '{"a":1}':
                    async with s.tool_call(event.call) as pending:
                        pending.result = "by hand"
        assert [message.text for message in (await s.run()).tools] == ["by hand", "4"]
        left = await s.generate("go")
        answer = ToolMessage(call_id=left.tool_calls[0].id, name="f", text="given")
        assert (await s.run([answer])).tools == ()
        assert [message.text for message in s.messages[-2:]] == ["given", "Ok."]


async def test_generate_tells_the_model_that_a_call_has_no_result() -> None:
    async with ScriptedEngine([CALL, "Oh."]) as engine, engine.session(tools=[f]) as s:
        _ = await s.generate("go")
        _ = await s.generate("Well?")
        assert s.messages[2].text == NO_RESULT


# ---- results and system messages given by hand ----------------------------------------------------------------------
async def test_a_result_needs_an_open_call() -> None:
    async with ScriptedEngine([CALL, "Fine."]) as engine, engine.session(tools=[f]) as s:
        stray = ToolMessage(call_id="zzz", name="f", text="1")
        for verb in (s.add, s.generate, s.run):
            with pytest.raises(errors.InvalidRequest, match="no open call 'zzz'"):
                _ = await verb([stray] if verb != s.add else stray)  # type: ignore[operator]
        reply = await s.generate("go")
        given = ToolMessage(call_id=reply.tool_calls[0].id, name="f", text="2")
        with pytest.raises(errors.InvalidRequest, match="no open call 'zzz'") as refused:
            _ = await s.add(stray)
        assert given.call_id in refused.value.remedy
        _ = await s.add(given)
        with pytest.raises(errors.InvalidRequest, match="The open calls are: none"):
            _ = await s.add(given)
        assert len(s.messages) == 3


async def test_results_enter_in_the_order_of_their_calls() -> None:
    async with ScriptedEngine([CALL + tool_call("f", a=2), "Fine."]) as engine, engine.session(tools=[f]) as s:
        calls = (await s.generate("go")).tool_calls
        first, second = (ToolMessage(call_id=call.id, name="f", text=call.arguments) for call in calls)
        with pytest.raises(errors.InvalidRequest, match=f"{calls[0].id}' of f has no result yet"):
            _ = await s.add(second)
        assert len(s.messages) == 2
        _ = await s.add(second, first)
        assert s.messages[2:] == (first, second)


async def test_a_call_in_an_imported_history_gets_a_result_before_anybody_else_speaks() -> None:
    async with ScriptedEngine([CALL]) as engine, engine.session(tools=[f]) as made, engine.session(tools=[f]) as s:
        _ = await made.generate("go")
        _ = await s.add(*made.messages, "Well?")
        assert [message.text for message in s.messages] == ["go", "", NO_RESULT, "Well?"]

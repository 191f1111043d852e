"""pydantic-ai's agents on sessions: tools, structured output, streams, histories, errors, cancelling."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

_ = pytest.importorskip("pydantic_ai", reason="install agentspeed[pydantic-ai]")

from pydantic import BaseModel  # noqa: E402
from pydantic_ai import Agent, ToolOutput  # noqa: E402
from pydantic_ai.exceptions import ModelAPIError, UserError  # noqa: E402
from pydantic_ai.messages import ImageUrl, ModelResponse  # noqa: E402
from pydantic_ai.settings import ModelSettings  # noqa: E402

from agentspeed import Engine  # noqa: E402
from agentspeed.adapters.pydantic_ai import AgentSpeedModel  # noqa: E402
from agentspeed.errors import ContextOverflow, TurnTimeout  # noqa: E402
from agentspeed.testing import ScriptedEngine, say, tool_call  # noqa: E402
from agentspeed.testing import Turn as Asked  # noqa: E402

pytestmark = pytest.mark.asyncio
_PLACE = {"city": "Oslo", "degrees": 7}


class Place(BaseModel):
    city: str
    degrees: int


def _script(asked: Asked) -> str:
    _, _, last = asked.log.rpartition("<|user|>")
    if "<|tool|>" in last:
        return "It is 42."
    if "plus" in last:
        return tool_call("add", a=17, b=25)
    if "place" in last:
        text = json.dumps(_PLACE, separators=(",", ":"))
        return tool_call("final_result", **_PLACE) if '"name":"final_result"' in asked.log else text
    return "Hello there."


@asynccontextmanager
async def _model(script: object = _script, **options: object) -> AsyncIterator[tuple[ScriptedEngine, AgentSpeedModel]]:
    async with ScriptedEngine(script, **options) as scripted:  # type: ignore[arg-type]
        model = AgentSpeedModel(engine=scripted.engine)
        yield scripted, model
        await model.aclose()
        assert scripted.live_branches == 0


async def test_an_agent_calls_its_tools_in_one_session() -> None:
    async with _model() as (scripted, model):
        agent = Agent(model, instructions="Be brief.")

        @agent.tool_plain
        def add(a: int, b: int) -> int:
            """Adds two numbers."""
            return a + b

        result = await agent.run("What is 17 plus 25?")
        assert result.output == "It is 42."
        again = await agent.run("And now?", message_history=result.all_messages())
        assert again.output == "Hello there."
        assert scripted.live_branches == 1


@pytest.mark.parametrize("mode", ["native", "tool"])
async def test_structured_output_is_kept_to_its_schema(mode: str) -> None:
    async with _model() as (scripted, model):
        kind = Place if mode == "native" else ToolOutput(Place, name="final_result")
        agent: Agent[None, Place] = Agent(model, output_type=kind)
        assert (await agent.run("Name a place.")).output == Place(city="Oslo", degrees=7)
        assert all(turn.grammar for turn in scripted.turns)


async def test_a_stream_gives_pieces_that_make_the_text_and_the_usage() -> None:
    async with _model(lambda _: say("Hello there.", seconds=0.02)) as (_, model):
        async with Agent(model).run_stream("Hi.") as stream:
            pieces = [piece async for piece in stream.stream_text(delta=True, debounce_by=None)]
        assert len(pieces) > 1
        assert "".join(pieces) == "Hello there."
        assert stream.usage.output_tokens > 0
        assert stream.usage.input_tokens > 0


async def test_calls_are_streamed_and_run() -> None:
    async with _model() as (_, model):
        agent = Agent(model)

        @agent.tool_plain
        def add(a: int, b: int) -> int:
            """Adds two numbers."""
            return a + b

        async with agent.run_stream("What is 17 plus 25?") as stream:
            assert await stream.get_output() == "It is 42."


async def test_a_stream_that_is_left_early_ends_its_turn() -> None:
    began = time.monotonic()
    async with _model(lambda _: say("word " * 200, seconds=0.1)) as (scripted, model):
        async with Agent(model).run_stream("Hi.") as stream:
            async for _ in stream.stream_text(delta=True, debounce_by=None):
                break
        assert len(scripted.turns) == 1
        assert time.monotonic() - began < 10  # of some 20 seconds that the whole text takes


async def test_cancelling_a_run_cancels_its_turn_and_the_next_one_works() -> None:
    slow = True
    async with _model(lambda _: say("word " * 200, seconds=0.05 if slow else 0.0)) as (_, model):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await Agent(model).run("Hi.")
        slow = False
        assert (await Agent(model).run("Hi.")).output.startswith("word")


async def test_a_history_that_goes_on_computes_only_what_is_new() -> None:
    async with Engine.shared(None, {"pages": 256}) as engine:
        model = AgentSpeedModel(engine=engine, settings=ModelSettings(max_tokens=16))
        agent = Agent(model, instructions="You are brief.")
        first = await agent.run("Say hi.")
        second = await agent.run("Again.", message_history=first.all_messages())
        other = await agent.run("Something else.", message_history=first.all_messages())
        kept = first.usage.input_tokens + first.usage.output_tokens
        for result in (second, other):
            assert result.usage.cache_read_tokens >= kept - 1
            assert result.usage.input_tokens > result.usage.cache_read_tokens
        await model.aclose()


async def test_what_does_not_fit_is_our_error_and_a_turn_that_fails_is_theirs() -> None:
    async with _model(context_limit=64) as (_, model):
        with pytest.raises(ContextOverflow):
            await Agent(model).run("word " * 200)
    async with _model(lambda _: say("word " * 200, seconds=0.1)) as (_, model):
        with pytest.raises(ModelAPIError) as caught:
            await Agent(model).run("Hi.", model_settings=ModelSettings(timeout=0.2))
        assert isinstance(caught.value.__cause__, TurnTimeout)


async def test_an_image_is_refused_by_name() -> None:
    async with _model() as (_, model):
        with pytest.raises(UserError, match="ImageUrl"):
            await Agent(model).run(["Look:", ImageUrl("https://example.com/a.png")])


async def test_settings_reach_the_turn() -> None:
    async with _model() as (scripted, model):
        settings = ModelSettings(
            temperature=0.5,
            top_p=0.9,
            max_tokens=3,
            seed=7,
            frequency_penalty=0.25,
            presence_penalty=-0.5,
            logit_bias={"300": -2},
        )
        result = await Agent(model).run("Hi.", model_settings=settings)
        (turn,) = scripted.turns
        assert (turn.sampling.temperature, turn.sampling.top_p, turn.max_tokens) == (0.5, 0.9, 3)
        assert (turn.sampling.frequency_penalty, turn.sampling.presence_penalty) == (0.25, -0.5)
        assert dict(turn.sampling.logit_bias) == {300: -2.0}
        (said,) = [message for message in result.all_messages() if isinstance(message, ModelResponse)]
        assert said.finish_reason == "length"
        with pytest.raises(UserError, match="keys are token ids"):
            await Agent(model).run("Hi.", model_settings=ModelSettings(logit_bias={"the": 2}))

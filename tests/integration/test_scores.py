"""How likely a given text is, on a real engine: what a turn that drew it said, without a trace in the session."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from agentspeed import Engine, Tool, errors, tool

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def engine(anyio_backend: str) -> AsyncIterator[Engine]:
    async with Engine(context_limit=200) as made:
        yield made


@tool
def add(a: int, b: int) -> int:
    """Add."""
    return a + b


@pytest.mark.parametrize("tools", [(), (add,)], ids=["plain", "tools"])
async def test_a_text_that_a_turn_drew_has_the_log_probabilities_of_that_turn(
    engine: Engine, tools: tuple[Tool, ...]
) -> None:
    async with engine.session(tools=tools) as s:
        start = await s.mark()
        reply = await s.generate("Hello!", max_tokens=6, logprobs=0, temperature=1.5, seed=3)
        await s.rewind(start)
        found = await s.score(reply.text, after="Hello!")
        assert found.ids == reply.ids[: len(found.ids)]
        assert found.logprobs == pytest.approx(reply.logprobs[: len(found.ids)], abs=1e-4)
        assert found.total == pytest.approx(sum(found.logprobs))
        assert s.tokens == start.tokens
        assert s.usage.turns == 1


async def test_a_text_goes_on_with_an_open_message(engine: Engine) -> None:
    async with engine.session() as s:
        start = await s.mark()
        whole = await s.generate("Hello!", max_tokens=8, logprobs=0)
        await s.rewind(start)
        _ = await s.generate("Hello!", max_tokens=3)
        rest = s.engine.codec.tokenizer.text(list(whole.ids[3:8]))
        found = await s.score(rest)
        assert found.ids == whole.ids[3:8]
        assert found.logprobs == pytest.approx(whole.logprobs[3:8], abs=1e-4)
        other = await s.score(" zebra quartz")
        assert other.total < found.total
        assert (await s.generate(max_tokens=5)).ids == whole.ids[3:8]


async def test_ids_among_which_the_message_ends_are_scored_to_their_last(engine: Engine) -> None:
    async with engine.session() as s:
        codec = s.engine.codec
        end, (first, *_) = codec.stop_ids[0], codec.tokenizer.content_ids("Yes")
        found = await s.score([first, end, first, end], after="Hello!")
        assert found.ids == (first, end, first, end)
        assert len(found.logprobs) == 4
        shorter = await s.score([first, end], after="Hello!")
        assert shorter.logprobs == pytest.approx(found.logprobs[:2], abs=1e-4)


async def test_what_cannot_be_scored_is_refused(engine: Engine) -> None:
    async with engine.session() as s:
        with pytest.raises(errors.InvalidRequest, match="empty"):
            _ = await s.score("", after="Hello!")
        with pytest.raises(errors.ContextOverflow):
            _ = await s.score("many words " * 200, after="Hello!")
        async with s.stream("Hello!", max_tokens=3):
            with pytest.raises(errors.SessionBusy):
                _ = await s.score("Hi.")
        assert s.messages == ()

"""One story over every link: an engine process and an engine thread must be told apart by nothing but their pid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agentspeed import Engine, errors, events
from agentspeed.transport.base import Transport
from agentspeed.transport.engine_process import EngineSlot
from agentspeed.transport.in_thread import ThreadTransport

pytestmark = pytest.mark.anyio


@pytest.fixture(params=[EngineSlot, ThreadTransport], ids=["process", "thread"])
def transport(request: pytest.FixtureRequest, checkpoint: Path) -> Transport:
    made: Transport = request.param({"model": str(checkpoint), "pages": 128, "check_every_step": True})
    return made


async def story(engine: Engine) -> list[Any]:
    """Everything a caller can see of one session's life."""
    told: list[Any] = []
    async with engine.session(seed=5) as s:
        reply = await s.generate("One.", max_tokens=6, temperature=0.8, logprobs=1)
        told += [reply.ids, reply.usage.new, reply.finish_reason, len(reply.top_logprobs)]
        mark = await s.mark()
        async with s.stream("Two.", max_tokens=800) as turn:
            async for event in turn:
                if isinstance(event, events.TextDelta):
                    break
        told.append(s.ids)
        async with s.fork(3) as children:
            told += [(await child.generate("Three.", max_tokens=5, temperature=1.0)).ids for child in children]
            await s.adopt(children[1])
        told += [s.ids, s.usage.turns, (await s.expect(1.0)).keep, (await s.inspect()).state]
        await s.rewind(mark)
        with pytest.raises(errors.InvalidSampling) as refusal:
            _ = await s.generate("x", temperature=-2.0)
        told += [str(refusal.value), s.ids]
        with pytest.raises(errors.InvalidRequest, match="255 children at most"):
            async with s.fork(10_000):
                raise AssertionError("ten thousand children were born")
        told.append((await engine.stats()).counts["branches"])
    told.append((await engine.stats()).counts["branches"])
    return told


_told: list[list[Any]] = []


async def test_the_story_is_the_same_over_every_link_and_loop(transport: Transport, checkpoint: Path) -> None:
    async with Engine.over(transport, checkpoint) as engine:
        _told.append(await story(engine))
    assert _told[-1] == _told[0]
    assert _told[-1][-2:] == [1, 0]


async def test_what_the_engine_refuses_to_load_is_the_same_error_over_every_link(checkpoint: Path) -> None:
    said = []
    for kind in (EngineSlot, ThreadTransport):
        with pytest.raises(errors.InvalidRequest) as refusal:
            async with Engine.over(kind({"model": str(checkpoint), "pages": 4, "context_limit": 9999}), checkpoint):
                raise AssertionError("an engine whose longest turn never fits was started")
        said.append(str(refusal.value))
    assert said[0] == said[1]

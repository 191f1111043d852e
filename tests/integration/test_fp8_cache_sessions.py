"""Sessions of the shipped model over a KV cache in fp8: tools, forks, snapshots and a killed engine."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from agentspeed import Engine, Session, errors, tool

pytestmark = pytest.mark.anyio
OPTIONS: Any = {"kv_cache_dtype": "fp8", "dtype": "float64", "device": "cpu", "pages": 64}


@pytest.fixture
def anyio_backend() -> str:
    """One is enough: it is the cache that is tried here."""
    return "asyncio"


@tool
def weather(city: str) -> str:
    """The weather of a city.

    city: its name.
    """
    return f"Sunny in {city}."


async def test_a_session_runs_tools_forks_and_comes_back_from_a_snapshot() -> None:
    async with Engine(**OPTIONS) as engine, engine.session(tools=[weather]) as s:
        result = await s.run("What is the weather in Paris?")
        assert "Paris" in result.text
        data, known = await s.snapshot(), s.ids
        async with s.fork(3) as children:
            said = [(await child.generate(f"Way {number}.", max_tokens=8)).ids for number, child in enumerate(children)]
        mark = await s.mark()
        for number, ids in enumerate(said):
            assert (await s.generate(f"Way {number}.", max_tokens=8)).ids == ids
            await s.rewind(mark)
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)
        assert (await s.generate("Way 0.", max_tokens=8)).ids == said[0]
    async with Session.restore(data, tools=[weather], **OPTIONS) as again:
        assert again.ids == known
        assert (await again.generate("Way 1.", max_tokens=8)).ids == said[1]


async def test_another_format_is_refused_with_those_there_are() -> None:
    with pytest.raises(errors.InvalidRequest, match="kv_cache_dtype is 'int8'"):
        async with Engine(kv_cache_dtype="int8"):  # type: ignore[arg-type]
            pass

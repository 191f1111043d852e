"""What sessions promise, on a GPU: tools, grammars, forks, deaths, cancels, and pools that are full or too small."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import anyio
import pytest
import torch
from pydantic import BaseModel

from agentspeed import Assistant, Choice, Engine, Regex, Session, User, errors, events, tool
from tests.devices import needs_gpu
from tests.support.loops import without_uvloop as without_uvloop
from tests.support.random_checkpoint import make_checkpoint

pytestmark = [needs_gpu, pytest.mark.anyio, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[2]
DEVICE = "cuda"
EXACT: dict[str, Any] = {"device": DEVICE, "dtype": "float32"}
"""Of models whose sums are compared: near ties are as rare as in float64."""
SAVED: dict[str, Any] = {"host_slots": 120, "host_saves": "always", "ticket_deadline": 60.0}
"""Rows that leave the device come back from the host, also where a prefill takes less time, as it does here."""


@pytest.fixture(scope="module")
def latent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that the GPU's kernels take, with rows of 48 numbers; its text never ends by itself."""
    config = json.loads((ROOT / "bench/models/tiny.json").read_text()) | {"qk_rope_head_dim": 16}
    return make_checkpoint(config, tmp_path_factory.mktemp("latent"), seed=5)


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = json.loads((ROOT / "bench/models/tiny-qwen3-moe.json").read_text())
    return make_checkpoint(config, tmp_path_factory.mktemp("grouped"), seed=5)


@tool
async def weather(city: str) -> str:
    """Get the weather for a city.

    Args:
        city: Its name.
    """
    await anyio.sleep(0.05)
    return f"sunny in {city}"


class Report(BaseModel):
    sky: Literal["clear", "cloudy"]
    warm: bool
    degrees: int


async def test_the_quickstart_runs_unchanged_on_the_gpu_that_is_there(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("quickstart", ROOT / "examples/agents/quickstart.py")
    assert spec is not None and spec.loader is not None
    quickstart = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(quickstart)
    with caplog.at_level(logging.INFO, logger="agentspeed.engine"):
        costs = await quickstart.main()
    assert f"{DEVICE}: " in caplog.text
    assert all(usage.recomputed == 0 for _, usage in costs)
    assert "calls get_weather" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_a_run_calls_its_tool_pauses_and_goes_on_with_what_it_had(dtype: Any) -> None:
    async with Engine(device=DEVICE, dtype=dtype) as engine, engine.session(tools=[weather]) as s:
        seen: list[events.AnyEvent] = []
        result = await s.run("What is the weather in Oslo?", max_tokens=96, max_turns=3, on_event=seen.append)
        assert any(isinstance(event, events.ToolFinished) for event in seen)
        (resumed,) = [event for event in seen if isinstance(event, events.Resumed)][:1]
        assert resumed.device > 0 and resumed.recomputed == 0
        assert result.text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_structured_output_is_what_was_asked_for(dtype: Any) -> None:
    async with Engine(device=DEVICE, dtype=dtype) as engine, engine.session() as s:
        reply = await s.generate("How is it?", output=Report, max_tokens=96, temperature=1.0, seed=1)
        assert isinstance(reply.output, Report)
        assert (await s.generate("Is it so?", output=Choice("yes", "no"), max_tokens=16)).output in ("yes", "no")
        assert len((await s.generate("Spell.", output=Regex("[ab]{3}"), max_tokens=16)).text) == 3


@pytest.mark.parametrize("model", ["latent", "grouped"])
async def test_forks_and_rewinds_say_what_fresh_sessions_say(model: str, request: pytest.FixtureRequest) -> None:
    running = Engine(request.getfixturevalue(model), **EXACT)
    async with running as engine, engine.session() as s, engine.session(private=True) as fresh:
        _ = await s.generate("The context. " * 20, max_tokens=8)
        _ = await fresh.generate("The context. " * 20, max_tokens=8)
        mark, fresh_mark = await s.mark(), await fresh.mark()
        async with s.fork(4) as children, anyio.create_task_group() as group:
            replies: list[list[int]] = [[] for _ in children]

            async def way(number: int, child: Any) -> None:
                replies[number] = list((await child.generate(f"Way {number}.", max_tokens=8)).ids)

            for number, child in enumerate(children):
                group.start_soon(way, number, child)
        for number, ids in enumerate(replies):
            assert list((await fresh.generate(f"Way {number}.", max_tokens=8)).ids) == ids
            await fresh.rewind(fresh_mark)
        wrong = await s.generate("Wrong.", max_tokens=8)
        await s.rewind(mark)
        right = await s.generate("Way 2.", max_tokens=8)
        assert list(right.ids) == replies[2] and right.usage.recomputed == 0
        assert wrong.ids


@asynccontextmanager
async def undisturbed(model: Path, prompts: Sequence[str], turns: int, tokens: int) -> AsyncIterator[list[list[int]]]:
    """What sessions alone in a pool with room for all of them say."""
    said: list[list[int]] = []
    async with Engine(model, pages=600, **EXACT) as engine:
        for prompt in prompts:
            async with engine.session(private=True) as s:
                for turn in range(turns):
                    _ = await s.generate(prompt if turn == 0 else f"Turn {turn}.", max_tokens=tokens)
                said.append(list(s.ids))
    yield said


PROMPTS = [f"{number} " + "a long way to go " * 12 for number in range(6)]
"""About 200 tokens each."""


@pytest.mark.parametrize("model", ["latent", "grouped"])
async def test_sessions_that_went_to_the_host_and_back_say_what_undisturbed_ones_say(
    model: str, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(model)
    small = Engine(folder, pages=14, context_limit=640, firm_pages=0, **SAVED, **EXACT)
    async with undisturbed(folder, PROMPTS, 3, 6) as said, small as engine, AsyncExitStack() as held:
        sessions = [await held.enter_async_context(engine.session()) for _ in PROMPTS]
        for turn in range(3):
            for session, prompt in zip(sessions, PROMPTS, strict=True):
                _ = await session.generate(prompt if turn == 0 else f"Turn {turn}.", max_tokens=6)
        assert [list(session.ids) for session in sessions] == said
        usage = [session.usage for session in sessions]
    assert sum(one.resumed_host for one in usage) >= 128, "most of a session: whole pages"


async def test_more_sessions_than_the_pool_holds_are_preempted_and_say_what_undisturbed_ones_say(latent: Path) -> None:
    small = Engine(latent, pages=14, context_limit=640, firm_pages=0, **EXACT)
    async with undisturbed(latent, PROMPTS, 1, 150) as said, small as engine:
        found: list[list[int]] = [[] for _ in PROMPTS]

        async def one(number: int) -> None:
            async with engine.session() as s:
                _ = await s.generate(PROMPTS[number], max_tokens=150)
                found[number] = list(s.ids)

        async with anyio.create_task_group() as group:
            for number in range(len(PROMPTS)):
                group.start_soon(one, number)
        assert found == said
        counts = (await engine.stats()).counts
        assert counts["preemptions"] > 0
        assert counts["pages_free"] + counts["pages_nodes"] == counts["pages_total"]


async def test_a_context_that_no_pool_of_this_size_holds_is_refused_and_the_session_goes_on(latent: Path) -> None:
    async with Engine(latent, pages=14, **EXACT) as engine, engine.session() as s:
        _ = await s.generate("Short.", max_tokens=2)
        before = s.ids
        with pytest.raises(errors.ContextOverflow):
            _ = await s.generate("word " * 2000)
        assert s.ids == before
        assert (await s.generate("Short.", max_tokens=2)).usage.recomputed == 0


async def test_a_killed_engine_costs_the_turn_and_no_session(latent: Path) -> None:
    async with Engine(latent, **EXACT) as engine, engine.session() as s, engine.session() as other:
        for session in (s, other):
            _ = await session.generate("One.", max_tokens=6)
        said = (await other.generate("Two.", max_tokens=6)).ids
        before, killed = s.ids, engine.pid
        assert killed is not None
        with pytest.raises(errors.EngineDied):
            async with s.stream("Speak.", max_tokens=5000) as turn:
                seen = 0
                async for _ in turn:
                    seen += 1
                    if seen == 8:
                        os.kill(killed, signal.SIGKILL)
        assert s.ids == before
        assert (await s.generate("Two.", max_tokens=6)).ids == said
        assert (await other.generate("Three.", max_tokens=3)).usage.drawn == 3
        assert engine.pid != killed


async def test_a_turn_that_is_left_in_mid_stream_leaves_a_session_as_before_and_no_page_held(latent: Path) -> None:
    async with Engine(latent, pages=200, **EXACT) as engine:
        async with Session(engine) as s:
            _ = await s.generate("One.", max_tokens=4)
            before = s.ids
            for left in (1, 7, 40):
                async with s.stream("Speak.", max_tokens=3000) as turn:
                    seen = 0
                    async for event in turn:
                        seen += isinstance(event, events.TextDelta)
                        if seen == left:
                            break
                assert s.ids == before
            for delay in (0.0, 0.001, 0.01, 0.05):
                with anyio.move_on_after(delay):
                    _ = await s.generate("A long answer, please.", max_tokens=3000)
                assert s.ids == before and (await s.inspect()).known == s.tokens
            async with s.stream("Speak.", max_tokens=3000, keep_on_cancel=True) as turn:
                async for event in turn:
                    if isinstance(event, events.TextDelta):
                        break
            assert [type(message) for message in s.messages[-2:]] == [User, Assistant]
            assert (await s.generate("Two.", max_tokens=3)).usage.recomputed == 0
        counts = (await engine.stats()).counts
        assert counts["branches"] == 0
        assert counts["pages_free"] + counts["pages_nodes"] == counts["pages_total"]


async def test_a_snapshot_is_restored_in_another_engine_and_goes_on_the_same(latent: Path) -> None:
    async with Engine(latent, **EXACT) as engine, engine.session() as s:
        _ = await s.generate("The context. " * 20, max_tokens=8)
        kept = await s.snapshot()
        said = (await s.generate("On.", max_tokens=8)).ids
    async with Engine(latent, **EXACT) as engine, Session.restore(kept, engine) as s:
        assert (await s.generate("On.", max_tokens=8)).ids == said


async def test_a_pool_larger_than_the_gpu_is_refused_by_what_the_gpu_has(latent: Path) -> None:
    with pytest.raises(errors.InvalidRequest, match="the GPU"):
        async with Engine(latent, device=DEVICE, pages=10**9):
            raise AssertionError("it started")


async def test_a_gpu_without_room_for_a_step_ends_the_engine_by_name_and_sessions_go_on(latent: Path) -> None:
    """Another program takes all memory meanwhile: this test is to run alone."""
    options: dict[str, Any] = {"pages": 200, "prefill_chunk": 4096, "context_limit": 8192, **EXACT}
    async with Engine(latent, **options) as engine, engine.session() as s:
        _ = await s.generate("One.", max_tokens=4)
        before, full = s.ids, engine.pid
        held = all_memory()
        try:
            with pytest.raises(errors.EngineDied, match="The GPU has no room for a step"):
                _ = await s.generate("word " * 1500, max_tokens=4)
        finally:
            held.clear()
            torch.cuda.empty_cache()
        assert s.ids == before
        assert (await s.generate("word " * 1500, max_tokens=4)).usage.drawn == 4
        assert engine.pid != full


def all_memory() -> list[torch.Tensor]:
    """What the GPU has left, down to the last megabyte, by plain allocations."""
    held: list[torch.Tensor] = []
    size = 1 << 36
    while size >= 1 << 20:
        try:
            held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError:
            size //= 2
    return held

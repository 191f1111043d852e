"""How an engine starts: once, however many ask; given up at once when nobody waits; and with options that exist."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import get_type_hints

import anyio
import msgspec
import pytest

from agentspeed import Engine, Session, User, errors
from agentspeed._core import engine_handle
from agentspeed._core.engine_options import EngineOptions
from agentspeed.engine import NANO
from agentspeed.testing import ScriptedEngine
from agentspeed.testing.scripted_model import ScriptedText
from agentspeed.testing.scripted_server import ScriptedServer
from agentspeed.transport.base import Connection
from agentspeed_engine.serve import options as engine_side

ROOT = Path(__file__).resolve().parents[3]


class Counting:
    """A transport that counts what it was asked for, and fails as often as it is told to."""

    def __init__(self, failures: int = 0) -> None:
        self.server = ScriptedServer(NANO, lambda asked: ScriptedText(text="Hello."))
        self.failures = failures
        self.opened = self.closed = 0

    @property
    def pid(self) -> int | None:
        return None

    async def connect(self, *, after_death: bool) -> Connection:
        self.opened += 1
        await anyio.sleep(0.05)
        if self.opened <= self.failures:
            raise errors.EngineStartFailed("It did not start.")
        return await self.server.connect(after_death=after_death)

    async def close(self) -> None:
        self.closed += 1
        await self.server.close()


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.anyio
async def test_starts_at_once_are_one_start() -> None:
    opener = Counting()
    engine = Engine.over(opener, NANO)
    async with anyio.create_task_group() as group:
        for _ in range(3):
            _ = group.start_soon(engine.start)
    assert opener.opened == 1
    async with engine.session() as s:
        assert (await s.generate("Hi.")).text == "Hello."
    await engine.close()
    assert opener.closed == 1


@pytest.mark.anyio
async def test_a_start_that_is_given_up_does_not_end_the_engine_of_another() -> None:
    opener = Counting()
    engine = Engine.over(opener, NANO)

    async def give_up() -> None:
        with anyio.move_on_after(0.01):
            _ = await engine.start()

    async with anyio.create_task_group() as group:
        _ = group.start_soon(give_up)
        _ = group.start_soon(engine.start)
    async with engine.session() as s:
        assert (await s.generate("Hi.")).text == "Hello."
    await engine.close()


@pytest.mark.anyio
async def test_a_start_that_fails_leaves_nothing_and_may_be_tried_again() -> None:
    opener = Counting(failures=1)
    engine = Engine.over(opener, NANO)
    with pytest.raises(errors.EngineStartFailed):
        _ = await engine.start()
    assert opener.closed == 1 and "stopped" in repr(engine)
    async with engine, engine.session() as s:
        assert (await s.generate("Hi.")).text == "Hello."


@pytest.mark.anyio
async def test_a_cancelled_start_waits_for_no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    done = threading.Event()

    def slow(model: object, revision: object) -> Path:
        _ = done.wait(20)
        return NANO

    monkeypatch.setattr(engine_handle, "resolve", slow)
    started = time.monotonic()
    with anyio.move_on_after(0.1) as scope:
        async with Session("owner/name"):
            pass
    assert scope.cancelled_caught and time.monotonic() - started < 5
    done.set()


def test_a_program_whose_start_was_cancelled_ends_at_once() -> None:
    code = (
        "import anyio, time\nfrom agentspeed import Session\nfrom agentspeed._core import engine_handle\n"
        "engine_handle.resolve = lambda model, revision: time.sleep(60)\n"
        "async def main():\n    with anyio.move_on_after(0.1):\n        async with Session('owner/name'): pass\n"
        "anyio.run(main)\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, timeout=50, check=False, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_options_are_those_of_the_engine_process() -> None:
    theirs = {field.name for field in msgspec.structs.fields(engine_side.EngineOptions)} - {"model"}
    assert set(get_type_hints(EngineOptions)) == theirs


@pytest.mark.parametrize(("name", "hint"), [("page", "Do you mean pages?"), ("zzz", "The options are: dtype, ")])
@pytest.mark.parametrize("kind", [Engine, Session])
def test_an_option_that_no_engine_has_is_refused_before_anything_starts(kind: type, name: str, hint: str) -> None:
    with pytest.raises(errors.InvalidRequest, match=f"no option {name}") as refused:
        _ = kind(**{name: 1})
    assert hint in refused.value.remedy


@pytest.mark.anyio
async def test_a_session_knows_its_limit_and_what_is_left_and_an_engine_counts_tokens() -> None:
    with pytest.raises(errors.SessionClosed):
        _ = Engine().context_limit
    async with ScriptedEngine(["Hello."], context_limit=300) as engine, engine.session() as s:
        counted = engine.engine.count_tokens(User("How are you?"))
        before = s.tokens
        _ = await s.add("How are you?")
        assert s.tokens - before == counted > engine.engine.count_tokens("How are you?") > 0
        assert (s.context_limit, s.room) == (300, 300 - s.tokens)
        with pytest.raises(errors.InvalidRequest, match="has no tokens"):
            _ = engine.engine.count_tokens(3)  # type: ignore[arg-type]
        assert s.starts[0] == before


@pytest.mark.anyio
async def test_a_scripted_engine_has_the_limits_of_a_real_one() -> None:
    async with ScriptedEngine(["Hello. " * 50], context_limit=100) as engine, engine.session() as s:
        for long in (s.generate("red " * 200), s.add("red " * 200)):
            with pytest.raises(errors.ContextOverflow, match="leave no room in a context of 100"):
                _ = await long
        reply = await s.generate("Hi.")
        assert (reply.finish_reason, reply.bound, s.tokens) == ("max_tokens", "the context limit of 100 tokens", 100)
    async with ScriptedEngine(["Hello."], max_branches=3) as engine, engine.session() as s:
        with pytest.raises(errors.InvalidRequest, match="at most 3 branches"):
            _ = await s.fork(3).__aenter__()
        async with s.fork(2):
            with pytest.raises(errors.EngineOverloaded, match="at most 3 branches"):
                _ = await s.fork(1).__aenter__()
    async with ScriptedEngine(["Hello."]) as engine, engine.session() as s:
        assert s.context_limit == 4096  # what the shipped model's folder says

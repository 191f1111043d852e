"""What is left when an engine process is killed, and who may share one."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import anyio
import pytest

from agentspeed import Engine, Session, errors
from agentspeed.transport.engine_process import ATTACH, EngineProcess, EngineSlot
from agentspeed_engine.protocol import messages as wire
from tests.support.loops import without_uvloop as without_uvloop

pytestmark = pytest.mark.anyio


def counting(checkpoint: Path) -> Engine:
    """A process that starts at once: its model counts, a millisecond a step."""
    return Engine.over(EngineSlot({"model": "noop:512:1", "pages": 256}), checkpoint)


def kill(engine: Engine) -> int:
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGKILL)
    return engine.pid


async def test_the_use_after_a_death_goes_on_with_every_committed_token(checkpoint: Path) -> None:
    async with Engine(checkpoint) as engine, engine.session() as s, engine.session() as undisturbed:
        for session in (s, undisturbed):
            _ = await session.generate("One.", max_tokens=6)
        said = (await undisturbed.generate("Two.", max_tokens=6)).ids
        killed = kill(engine)
        reply = await s.generate("Two.", max_tokens=6)
        assert reply.ids == said
        assert engine.pid != killed
        assert s.ids == undisturbed.ids
        await undisturbed.rewind(0)
        assert undisturbed.tokens == 0


async def labels(engine: Engine) -> list[str]:
    """What who watches the engine is told that its sessions are called, oldest first."""
    picture = await (await engine.link()).call(lambda number: wire.Look(request=number))
    assert isinstance(picture, wire.Picture)
    return [session.label for session in picture.sessions]


async def test_who_watches_finds_a_session_by_its_id_before_and_after_a_death(checkpoint: Path) -> None:
    async with counting(checkpoint) as engine, engine.session() as s, engine.session(name="a\0b" * 99) as named:
        assert await labels(engine) == [s.id, ("ab" * 99)[:64]]
        async with s.fork(2) as (child, _):
            assert await labels(engine) == [s.id, ("ab" * 99)[:64]], "forks stand below the session"
            _ = kill(engine)
            for session in (child, named, s):
                _ = await session.add("Again.")
            assert await labels(engine) == [f"{s.id}.1", ("ab" * 99)[:64], s.id]


async def test_what_an_engine_computed_before_its_death_is_recomputed_and_not_new(checkpoint: Path) -> None:
    async with Engine(checkpoint) as engine, engine.session() as s:
        _ = await s.generate("One.", max_tokens=6)
        before = s.tokens
        async with s.fork(1) as (child,):
            _ = kill(engine)
            usage = (await child.generate("Two.", max_tokens=2)).usage
        assert (usage.recomputed, usage.why) == (before - 1, "the engine was started anew")
        assert usage.new + usage.recomputed + usage.drawn == child.tokens
        await s.rewind(3)
        _ = kill(engine)
        assert (await s.generate("Two.", max_tokens=2)).usage.recomputed == 3


async def test_a_turn_that_the_engine_dies_in_raises_and_leaves_no_trace(checkpoint: Path) -> None:
    async with counting(checkpoint) as engine, engine.session() as s:
        _ = await s.generate("One.", max_tokens=4)
        before = s.ids, s.messages
        with pytest.raises(errors.EngineDied) as caught:
            async with s.stream("Speak.", max_tokens=5000) as turn:
                seen = 0
                async for _ in turn:
                    seen += 1
                    if seen == 4:
                        _ = kill(engine)
        assert caught.value.retryable
        assert (s.ids, s.messages) == before
        assert (await s.generate("Two.", max_tokens=3)).usage.drawn == 3
        assert (await s.inspect()).known == s.tokens


@pytest.mark.parametrize("verb", ["fork", "rewind", "add", "expect", "adopt", "close"])
async def test_every_verb_works_after_a_death(checkpoint: Path, verb: str) -> None:
    async with counting(checkpoint) as engine, engine.session() as s:
        _ = await s.generate("One.", max_tokens=4)
        mark = await s.mark()
        async with s.fork(1) as (child,):
            said = (await child.generate("Child.", max_tokens=4)).ids
            ids = child.ids
            _ = kill(engine)
            match verb:
                case "fork":
                    async with s.fork(2) as (other, _):
                        assert (await other.generate("Child.", max_tokens=4)).ids == said
                case "rewind":
                    await s.rewind(mark)
                case "add":
                    _ = await s.add("More.")
                case "expect":
                    assert (await s.expect(1.0)).residence.device == 0
                case "adopt":
                    await s.adopt(child)
                    assert s.ids == ids
                    _ = await s.generate("On.", max_tokens=2)
                case _:
                    pass
        if verb != "close":
            assert (await s.inspect()).known == s.tokens
    assert engine.pid is None


async def test_sessions_of_one_model_share_a_process_and_sessions_with_other_options_do_not(checkpoint: Path) -> None:
    one, two, other = (Session(checkpoint, pages=pages) for pages in (64, 64, 65))
    async with one, two, other:
        assert one.engine.pid == two.engine.pid != other.engine.pid


async def test_sessions_of_one_shared_engine_use_one_link_and_the_last_to_close_closes_it(checkpoint: Path) -> None:
    async with Session(checkpoint, pages=64) as first:
        async with Session(checkpoint, pages=64) as second:
            link = await first.engine.link()
            assert await second.engine.link() is link
        assert (await first.engine.stats()).counts["branches"] == 1
        assert (await first.generate("One.", max_tokens=2)).usage.drawn == 2
    assert not link.alive


async def test_a_named_engine_is_attached_to_and_outlives_its_sessions(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    process = EngineProcess({"model": "noop:512:0"})
    await anyio.to_thread.run_sync(process.await_readiness)
    try:
        monkeypatch.setenv(ATTACH, str(process.socket_path))
        async with Session(checkpoint) as s:
            assert (await s.generate("One.", max_tokens=2)).usage.drawn == 2
            assert s.engine.pid is None
            assert not caplog.records
        async with Session(checkpoint, pages=64):
            assert "pages of this one are not used" in caplog.text
        assert process.alive
        monkeypatch.setenv(ATTACH, "/nowhere/engine.sock")
        with pytest.raises(errors.ConnectFailed, match="nowhere"):
            async with Session(checkpoint):
                raise AssertionError("a session was opened on an engine that is not there")
        monkeypatch.setenv(ATTACH, "http://127.0.0.1:8000")
        with pytest.raises(errors.ConnectFailed, match="give a server's address to Session"):
            async with Session(checkpoint):
                raise AssertionError("a session was opened on a socket that is a server's address")
    finally:
        process.stop()


def copied(checkpoint: Path, folder: Path) -> tuple[Path, Path]:
    """The same files as another model, and another name for that."""
    other, link = folder / "other", folder / "link"
    _ = shutil.copytree(checkpoint, other)
    link.symlink_to(other)
    return other, link


async def test_an_attached_engine_of_another_model_is_refused_and_both_are_named(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, link = copied(checkpoint, tmp_path)
    process = EngineProcess({"model": str(other), "pages": 64})
    await anyio.to_thread.run_sync(process.await_readiness)
    try:
        monkeypatch.setenv(ATTACH, str(process.socket_path))
        with pytest.raises(errors.InvalidRequest, match="AGENTSPEED_ENGINE") as refused:
            async with Session(checkpoint):
                raise AssertionError("ids of one model were given to another")
        assert str(other) in str(refused.value) and str(checkpoint) in str(refused.value)
        async with Session(link) as s:
            assert (await s.generate("One.", max_tokens=2)).usage.drawn == 2
    finally:
        process.stop()


async def test_a_folder_that_is_no_model_is_refused_with_what_to_do(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(errors.ModelBroken, match="not a folder"):
        async with Session(tmp_path / "nothing"):
            raise AssertionError("opened")
    with pytest.raises(errors.ModelBroken, match=r"tokenizer\.json"):
        async with Session(tmp_path):
            raise AssertionError("opened")
    with pytest.raises(errors.ConnectFailed, match="agentspeed serve"):
        async with Session("http://localhost:1"):
            raise AssertionError("opened")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        _ = (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    with pytest.raises(errors.ModelBroken, match=r"config\.json"):
        async with Session(tmp_path):
            raise AssertionError("opened")
    with pytest.raises(errors.InvalidRequest, match="pagez"):
        async with Session(checkpoint, pagez=3):
            raise AssertionError("opened")


async def test_an_engine_that_listens_no_more_but_has_not_ended_is_replaced(checkpoint: Path) -> None:
    """It is on its way out: one that lost a rank ends the other ranks first."""
    async with counting(checkpoint) as engine, engine.session() as s:
        _ = await s.generate("One.", max_tokens=3)
        before = engine.pid
        with engine.connected_socket() as link:
            os.unlink(link.getpeername())
        (await engine.link()).close()
        assert len((await s.generate("Two.", max_tokens=3)).ids) == 3
        assert engine.pid not in (None, before)

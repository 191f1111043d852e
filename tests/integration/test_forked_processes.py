"""A process that is forked off, as multiprocessing does, starts engines of its own and leaves its parent's alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.engine_client import environment

HEAD = """
import os, sys, threading, time
import anyio
from agentspeed import Engine, Session, errors

MODEL = sys.argv[1]

async def asked():
    async with Session(MODEL, pages=80, threads=1) as s:
        return (await s.generate("Hello!", max_tokens=4, seed=1)).ids, s.engine.pid

def ended(child, seconds=60.0):
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, 9)
    raise AssertionError("the child hung")
"""


def run(checkpoint: Path, script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", HEAD + script, str(checkpoint)],
        env=environment(),
        timeout=100,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


def test_a_forked_child_that_exits_at_once_ends_and_leaves_the_engine_to_its_parent(checkpoint: Path) -> None:
    _ = run(
        checkpoint,
        """
first = anyio.run(asked)
if not (child := os.fork()):
    sys.exit(0)  # with what `atexit` has to do
assert ended(child) == 0
assert anyio.run(asked) == first
""",
    )


def test_a_forked_child_that_opens_a_session_is_answered_by_an_engine_of_its_own(checkpoint: Path) -> None:
    _ = run(
        checkpoint,
        """
first = anyio.run(asked)
if not (child := os.fork()):
    ids, engine = anyio.run(asked)
    assert ids == first[0] and engine != first[1]
    sys.exit(0)
assert ended(child) == 0
assert anyio.run(asked) == first
""",
    )


def test_the_workers_of_a_pool_use_sessions_as_their_parent_does(checkpoint: Path) -> None:
    _ = run(
        checkpoint,
        """
import multiprocessing

def work(number):
    return anyio.run(asked)

first = anyio.run(asked)
with multiprocessing.get_context("fork").Pool(2) as pool:
    answers = pool.map_async(work, range(2), chunksize=1).get(60)
assert [ids for ids, _ in answers] == [first[0]] * 2
assert first[1] not in [engine for _, engine in answers]
assert anyio.run(asked) == first
""",
    )


def test_a_session_that_was_open_at_the_fork_is_refused_in_the_child_and_goes_on_in_the_parent(
    checkpoint: Path,
) -> None:
    """The engine is one of its own, whose start, link and locks the child has copies of."""
    said = run(
        checkpoint,
        """
def in_child(inherited, engine, pid):
    async def use():
        try:
            await inherited.generate("More.", max_tokens=2)
        except errors.SessionClosed as error:
            print(error, flush=True)
        async with Session(MODEL, pages=80, threads=1) as s:
            assert (await s.generate("Hello!", max_tokens=2)).usage.drawn == 2
        await engine.close()
    anyio.run(use)

async def main():
    async with Engine(MODEL, pages=80, threads=1) as engine, engine.session() as s:
        await s.generate("One.", max_tokens=2)
        pid = engine.pid
        if not (child := os.fork()):
            thread = threading.Thread(target=in_child, args=(s, engine, pid))
            thread.start()
            thread.join(50)
            os._exit(thread.is_alive())
        assert await anyio.to_thread.run_sync(ended, child) == 0
        assert (await s.generate("Two.", max_tokens=2)).usage.drawn == 2
        assert engine.pid == pid and (await engine.stats()).counts["links"] == 1

anyio.run(main)
""",
    )
    assert "belongs to process" in said and "after the fork" in said


def test_an_engine_ends_with_its_parent_though_a_forked_child_lives_on(checkpoint: Path) -> None:
    """The child has a copy of the pipe whose end tells the engine to end."""
    _ = run(
        checkpoint,
        """
reading, writing = os.pipe()
if not (parent := os.fork()):
    _, engine = anyio.run(asked)
    if not (child := os.fork()):
        time.sleep(30)
        os._exit(0)
    os.write(writing, f"{engine} {child}".encode())
    os.kill(os.getpid(), 9)
engine, child = map(int, os.read(reading, 40).split())
assert ended(parent) == -9
limit = time.monotonic() + 20
while os.path.exists(f"/proc/{engine}"):
    with open(f"/proc/{engine}/stat") as stat:
        if stat.read().rsplit(")", 1)[1].split()[0] == "Z":
            break
    assert time.monotonic() < limit, "the engine outlives its parent"
    time.sleep(0.05)
os.kill(child, 9)
""",
    )


@pytest.mark.parametrize("chosen", ["", "GOMP_SPINCOUNT=77", "OMP_WAIT_POLICY=active"])
def test_engines_spin_shortly_at_barriers_unless_the_user_chose_otherwise(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, chosen: str
) -> None:
    script = """
_, engine = anyio.run(asked)
with open(f"/proc/{engine}/environ") as file:
    print([one for one in file.read().split("\\0") if one.startswith(("GOMP_SPINCOUNT=", "OMP_WAIT_POLICY="))])
"""
    for variable in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(variable, raising=False)
    if chosen:
        name, _, value = chosen.partition("=")
        monkeypatch.setenv(name, value)
    assert run(checkpoint, script).strip() == f"['{chosen or 'GOMP_SPINCOUNT=1000'}']"

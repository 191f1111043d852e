"""The number of links is bounded: who is too many is told so, and no crowd of connections harms the engine."""

from __future__ import annotations

import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from agentspeed_engine.protocol import messages as wire
from tests.support.engine_client import EngineProcess, Front, LinkClosed, Refused, engine, until

NOOP = {"model": "noop:512:0", "pages": 200, "context_limit": 4096}


@contextmanager
def idle(process: EngineProcess, count: int) -> Iterator[list[socket.socket]]:
    """Connections that say nothing."""
    with ExitStack() as stack:
        links = []
        for _ in range(count):
            link = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            link.connect(str(process.path))  # waits in the backlog
            links.append(link)
        yield links


def serves(front: Front) -> bool:
    return front.generate(front.open([3]), max_tokens=2).ids == [4, 5]


def descriptors(process: EngineProcess) -> int:
    return len(list(Path(f"/proc/{process.pid}/fd").iterdir()))


def limit_descriptors(process: EngineProcess, most: int) -> None:
    _, hard = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (most, hard))


def test_one_link_too_many_is_refused_by_name_and_a_closed_one_makes_room(tmp_path: Path) -> None:
    with engine(tmp_path, **NOOP, max_links=2) as process:
        first, second = process.connect(), process.connect()
        assert first.welcome.limits["links"] == 2
        late = process.connect(greet=False)
        with pytest.raises(Refused, match=r"too_many_links.*2 links.*max_links") as refused:
            late.ask(wire.Hello(request=7), wire.Welcome)
        assert refused.value.failed.retryable
        with pytest.raises(LinkClosed):
            late.step()
        second.close()
        until("the closed link is gone", lambda: first.counts()["links"] == 1)
        assert serves(process.connect()) and serves(first)


def test_links_that_never_greet_are_turned_away_oldest_first(tmp_path: Path) -> None:
    with engine(tmp_path, **NOOP) as process:
        front = process.connect()
        with idle(process, 200) as links:
            oldest = Front(links[0], greet=False)
            with pytest.raises(LinkClosed) as closed:
                oldest.step()
                oldest.step()
            assert isinstance(closed.value.last, wire.Failed) and closed.value.last.code == "too_many_links"
            until("the oldest are gone", lambda: front.counts()["links"] == 1 + 64)
            assert serves(Front(links[-1])), "the newest may still greet"
            assert serves(front) and serves(process.connect())


def test_an_engine_that_has_few_descriptors_keeps_some_and_serves_on(tmp_path: Path) -> None:
    with engine(tmp_path, **NOOP) as process:
        few = descriptors(process) + 24
        front = process.connect()
        limit_descriptors(process, few)
        with idle(process, 200):
            assert serves(front) and serves(process.connect())
            until("the oldest are gone", lambda: descriptors(process) <= few - 15)
            assert front.counts()["links"] > 4
        assert serves(process.connect())
        assert process.close() == 0
        assert process.errors == ""


def test_an_engine_without_any_descriptor_waits_says_so_once_and_accepts_again(tmp_path: Path) -> None:
    with engine(tmp_path, **NOOP) as process:
        front = process.connect()
        limit_descriptors(process, descriptors(process))
        with idle(process, 30):
            time.sleep(2.5)
            assert serves(front)
            assert front.counts()["links"] == 1
            limit_descriptors(process, 512)
            assert serves(process.connect())
        assert process.close() == 0
        assert process.errors.count("links wait") == process.errors.count("Too many open files") == 1

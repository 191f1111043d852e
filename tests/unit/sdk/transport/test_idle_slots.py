"""Engines of the whole process that nobody uses are waited for by one thread, however often they were used."""

from __future__ import annotations

import threading

import pytest

from agentspeed.transport import engine_process
from tests.support.engine_client import until


def waiting() -> int:
    return sum(isinstance(thread, threading.Timer) for thread in threading.enumerate())


def test_an_engine_that_is_used_for_moments_again_and_again_costs_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_process, "_IDLE_SECONDS", 0.6)
    before = waiting()
    for _ in range(30):
        engine_process.release(engine_process.acquire({"model": "noop:moments"}))
    assert waiting() <= before + 1
    until("nobody waits any more", lambda: waiting() <= before)

"""Threads that compute let go of their core for whoever wakes, where Linux knows slices of threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import pytest

from agentspeed_engine.serve.in_thread import EngineThread
from agentspeed_engine.serve.options import EngineOptions
from agentspeed_engine.serve.time_slice import slice_seconds, yields_to_who_wakes
from tests.support.engine_client import Front

needs_slices = pytest.mark.skipif(
    slice_seconds(threading.main_thread()) is None, reason="this system tells no slices of threads"
)


def in_a_thread(call: Callable[[], None]) -> None:
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


@needs_slices
def test_the_thread_of_steps_and_those_it_starts_have_a_longer_slice_than_others() -> None:
    seen: list[float | None] = []

    def steps() -> None:
        yields_to_who_wakes()
        seen.append(slice_seconds(threading.current_thread()))
        in_a_thread(lambda: seen.append(slice_seconds(threading.current_thread())))

    in_a_thread(steps)
    own, of_its_team = seen
    usual = slice_seconds(threading.current_thread())
    assert own is not None and usual is not None
    assert own == of_its_team and own > usual


def test_the_niceness_of_a_thread_stays() -> None:
    seen: list[int] = []

    def steps() -> None:
        own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) + 1
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), own)
        yields_to_who_wakes()
        seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) - own)

    in_a_thread(steps)
    assert seen == [0]


@needs_slices
def test_a_thread_whose_policy_somebody_chose_keeps_it() -> None:
    seen: list[tuple[int, float | None]] = []

    def steps() -> None:
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        before = slice_seconds(threading.current_thread())
        yields_to_who_wakes()
        assert slice_seconds(threading.current_thread()) == before
        seen.append((os.sched_getscheduler(0), before))

    in_a_thread(steps)
    assert [policy for policy, _ in seen] == [os.SCHED_BATCH]


@needs_slices
def test_only_the_worker_of_an_engine_yields() -> None:
    before = set(threading.enumerate())
    engine = EngineThread(EngineOptions(model="noop:512:0", pages=100, context_limit=2048))
    try:
        with engine.connect() as peer:
            front = Front(peer)
            assert front.generate(front.open([1, 2]), max_tokens=1).ids == [3]
            usual = slice_seconds(threading.main_thread())
            slices = {thread.name: slice_seconds(thread) for thread in set(threading.enumerate()) - before}
    finally:
        engine.close()
    assert {name for name, own in slices.items() if own != usual} == {"agentspeed-worker"}

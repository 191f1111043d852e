"""Host copies that queue for one copier: none is late for those before it, and a stuck copier holds up nobody."""

from __future__ import annotations

import math

import pytest

from agentspeed_engine.protocol import messages as wire
from agentspeed_engine.sched.plan import HostCopy
from tests.support.scheduled import Scheduled


def carried_out(world: Scheduled, seconds: float) -> int:
    """To the end of all turns, by a copier that takes so long for each copy. Returns how many it refused to begin."""
    world.host = None  # copies are carried out here
    queue: list[HostCopy] = []
    progress, refused = -math.inf, 0
    while True:
        while world.step():
            pass
        queue, world.copies = queue + world.copies, []
        if not queue:
            return refused
        order = queue.pop(0)
        if ok := order.may_begin(world.now, progress):
            world.core.begun(order.ticket)
            world.now += seconds
            progress = order.progress(world.now, progress)
            assert world.core.plan(world.now) is None
            wake = world.core.wake_at(world.now)
            assert wake is None or wake > world.now, "nothing is late behind a copy that is carried out"
            world.device.copy(order)
        refused += not ok
        world.hear(world.core.copied(order.ticket, ok, world.now))
        world.core.check()


def paused(world: Scheduled, count: int, first: int, seconds: float) -> list[int]:
    """So many sessions at rest, each said to run again in `seconds`."""
    branches: list[int] = []
    for number in range(first, first + count):
        branch = world.open([number, *range(10, 33)])
        _ = world.turn(branch)
        _ = world.send(wire.Expect(request=1, branch=branch, seconds=seconds))
        branches.append(branch)
    return branches


def ten_on_the_host(**options: object) -> tuple[Scheduled, list[int]]:
    """Ten sessions at rest, all or most of their rows on the host, in a pool that has room for all of them."""
    world = Scheduled(pages=92, context_limit=40, host_slots=400, prefill_chunk=64, **options)
    branches = paused(world, 10, 0, 1000.0)
    for branch in paused(world, 15, 60, 1.0):  # needed sooner, so that these move the others out
        _ = world.send(wire.Close(request=1, branch=branch))
    assert all(world.residence(branch).host > 0 for branch in branches)
    world.now = 100.0
    world.heard.clear()
    return world, branches


def usages(world: Scheduled) -> list[wire.TurnUsage]:
    return [said.usage for said in world.heard if isinstance(said, wire.TurnEnded)]


@pytest.mark.parametrize("seconds", [1.0, 2.4])
def test_sessions_that_return_together_all_resume_from_the_host_however_slow_its_link_is(seconds: float) -> None:
    world, branches = ten_on_the_host()
    for branch in branches:
        _ = world.start(branch, (5,), 1)
    assert carried_out(world, seconds) == 0
    assert len(usages(world)) == 10
    assert {(usage.resumed_host + usage.resumed_device, usage.recomputed, usage.why) for usage in usages(world)} == {
        (24, 0, "")
    }
    assert world.core.counts()["tickets_late"] == 0


def test_all_that_a_prompt_evicts_at_once_reaches_the_host_though_the_saves_queue() -> None:
    world = Scheduled(pages=120, context_limit=448, host_slots=1000, prefill_chunk=400, max_sessions=64)
    branches = paused(world, 16, 0, 1000.0)
    world.now = 100.0
    _ = world.start(world.open([60] * 440), (), 1)
    assert carried_out(world, 0.3) == 0
    assert all(world.residence(branch).lost <= 1 for branch in branches)


def test_behind_a_copier_that_does_nothing_all_turns_go_on_after_twice_the_deadline_however_many_wait() -> None:
    world, branches = ten_on_the_host(ticket_deadline=2.0)
    for branch in branches:
        _ = world.start(branch, (5,), 1)
    world.host = None
    world.run()
    assert world.now == 104.0
    assert len(usages(world)) == 10
    assert {usage.why for usage in usages(world)} == {"a copy from the host failed, or did not begin in time"}


def test_behind_a_copy_that_hangs_nothing_waits_for_more_than_a_deadline_and_nothing_begins_after_it() -> None:
    world, first, queued = one_begun_and_two_that_queue()
    world.now += 2.0
    _ = world.step()
    assert world.core.counts()["tickets_late"] == 2
    assert first.progress(world.now + 30.0, before=-math.inf) == -math.inf, "it took too long to be any"
    assert not any(order.may_begin(world.now + 30.0, progress=-math.inf) for order in queued)
    world.host, world.copies = True, []
    world.device.copy(first)
    world.hear(world.core.copied(first.ticket, True, world.now))
    world.run()
    assert len(usages(world)) == 3


def one_begun_and_two_that_queue() -> tuple[Scheduled, HostCopy, list[HostCopy]]:
    world, branches = ten_on_the_host(ticket_deadline=2.0)
    for branch in branches[:3]:
        _ = world.start(branch, (5,), 1)
    world.host = None
    while world.step():
        pass
    first, *queued = world.copies
    assert len(queued) == 2
    world.core.begun(first.ticket)
    return world, first, queued


def test_copies_that_queue_are_given_up_one_deadline_after_the_last_one_that_ended() -> None:
    world, first, queued = one_begun_and_two_that_queue()
    world.now += 0.9
    world.device.copy(first)
    world.hear(world.core.copied(first.ticket, True, world.now))
    assert world.core.wake_at(world.now) == world.now + 2.0
    for order in queued:
        assert order.may_begin(world.now + 1.0, progress=world.now)
        assert not order.may_begin(world.now + 1.1, progress=world.now), "well before the core gives it up"
    world.now += 2.0
    world.copies = []
    _ = world.step()
    assert world.core.counts()["tickets_late"] == 2
    world.host = True
    world.run()
    assert [usage.recomputed for usage in usages(world)] == [0, 0, 0], "the rows were on the host all the time"

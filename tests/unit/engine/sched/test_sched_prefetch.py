"""Rows that are due come back into a pool that is full of rows, and take nothing that is needed sooner."""

from __future__ import annotations

import random

import pytest

from agentspeed_engine.ids import BranchId
from agentspeed_engine.protocol import messages as wire
from agentspeed_engine.sched.reclaim import next_use
from tests.support.any_command import any_command
from tests.support.scheduled import Scheduled


def expected(world: Scheduled, branch: int, seconds: float, keep: str = "soft") -> None:
    answered = world.send(wire.Expect(request=1, branch=branch, seconds=seconds, keep=keep))  # type: ignore[arg-type]
    assert isinstance(answered, wire.LeaseAnswer) and answered.lease.keep == keep


def paused_in_a_pool_of_guests(private: bool = False, **options: object) -> tuple[Scheduled, int]:
    """One session whose rows are partly on the host and due in 10 s; guests filled the pool after it, and left."""
    world = Scheduled(pages=64, context_limit=200, host_slots=200, prefill_chunk=64, **options)
    paused = world.open([number % 90 for number in range(100)])
    _ = world.turn(paused)
    expected(world, paused, 10.0)
    for guest in range(3):
        branch = world.open([(number * 7 + guest) % 90 for number in range(190)], private=private)
        _ = world.turn(branch)
        _ = world.send(wire.Close(request=1, branch=branch))
    assert world.residence(paused).host > 0
    return world, paused


def until(world: Scheduled, moment: float) -> None:
    while (wake := world.core.wake_at(world.now)) is not None and wake <= moment:
        world.now = wake
        _ = world.step()
        world.settle_copies()
    world.now = moment


@pytest.mark.parametrize("private", [False, True])
def test_due_rows_are_back_before_their_tool_though_closed_sessions_left_the_pool_full(private: bool) -> None:
    world, paused = paused_in_a_pool_of_guests(private)
    until(world, 9.99)
    assert world.residence(paused).host == 0
    assert world.core.counts()["prefetches"] == 1


def two_sessions_and_room_for_one(first: float, second: float) -> tuple[Scheduled, int, int]:
    """The first is on the host, due in `first` s; the second fills the pool, is on the host as well, due in
    `second` s."""
    world = Scheduled(pages=64, context_limit=252, host_slots=128, prefill_chunk=64)
    one, two = world.open(range(1, 15)), world.open([(number * 7 + 40) % 90 for number in range(246)])
    _ = world.turn(one)
    expected(world, one, first)
    _ = world.turn(two)
    expected(world, two, second)
    for _ in range(8):  # the link is idle: what is paused is copied early
        _ = world.step()
        world.settle_copies()
    assert world.residence(one).host > 0
    return world, one, two


def test_due_rows_take_the_pages_of_rows_that_the_host_has_too_and_that_are_due_later() -> None:
    world, one, two = two_sessions_and_room_for_one(first=5.0, second=900.0)
    before = world.residence(two)
    until(world, 4.99)
    assert world.residence(one).host < 4, "all its full pages are back"
    assert world.residence(two).lost == before.lost, "they are on the host"


def test_due_rows_take_nothing_from_rows_that_are_due_sooner() -> None:
    world, one, two = two_sessions_and_room_for_one(first=5.0, second=4.98)
    before = (world.residence(one), world.residence(two))
    world.now = 4.95  # both are due: the second is on the device, and 20 ms sooner
    _ = world.step()
    world.settle_copies()
    assert (world.residence(one), world.residence(two)) == before


def test_due_rows_leave_a_running_turn_the_pages_of_its_prompt() -> None:
    world, paused = paused_in_a_pool_of_guests()
    runs = world.open([(number * 11 + 5) % 90 for number in range(190)])
    assert isinstance(world.start(runs, most=4), wire.Done)
    _ = world.step()
    assert world.residence(runs).lost > 0, "it computes its prompt in chunks"
    world.now = 9.96
    preempted = world.core.counts()["preemptions"]
    while world.core.counts()["branches_held"] < 2:
        _ = world.step()
        world.settle_copies()
    assert world.core.counts()["preemptions"] == preempted
    assert world.residence(paused).lost <= 1


def test_a_tenant_at_its_quota_gets_rows_back_early_in_pages_of_its_own_that_nobody_has() -> None:
    world, paused = paused_in_a_pool_of_guests(tenant_pages=60)
    until(world, 9.99)
    assert world.core.world.kv.tree.owned[""] <= 60
    assert world.core.counts()["prefetches"] == 1
    assert world.residence(paused).host == 0


def test_due_rows_leave_a_turn_of_their_tenant_the_quota_that_its_prompt_takes() -> None:
    world, paused = paused_in_a_pool_of_guests(tenant_pages=60)
    runs = world.open([(number * 11 + 5) % 90 for number in range(190)])
    assert isinstance(world.start(runs, most=4), wire.Done)
    _ = world.step()
    assert world.residence(runs).lost > 0, "it computes its prompt in chunks"
    world.now = 9.96
    while world.core.counts()["branches_held"] < 2:
        _ = world.step()
        assert not world.core.world.over_quota
        world.settle_copies()
    assert world.residence(paused).lost <= 1


def paused_at_its_quota(**options: object) -> tuple[Scheduled, int]:
    """A session of tenant a whose rows are partly on the host and due in 30 s; half of the pool is nobody's."""
    world = Scheduled(pages=40, context_limit=40, host_slots=40, tenant_pages=14, **options)
    paused, other = world.open(range(1, 25), tenant="a"), world.open(range(30, 54), tenant="a")
    for branch, seconds in ((paused, 30.0), (other, 3.0)):
        _ = world.turn(branch)
        expected(world, branch, seconds)
    guest = world.open(range(60, 84), tenant="a")
    _ = world.turn(guest)
    _ = world.send(wire.Close(request=1, branch=guest))
    assert world.residence(paused).host > 0
    return world, paused


def test_a_turn_that_waits_for_another_tenants_quota_does_not_keep_due_rows_on_the_host() -> None:
    world, paused = paused_at_its_quota()
    draws, waits = world.open(range(1, 25), tenant="b"), world.open(range(30, 60), tenant="b")
    for branch, most in ((draws, 16), (waits, 4)):
        assert isinstance(world.start(branch, (), most), wire.Done)
    _ = world.step()
    world.settle_copies()
    assert world.core.world.over_quota == [waits]
    world.now = 29.96
    _ = world.step()
    world.settle_copies()
    assert world.residence(paused).host == 0


def test_a_turn_that_waits_for_a_siblings_prompt_does_not_keep_due_rows_on_the_host() -> None:
    world, paused = paused_at_its_quota(prefill_chunk=8)
    fills, waits = world.open(range(24), tenant="b"), world.open(range(24), tenant="b")
    for branch in (fills, waits):
        assert isinstance(world.start(branch), wire.Done)
    _ = world.step()
    assert list(world.core.world.fill_of) == [waits]
    world.now = 29.96
    _ = world.step()
    world.settle_copies()
    assert world.residence(paused).host == 0


def a_turn_refused_for(what: str) -> tuple[Scheduled, list[int]]:
    """Rows that will be due, a turn that draws, and one that it keeps out of the room, or the quota, of both."""
    world, _ = paused_at_its_quota() if what == "quota" else paused_in_a_pool_of_guests()
    tenant, size = ("a", 32) if what == "quota" else ("", 190)
    turns = [world.open([(number * 11 + first) % 90 for number in range(size)], tenant=tenant) for first in (5, 6)]
    for branch in turns:
        assert isinstance(world.start(branch, (), 8), wire.Done)
    return world, turns


@pytest.mark.parametrize("what", ["room", "quota"])
def test_due_rows_wait_for_a_turn_that_was_refused_what_they_would_take_and_come_when_it_is_done(what: str) -> None:
    world, turns = a_turn_refused_for(what)
    for _ in range(4):
        _ = world.step()
        world.settle_copies()
    assert turns[1] in (world.core.world.over_quota if what == "quota" else world.core.world.refused or ())
    world.now = next(iter(world.core.world.due.values()))
    due = world.now
    _ = world.step()
    assert world.core.counts()["prefetches"] == 0
    wake = world.core.wake_at(world.now)
    assert wake is not None and due < wake < due + 0.05, "it is tried again"
    world.run()
    for branch in turns:
        _ = world.send(wire.Close(request=1, branch=branch))
    world.now = wake
    _ = world.step()
    assert world.core.counts()["prefetches"] == 1


def test_a_turn_that_arrives_just_when_rows_are_due_has_its_choice_of_room_first() -> None:
    world, _ = paused_in_a_pool_of_guests()
    until(world, world.core.world.prefetch[0][0] - 1e-6)
    arrives = world.open([(number * 11 + 5) % 90 for number in range(190)])
    assert isinstance(world.start(arrives, most=1), wire.Done)
    world.now += 2e-6
    world.host = None
    _ = world.step()
    assert world.core.counts()["prefetches"] == 0
    while world.step():
        pass
    assert any(isinstance(said, wire.TurnEnded) and said.branch == arrives for said in world.heard), "without any copy"


def test_rows_that_cannot_come_before_the_pause_should_end_are_tried_a_few_times_and_then_left_alone() -> None:
    world, one, _ = two_sessions_and_room_for_one(first=5.0, second=4.99)
    expected(world, one, 5.0)
    until(world, 10.0)
    assert world.core.counts()["prefetches"] == 0
    assert world.core.wake_at(world.now) is None


def test_rows_that_come_back_never_take_the_pages_of_the_rows_above_them() -> None:
    brought = 0
    for policy in ("next_use", "ttl", "min_waste"):
        for seed in range(45):
            chance = random.Random(f"{policy} {seed}")
            world = Scheduled(
                pages=chance.choice((10, 18)),
                host_slots=80,
                policy=policy,
                max_sessions=6,
                copy_seconds_per_token=1e-4,
                recompute_seconds_per_token=1e-3,
            )
            for _ in range(120):
                if chance.random() < 0.4:
                    any_command(world, chance)
                else:
                    _ = world.step()
                    world.settle_copies()
                    world.now += chance.choice((0.0, 0.1, 3.0))
            brought += world.core.counts()["prefetches"]
    assert brought > 3


def test_a_pause_that_nobody_announces_is_expected_as_the_pauses_of_its_tool_were_and_not_as_one_slow_call() -> None:
    world = Scheduled(pages=40, context_limit=64)
    branch = world.open(range(10))

    def pause(tool: str) -> wire.Lease:
        asked = wire.Expect(request=1, branch=branch, seconds=None, tool=tool)
        answered = world.send(asked)
        assert isinstance(answered, wire.LeaseAnswer), answered
        return answered.lease

    for seconds in (*[0.3] * 12, 200.0):
        _ = world.turn(branch)
        lease = pause("quick")
        world.now += seconds
    assert lease.keep == "soft" and lease.until is None and "nobody announced" in lease.why
    _ = world.turn(branch)
    assert pause("quick").seconds < 60.0
    held = world.core.world.states[BranchId(branch)].branch
    assert next_use(world.core.world, held, world.now) < 60.0
    refused = world.send(wire.Expect(request=1, branch=branch, seconds=None, keep="firm"))
    assert isinstance(refused, wire.Failed) and "needs an end" in refused.message


def test_rows_come_back_before_a_tool_whose_pauses_were_learnt_though_nobody_announces_one() -> None:
    world = Scheduled(pages=64, context_limit=200, host_slots=200, prefill_chunk=64)
    paused = world.open([number % 90 for number in range(100)])
    for _ in range(10):
        _ = world.turn(paused)
        _ = world.send(wire.Expect(request=1, branch=paused, seconds=None, tool="slow"))
        world.now += 10.0
    _ = world.turn(paused)
    _ = world.send(wire.Expect(request=1, branch=paused, seconds=None, tool="slow"))
    start = world.now
    for guest in range(3):
        branch = world.open([(number * 7 + guest) % 90 for number in range(190)])
        _ = world.turn(branch)
        _ = world.send(wire.Close(request=1, branch=branch))
    assert world.residence(paused).host > 0
    until(world, start + 9.9)
    assert world.residence(paused).host < world.core.config.page_tokens, "all but the stub at its end"
    assert world.core.counts()["prefetches"] == 1

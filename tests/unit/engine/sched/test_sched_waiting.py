"""Every turn that waits says what for, and it is true: copies, pages, firm leases, a quota, tokens of a step."""

from __future__ import annotations

import random

import pytest

from agentspeed_engine.ids import BranchId
from agentspeed_engine.kv.branch_states import Prefilling, Queued
from agentspeed_engine.kv.token_log import Log
from agentspeed_engine.protocol import messages as wire
from agentspeed_engine.sched import step
from agentspeed_engine.sched.plan import StepPlan
from agentspeed_engine.sched.state import SchedulerState
from tests.support.any_command import any_command
from tests.support.scheduled import Scheduled


def why(world: Scheduled, branch: int) -> str:
    inspected = world.send(wire.Inspect(request=1, branch=branch))
    assert isinstance(inspected, wire.Inspected)
    return inspected.waiting_for


def one_at_rest_and_one_that_draws(**options: object) -> tuple[Scheduled, int]:
    """The first session's rows fill the pool but for a page or two; the second draws, into its last page."""
    world = Scheduled(pages=17, context_limit=60, host_slots=200, prefill_chunk=64, ticket_deadline=1000.0, **options)
    rests = world.open(range(1, 56))
    _ = world.turn(rests)
    draws = world.open(range(60, 66))
    assert isinstance(world.start(draws, most=30), wire.Done)
    world.host = None
    _ = world.step()
    return world, draws


def test_the_head_of_the_queue_waits_for_saves_in_flight_and_says_so() -> None:
    world, _ = one_at_rest_and_one_that_draws()
    waits, behind = world.open(range(66, 86)), world.open(range(86, 96))
    for branch in (waits, behind):
        assert isinstance(world.start(branch, most=2), wire.Done)
    _ = world.step()
    assert world.core.counts()["tickets"] > 0 and world.core.counts()["pages_free"] < 5
    assert why(world, waits) == "saves in flight"
    assert why(world, behind) == f"room after branch {waits}"


def test_a_prompt_that_stands_still_until_a_save_is_done_says_so() -> None:
    world = Scheduled(pages=17, context_limit=60, host_slots=200, prefill_chunk=8, ticket_deadline=1000.0)
    _ = world.turn(world.open(range(1, 56)))
    world.host = None
    fills = world.open(range(60, 90))
    assert isinstance(world.start(fills), wire.Done)
    while world.step() and why(world, fills) != "saves in flight":
        assert why(world, fills) == ""
    view = next(view for session in world.core.describe(world.now) for view in session.branches if view.branch == fills)
    assert view.waiting_for == "saves in flight"


def test_when_the_saves_are_done_it_waits_for_the_next_step_alone() -> None:
    world, _ = one_at_rest_and_one_that_draws()
    waits = world.open(range(66, 86))
    assert isinstance(world.start(waits, most=2), wire.Done)
    _ = world.step()
    assert why(world, waits) == "saves in flight"
    world.host = True
    while world.core.world.tickets:
        world.settle_copies()
    assert why(world, waits) == "the next step"


def test_a_turn_that_arrives_after_a_step_was_planned_waits_for_the_next_one() -> None:
    world = Scheduled(pages=40, prefill_chunk=8, extend_tokens=1)
    first = world.open(range(1, 31))
    assert isinstance(world.start(first), wire.Done)
    assert world.core.plan(world.now) is not None
    world.hear(world.core.events())
    second = world.open(range(40, 70))
    assert isinstance(world.start(second), wire.Done)
    assert why(world, second) == "the next step"


def test_a_turn_that_firm_leases_keep_out_says_so() -> None:
    world = Scheduled(pages=20, context_limit=40, firm_pages=8, prefill_chunk=64)
    kept = world.open(range(1, 30))
    _ = world.turn(kept)
    answered = world.send(wire.Expect(request=1, branch=kept, seconds=1000.0, keep="firm"))
    assert isinstance(answered, wire.LeaseAnswer) and answered.lease.keep == "firm"
    first, second = world.open(range(30, 42)), world.open(range(50, 86))
    for branch in (first, second):
        assert isinstance(world.start(branch, most=4), wire.Done)
    _ = world.step()
    assert why(world, second) == "firm leases"
    world.now = 2000.0
    _ = world.step()
    assert why(world, second) == "", "the leases ended, and it entered"


def test_a_turn_of_a_tenant_at_its_quota_waits_for_the_quota_and_others_do_not() -> None:
    world = Scheduled(pages=40, context_limit=40, tenant_pages=10, prefill_chunk=64)
    first, second = world.open(range(1, 29), tenant="a"), world.open(range(30, 58), tenant="a")
    other = world.open(range(60, 88), tenant="b")
    for branch in (first, second, other):
        assert isinstance(world.start(branch, most=4), wire.Done)
    said: set[str] = set()
    while why(world, first) or world.core.counts()["branches_held"] < 2:
        _ = world.step()
        said.add(why(world, second))
        assert why(world, other) == ""
    assert said <= {"", "quota", "the next step"} and "quota" in said
    world.run()


def test_a_turn_that_its_quota_keeps_out_keeps_out_no_turn_of_another_tenant() -> None:
    world = Scheduled(pages=20, tenant_pages=12, context_limit=48, prefill_chunk=64)
    first = world.open(range(30), tenant="a")
    assert isinstance(world.start(first, most=10), wire.Done)
    while world.residence(first).device < 30:
        _ = world.step()
    waits, other = world.open(range(40, 84), tenant="a"), world.open(range(8), tenant="b")
    for branch in (waits, other):
        assert isinstance(world.start(branch, most=1), wire.Done)
    _ = world.step()
    assert (why(world, waits), why(world, other)) == ("quota", "")
    world.run()


def test_turns_that_wait_for_a_quota_are_not_even_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    world = Scheduled(pages=60, context_limit=40, tenant_pages=10, max_sessions=200)
    for number in range(100):
        assert isinstance(world.start(world.open([number % 90, *range(27)], tenant="a"), most=8), wire.Done)
    other = world.open(range(60, 88), tenant="b")
    assert isinstance(world.start(other, most=30), wire.Done)
    while world.core.counts()["branches_decoding"] < 2:
        _ = world.step()
    looked: list[int] = []

    def admit(_: SchedulerState, run: object, state: Queued, now: float) -> None:
        looked.append(state.branch.id)
        original(_, run, state, now)  # type: ignore[arg-type]

    original = step._admit
    monkeypatch.setattr(step, "_admit", admit)
    for _ in range(3):
        _ = world.step()
    assert len(looked) <= 3, "one a plan finds the tenant at its quota, and the rest are passed over with it"


@pytest.mark.parametrize("tenants", [True, False])
def test_the_prompt_of_a_turn_that_waits_is_read_no_further_than_the_page_that_it_needs_next(
    monkeypatch: pytest.MonkeyPatch,
    tenants: bool,
) -> None:
    world = Scheduled(pages=34, context_limit=100, tenant_pages=30 if tenants else None, prefill_chunk=64)
    runs = world.open(range(60), tenant="a")
    assert isinstance(world.start(runs, most=30), wire.Done)
    while world.residence(runs).device < 60:
        _ = world.step()
    waits = world.open([*reversed(range(90))], tenant="a")
    assert isinstance(world.start(waits, most=1), wire.Done)
    _ = world.step()
    assert why(world, waits) == ("quota" if tenants else "room")
    read: list[int] = []

    def packed(self: Log, start: int, stop: int) -> bytes:
        read.append(stop - start)
        return original(self, start, stop)

    original = Log.packed
    monkeypatch.setattr(Log, "packed", packed)
    assert world.core.plan(world.now) is not None
    assert read and max(read) <= world.core.world.config.page_tokens


def test_a_turn_that_a_preemption_put_back_enters_before_younger_ones_of_its_tenant() -> None:
    world = Scheduled(pages=40, context_limit=40, tenant_pages=10, prefill_chunk=64)
    branches = [world.open([number, *range(40, 52)], tenant="a") for number in range(4)]
    for branch in branches:
        assert isinstance(world.start(branch, most=12), wire.Done)
    world.heard.clear()
    world.run()
    ended = [said.branch for said in world.heard if isinstance(said, wire.TurnEnded)]
    assert ended == branches


def test_a_younger_prompt_takes_no_longer_chunk_once_an_older_turn_was_refused() -> None:
    world = Scheduled(pages=40, context_limit=40, prefill_chunk=6, page_tokens=4, extend_tokens=1)
    fills = world.open(range(1, 30))
    assert isinstance(world.start(fills), wire.Done)
    _ = world.step()
    state = world.core.world.states[BranchId(fills)]
    assert isinstance(state, Prefilling)
    free = world.core.world.kv.pages.free
    run = step._Pass(6, 1, refused=True)
    step._prefill(world.core.world, run, state, 0.0)
    assert world.core.world.kv.pages.free == free, "it computes what its tail has room for"
    assert [len(row.ids) for row in run.rows] == [2]


def test_prompts_behind_others_in_a_step_wait_for_its_tokens() -> None:
    world = Scheduled(pages=40, prefill_chunk=8, extend_tokens=1)
    first, second = world.open(range(1, 31)), world.open(range(40, 70))
    for branch in (first, second):
        assert isinstance(world.start(branch), wire.Done)
    _ = world.step()
    assert why(world, second) == "token budget"


def reasons(world: Scheduled) -> dict[int, str]:
    """What each branch with a turn waits for."""
    return {
        view.branch: view.waiting_for
        for session in world.core.describe(world.now)
        for view in session.branches
        if view.state not in ("Held", "Settling")
    }


@pytest.mark.parametrize("seed", range(12))
def test_whatever_comes_who_is_not_in_a_step_says_why_and_who_is_says_nothing(seed: int) -> None:
    chance = random.Random(seed)
    world = Scheduled(
        pages=18,
        firm_pages=4,
        host_slots=chance.choice((0, 5, 40)),
        max_sessions=12,
        prefill_chunk=8,
        extend_tokens=4,
        tenant_pages=chance.choice((None, 14)),
    )
    plan, planned = world.core.plan, 0

    def checked(now: float) -> StepPlan | None:
        nonlocal planned
        step = plan(now)
        copies = {ticket.direction for ticket in world.core.world.tickets.values()}
        computing = set() if step is None else {row.branch for row in step.rows}
        for branch, said in reasons(world).items():
            assert (said == "") == (branch in computing), (branch, said)
            assert said != "the next step", "it was planned just now"
            assert said != "saves in flight" or "save" in copies
            assert said not in ("loads in flight", "rows from the host") or "load" in copies
        planned += 1
        return step

    world.core.plan = checked  # type: ignore[method-assign]
    for _ in range(200):
        if chance.random() < 0.5:
            any_command(world, chance, ("a", "b"))
        else:
            _ = world.step()
            if chance.random() < 0.7:
                world.settle_copies()
            world.now += chance.choice((0.0, 0.1, 3.0))
    assert planned > 50


def test_nobody_younger_enters_with_the_pages_that_an_older_turn_gave_back_in_the_same_step() -> None:
    world = Scheduled(pages=10, context_limit=32, prefill_chunk=64)
    oldest, older, younger = world.open(range(1, 20)), world.open(range(30, 44)), world.open(range(60, 63))
    for branch in (oldest, older):
        assert isinstance(world.start(branch, most=12), wire.Done)
    for _ in range(3):
        _ = world.step()
    assert world.core.counts()["pages_free"] == 0 and len(world.logs[older]) == 17, "its next row needs a page"
    assert isinstance(world.start(younger, most=1), wire.Done)
    _ = world.step()
    states = {view.branch: view.state for session in world.core.describe(world.now) for view in session.branches}
    assert (states[oldest], states[older]) == ("Decoding", "Queued"), "it had nobody to take a page from"
    assert states[younger] == "Queued"
    assert why(world, younger) == f"room after branch {older}"

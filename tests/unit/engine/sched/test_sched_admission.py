"""What counts as room for another turn: pages that must stay, each once, and no lease that has ended."""

from __future__ import annotations

import random

from agentspeed_engine.protocol import messages as wire
from tests.support.scheduled import Scheduled

WHOLE = range(1, 81)


def leased(world: Scheduled, branch: int, keep: str, seconds: float = 1000.0) -> None:
    answered = world.send(wire.Expect(request=1, branch=branch, seconds=seconds, keep=keep))  # type: ignore[arg-type]
    assert isinstance(answered, wire.LeaseAnswer) and answered.lease.keep == keep


def rows_of_each_step(world: Scheduled, branches: list[int]) -> list[int]:
    """How many branches computed in each step, until none of these runs any more."""
    rows: list[int] = []
    while any(
        view.state != "Held"
        for session in world.core.describe(world.now)
        for view in session.branches
        if view.branch in branches
    ):
        before = {branch: list(world.logs[branch]) for branch in branches}
        assert world.step()
        rows.append(sum(world.logs[branch] != before[branch] for branch in branches))
    return rows


def four_forks_of_a_leased_parent(keep: str) -> list[int]:
    """The parent has 21 pages, each fork computes 12 tokens and draws 6: 45 of the 50 pages in all."""
    world = Scheduled(pages=50, context_limit=100, firm_pages=24, prefill_chunk=200, extend_tokens=100)
    parent = world.open(WHOLE)
    _ = world.turn(parent)
    leased(world, parent, keep)
    forked = world.send(wire.Fork(request=1, branch=parent, n=4))
    assert isinstance(forked, wire.Forked)
    children = list(forked.branches)
    for number, child in enumerate(children):
        world.logs[child] = list(world.logs[parent])
        assert isinstance(world.start(child, [10 + number] * 12, most=6), wire.Done)
    return rows_of_each_step(world, children)


def test_sub_agents_forked_off_a_firm_parent_run_side_by_side_as_off_a_soft_one() -> None:
    assert four_forks_of_a_leased_parent("soft") == [4] * 6
    assert four_forks_of_a_leased_parent("firm") == [4] * 6


def steps_of_three_turns_after(seconds: float) -> int:
    """Steps of three turns of seven pages each, beside two firm leases of five pages that end after 1 s."""
    world = Scheduled(pages=24, context_limit=40, firm_pages=12, prefill_chunk=64)
    for start in (1, 30):
        leased_one = world.open(range(start, start + 19))
        _ = world.turn(leased_one)
        leased(world, leased_one, "firm", seconds=1.0)
    world.now += seconds
    running = [world.open(range(start, start + 20)) for start in (10, 40, 60)]
    for branch in running:
        assert isinstance(world.start(branch, most=6), wire.Done)
    return len(rows_of_each_step(world, running))


def test_firm_leases_that_have_ended_keep_nobody_out() -> None:
    assert steps_of_three_turns_after(0.0) > steps_of_three_turns_after(100.0) == 6


def test_pages_under_a_firm_lease_are_not_counted_as_room_for_others() -> None:
    world = Scheduled(pages=20, context_limit=40, firm_pages=8, prefill_chunk=64)
    kept = world.open(range(1, 30))
    _ = world.turn(kept)
    leased(world, kept, "firm")
    first, second = world.open(range(30, 42)), world.open(range(50, 86))
    for branch in (first, second):
        assert isinstance(world.start(branch, most=4), wire.Done)
    world.run()
    assert world.core.counts()["preemptions"] == 0, "the second was not let in to be thrown out again"
    assert world.residence(kept).device >= 28


def test_a_quota_costs_no_more_than_a_pool_of_its_size() -> None:
    """Admission counts inside the quota as it does inside the pool: nobody is let in to be preempted half way."""

    def crowd(seed: int, **options: object) -> tuple[int, int]:
        chance = random.Random(seed)
        world = Scheduled(context_limit=200, prefill_chunk=32, extend_tokens=8, **options)
        for _ in range(8):
            branch = world.open([chance.randrange(90) for _ in range(chance.randrange(20, 120))], tenant="a")
            assert isinstance(world.start(branch, most=chance.randrange(4, 40)), wire.Done)
        world.run()
        return world.device.tokens_computed, world.core.counts()["preemptions"]

    for seed in range(4):
        assert crowd(seed, pages=400, tenant_pages=66) == crowd(seed, pages=66)


def test_one_row_in_common_does_not_keep_the_whole_node_that_has_it_while_pages_are_short() -> None:
    world = Scheduled(pages=9, page_tokens=8, context_limit=56, prefill_chunk=64)
    late = world.open(range(1, 41))
    _ = world.turn(late)
    leased(world, late, "soft", seconds=900.0)
    soon = world.open(range(50, 74))
    _ = world.turn(soon)
    leased(world, soon, "soft", seconds=3.0)
    cold = world.open([1, *range(75, 90)])
    assert world.turn(cold).drawn == 1
    assert world.residence(soon).lost == 1, "only the row that every branch at rest lacks"
    assert world.residence(late).lost > 1

"""Leases, quotas and the policy: what the engine promises, and what it refuses by name."""

from __future__ import annotations

import pytest

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.protocol import messages as wire
from agentspeed_engine.sched.config import CoreConfig
from agentspeed_engine.sched.core import Core
from agentspeed_engine.sched.policy import POLICIES, Facts, worth_saving
from agentspeed_engine.sched.ranking import Rankings
from agentspeed_engine.sched.reclaim import reclaim
from tests.support.scheduled import LINK, Scheduled

FIRST, SECOND = range(1, 25), range(30, 54)


def lease(world: Scheduled, branch: int, keep: wire.Keep, seconds: float = 50.0) -> wire.Lease:
    answer = world.send(wire.Expect(request=1, branch=branch, seconds=seconds, keep=keep))
    assert isinstance(answer, wire.LeaseAnswer)
    return answer.lease


def test_a_firm_lease_keeps_every_row_while_others_need_the_pool() -> None:
    world = Scheduled(pages=17, firm_pages=8)
    first = world.open(FIRST)
    _ = world.turn(first)
    granted = lease(world, first, "firm")
    assert granted.keep == "firm" and granted.residence.device == 24
    for number in range(3):
        _ = world.turn(world.open(range(30 + 10 * number, 54 + 10 * number)))
    assert world.residence(first).device == 24
    assert world.turn(first, (7,)).recomputed <= 1


def test_a_soft_lease_is_revoked_for_a_running_turn_and_its_holder_is_told_why() -> None:
    world = Scheduled(pages=9)
    first = world.open(FIRST)
    _ = world.turn(first)
    assert lease(world, first, "soft").keep == "soft"
    _ = world.turn(world.open(SECOND))
    changed = [said for said in world.heard if isinstance(said, wire.LeaseChanged)]
    assert changed and changed[-1].branch == first and changed[-1].lease.why
    assert world.residence(first).device < 24


def test_a_firm_lease_past_the_budget_is_answered_soft_with_the_reason() -> None:
    world = Scheduled(pages=12, firm_pages=3)
    first = world.open(FIRST)
    _ = world.turn(first)
    answer = lease(world, first, "firm")
    assert answer.keep == "soft" and "firm budget" in answer.why


def test_the_firm_budget_counts_the_whole_segment_that_a_rewound_branch_starts_in() -> None:
    world = Scheduled(pages=17, firm_pages=5)
    first = world.open(FIRST)
    _ = world.turn(first)
    _ = world.send(wire.Rewind(request=1, branch=first, tokens=2))
    assert lease(world, first, "firm").keep == "soft"  # two rows, but a segment of six pages would be held


def test_a_pool_too_small_for_one_turn_beside_firm_leases_is_refused_at_the_start() -> None:
    with pytest.raises(EngineFault) as refused:
        _ = Core(CoreConfig(pages=10, context_limit=32, vocab_size=9, page_tokens=4, firm_pages=2))
    assert refused.value.code == "bad_options" and "L1" in refused.value.message and refused.value.remedy


def test_a_tenant_past_its_sessions_is_refused_and_others_are_not() -> None:
    world = Scheduled(tenant_sessions=1)
    _ = world.open(tenant="a")
    refused = world.send(wire.Open(request=1, tenant="a"))
    assert isinstance(refused, wire.Failed) and refused.code == "quota_exceeded" and refused.retryable
    assert refused.message == "Tenant 'a' has 1 session open, as many as may be."
    _ = world.open(tenant="b")


def test_sessions_without_a_tenant_share_one_quota_and_are_told_so() -> None:
    world = Scheduled(tenant_sessions=2, tenant_pages=7)
    first, _ = world.open(FIRST), world.open()
    refused = world.send(wire.Open(request=1))
    assert isinstance(refused, wire.Failed)
    assert refused.message == "2 sessions without a tenant are open, as many as may be."
    refused = world.start(first, SECOND[:5])
    assert isinstance(refused, wire.Failed)
    assert refused.message.startswith("All sessions without a tenant together may have 7 pages; this turn needs ")


def test_a_fork_into_more_than_a_session_may_ever_have_says_so_and_is_not_to_be_tried_again() -> None:
    world = Scheduled(max_branches=5)
    trunk = world.open(FIRST)
    never = world.send(wire.Fork(request=1, branch=trunk, n=5))
    assert isinstance(never, wire.Failed) and (never.code, never.retryable) == ("invalid_request", False)
    assert "Ask for 4 children at most" in never.remedy
    assert isinstance(world.send(wire.Fork(request=1, branch=trunk, n=3)), wire.Forked)
    later = world.send(wire.Fork(request=1, branch=trunk, n=4))
    assert isinstance(later, wire.Failed) and (later.code, later.retryable) == ("too_many_branches", True)


def test_a_turn_that_its_tenants_pages_can_never_hold_is_refused_at_the_call() -> None:
    world = Scheduled(tenant_pages=7)
    first, second = world.open(FIRST, tenant="a"), world.open(SECOND, tenant="a")
    refused = world.start(first, SECOND[:5])
    assert isinstance(refused, wire.Failed) and (refused.code, refused.retryable) == ("context_overflow", False)
    assert "may have 7 pages" in refused.message
    assert world.turn(first).drawn == world.turn(second).drawn == 1, "its own rows at rest made room"
    assert world.core.world.kv.tree.owned["a"] <= 7


@pytest.mark.parametrize(
    ("options", "asked", "told"),
    [
        ({"tenant_pages": 2}, 1000, "the tenant's quota of 2 pages"),
        ({"tenant_pages": 2}, None, "the tenant's quota of"),
        ({}, 1000, "the context limit of"),
        ({}, None, "the context limit of"),
        ({}, 3, ""),
    ],
)
def test_a_turn_that_is_cut_says_what_bounds_it(options: dict[str, int], asked: int | None, told: str) -> None:
    world = Scheduled(**options)
    branch = world.open((1, 2, 3), tenant="a")
    _ = world.turn(branch, most=asked)
    (ended,) = (said for said in world.heard if isinstance(said, wire.TurnEnded))
    assert ended.reason == "max_tokens" and (told in ended.message if told else not ended.message)


def test_tenants_never_share_rows() -> None:
    world = Scheduled(pages=20)
    _ = world.turn(world.open(FIRST, tenant="a"))
    assert world.turn(world.open(FIRST, tenant="b")).shared == 0
    assert world.turn(world.open(FIRST, tenant="a")).shared == 23


def test_eight_cold_siblings_compute_their_common_prefix_once() -> None:
    world = Scheduled(pages=40)
    branches = [world.open(FIRST) for _ in range(8)]
    for branch in branches:
        assert isinstance(world.start(branch, (50 + branch,)), wire.Done)
    world.run()
    assert world.device.tokens_computed == 24 + 8


def test_the_core_describes_its_branches_as_a_tree_with_the_reason_for_waiting() -> None:
    world = Scheduled()
    trunk = world.open(FIRST)
    forked = world.send(wire.Fork(request=1, branch=trunk, n=1))
    assert isinstance(forked, wire.Forked)
    _ = world.start(trunk)
    (session,) = world.core.describe()
    assert [(view.branch, view.parent, view.state, view.waiting_for) for view in session.branches] == [
        (trunk, None, "Queued", "the next step"),
        (forked.branches[0], trunk, "Held", ""),
    ]


def facts(**known: float) -> Facts:
    chosen: dict[str, float] = {
        "tokens": 100,
        "rested": 1.0,
        "expected": 1.0,
        "copy_seconds": 0.0,
        "recompute_seconds": 1e-4,
    } | known
    return Facts(**chosen)  # type: ignore[arg-type]


def test_policies_order_the_same_two_branches_by_their_own_rule() -> None:
    soon_but_old, late_but_fresh = facts(rested=100.0, expected=1.0), facts(rested=1.0, expected=100.0)

    def first_out(name: str) -> Facts | None:
        ranks = [(rank, one) for one in (soon_but_old, late_but_fresh) if (rank := POLICIES[name](one)) is not None]
        return max(ranks, key=lambda pair: pair[0])[1] if ranks else None

    assert first_out("next_use") is late_but_fresh and first_out("min_waste") is late_but_fresh
    assert first_out("lru") is soon_but_old and first_out("ttl") is soon_but_old
    assert first_out("pin") is None


def test_rows_are_copied_only_where_two_copies_are_cheaper_than_computing() -> None:
    assert worth_saving(1e-6, 1e-4) and not worth_saving(1e-4, 1e-4)


def test_late_and_unknown_commands_are_refused_by_name() -> None:
    world = Scheduled()
    branch = world.open(FIRST)
    _ = world.start(branch)
    busy = world.send(wire.Generate(request=1, branch=branch))
    assert isinstance(busy, wire.Failed) and busy.code == "branch_busy"
    unknown = world.core.handle(LINK, wire.Close(request=1, branch=99), 0.0)[0][1]
    assert isinstance(unknown, wire.Failed) and unknown.code == "branch_unknown"


def test_what_a_tenant_has_of_its_quota_is_told_of_each_branch_and_in_the_picture() -> None:
    world = Scheduled(pages=20, tenant_pages=10)
    branch = world.open(FIRST, tenant="a")
    _ = world.turn(branch)
    inspected = world.send(wire.Inspect(request=1, branch=branch))
    assert isinstance(inspected, wire.Inspected)
    assert (inspected.tenant_pages, inspected.tenant_quota) == (6, 10)
    seen = world.core.picture(wire.Look(request=1, branches=9), 0.0)
    assert (seen.tenants, seen.tenant_quota) == ({"a": 6}, 10)


def usage_of_its_end(world: Scheduled, branch: int) -> wire.TurnUsage:
    return next(said.usage for said in reversed(world.heard) if isinstance(said, wire.TurnEnded))


@pytest.mark.parametrize("how", [wire.Cancel(request=1, branch=1, cut=0), wire.Close(request=1, branch=1)])
def test_a_turn_that_ends_before_its_prompt_is_computed_costs_what_was_computed(how: wire.Command) -> None:
    world = Scheduled(pages=20, context_limit=60, prefill_chunk=8, extend_tokens=1)
    branch = world.open(range(44))
    assert isinstance(world.start(branch, most=1), wire.Done)
    _ = world.step()
    _ = world.send(wire.Fork(request=1, branch=branch, n=1))  # live: it goes back into the queue
    assert world.core.world.queue
    _ = world.send(how)
    usage = usage_of_its_end(world, branch)
    assert (usage.new, usage.recomputed) == (8, 0)


def test_rows_that_a_prompt_computes_again_after_it_lost_them_are_told_apart_from_those_it_computed_first() -> None:
    world = Scheduled(pages=20, context_limit=60, prefill_chunk=8, extend_tokens=1)
    branch = world.open(range(44))
    assert isinstance(world.start(branch, most=1), wire.Done)
    for _ in range(3):
        _ = world.step()
    _ = world.send(wire.Fork(request=1, branch=branch, n=1))
    _ = world.send(wire.Close(request=1, branch=2))
    world.core.world.rankings = Rankings()
    assert reclaim(world.core.world, 20, world.now), "all that rests is gone"
    for _ in range(2):
        _ = world.step()
    _ = world.send(wire.Cancel(request=1, branch=branch, cut=0))
    usage = usage_of_its_end(world, branch)
    assert (usage.new, usage.recomputed) == (24, 16)

"""Firm leases never hold more than F, whatever becomes of the branches that have them."""

from __future__ import annotations

from agentspeed_engine.ids import BranchId
from agentspeed_engine.kv.tree import upward
from agentspeed_engine.protocol import messages as wire
from agentspeed_engine.protocol.token_ids import pack_ids
from tests.support.scheduled import Scheduled


def held(scheduled: Scheduled) -> int:
    """Pages no running turn can have because of firm leases, counted once each."""
    world = scheduled.core.world
    branches = [world.states[number].branch for number in world.firm]
    ends = [end for branch in branches for end in (branch.leaf, branch.seed) if end is not None]
    return sum(len(node.pages) for node in {node.id: node for end in ends for node in upward(end)}.values())


def firm(scheduled: Scheduled, branch: int) -> wire.Lease:
    answered = scheduled.send(wire.Expect(request=1, branch=branch, seconds=1000.0, keep="firm"))
    assert isinstance(answered, wire.LeaseAnswer)
    return answered.lease


def forked(scheduled: Scheduled, branch: int) -> int:
    reply = scheduled.send(wire.Fork(request=1, branch=branch, n=1))
    assert isinstance(reply, wire.Forked)
    scheduled.logs[reply.branches[0]] = list(scheduled.logs[branch])
    return reply.branches[0]


def test_a_trunk_under_a_firm_lease_that_adopts_a_longer_child_stays_within_the_budget() -> None:
    scheduled = Scheduled(pages=13, context_limit=32, firm_pages=4)
    for first in (10, 40):
        trunk = scheduled.open()
        _ = scheduled.turn(trunk, [first, 2, 3])
        assert firm(scheduled, trunk).keep == "firm"
        child = forked(scheduled, trunk)
        _ = scheduled.turn(child, range(first, first + 12), most=3)
        assert isinstance(scheduled.send(wire.Adopt(request=1, branch=trunk, child=child)), wire.Done)
        assert held(scheduled) <= 4
    long = scheduled.open()
    assert scheduled.turn(long, range(60, 88), most=4).drawn == 4, "a turn of the whole context has its pages"


def test_a_lease_that_an_adoption_outgrows_turns_soft_and_its_holder_hears_why() -> None:
    scheduled = Scheduled(pages=13, context_limit=32, firm_pages=3)
    trunk = scheduled.open()
    _ = scheduled.turn(trunk, [1, 2, 3])
    assert firm(scheduled, trunk).keep == "firm"
    child = forked(scheduled, trunk)
    _ = scheduled.turn(child, range(20, 36), most=3)
    scheduled.heard.clear()
    _ = scheduled.send(wire.Adopt(request=1, branch=trunk, child=child))
    changed = [said.lease for said in scheduled.heard if isinstance(said, wire.LeaseChanged)]
    assert [lease.keep for lease in changed] == ["soft"]
    assert "firm budget" in changed[0].why
    assert BranchId(trunk) not in scheduled.core.world.firm


def test_a_firm_lease_counts_the_rows_between_leaf_and_seed() -> None:
    scheduled = Scheduled(pages=20, context_limit=40, firm_pages=6)
    first = scheduled.open()
    _ = scheduled.turn(first, range(1, 36), most=2)
    second, third = forked(scheduled, first), forked(scheduled, first)
    for branch, tokens in ((second, 6), (third, 18)):
        assert isinstance(scheduled.send(wire.Rewind(request=1, branch=branch, tokens=tokens)), wire.Done)
    lease = firm(scheduled, second)
    assert held(scheduled) <= 6, lease.why


def told(scheduled: Scheduled) -> list[wire.Lease]:
    return [said.lease for said in scheduled.heard if isinstance(said, wire.LeaseChanged)]


def test_a_firm_lease_that_follows_one_that_has_just_ended_is_not_called_ended() -> None:
    scheduled = Scheduled(pages=13, firm_pages=4)
    branch = scheduled.open()
    _ = scheduled.turn(branch, [1, 2, 3])
    assert firm(scheduled, branch).keep == "firm"
    scheduled.heard.clear()
    scheduled.now = 2000.0
    assert firm(scheduled, branch).keep == "firm"
    assert told(scheduled) == []


def test_the_end_of_a_firm_lease_is_told_when_it_comes_though_nothing_else_happens() -> None:
    scheduled = Scheduled(pages=13, firm_pages=4)
    branch = scheduled.open()
    _ = scheduled.turn(branch, [1, 2, 3])
    assert firm(scheduled, branch).keep == "firm"
    scheduled.heard.clear()
    wake = scheduled.core.wake_at(0.0)
    assert wake == 1000.0
    scheduled.now = wake
    _ = scheduled.step()
    (lease,) = told(scheduled)
    assert lease.keep == "soft" and "has ended" in lease.why
    assert scheduled.core.wake_at(wake) is None


def test_a_lease_over_a_log_of_the_same_length_and_other_ids_says_that_its_log_has_changed() -> None:
    scheduled = Scheduled(pages=20, context_limit=32)
    trunk = scheduled.open()
    _ = scheduled.turn(trunk, range(1, 13))
    _ = scheduled.send(wire.Expect(request=1, branch=trunk, seconds=50.0))
    reply = scheduled.send(wire.Fork(request=1, branch=trunk, n=1, at=5))
    assert isinstance(reply, wire.Forked)
    ids = pack_ids(list(range(20, 28)))
    assert isinstance(scheduled.send(wire.Append(request=1, branch=reply.branches[0], ids=ids)), wire.Done)
    scheduled.heard.clear()
    assert isinstance(scheduled.send(wire.Adopt(request=1, branch=trunk, child=reply.branches[0])), wire.Done)
    assert [lease.why for lease in told(scheduled)] == ["its log has changed"]


def test_a_turn_that_only_prefills_and_has_nothing_to_do_keeps_every_row() -> None:
    scheduled = Scheduled(pages=13, firm_pages=4)
    branch = scheduled.open()
    _ = scheduled.turn(branch, range(1, 13))
    assert isinstance(scheduled.send(wire.Rewind(request=1, branch=branch, tokens=8)), wire.Done)
    del scheduled.logs[branch][8:]
    before = scheduled.residence(branch)
    assert scheduled.turn(branch, most=0).recomputed == 0
    assert scheduled.residence(branch) == before and before.lost == 0
    assert firm(scheduled, branch).keep == "firm"

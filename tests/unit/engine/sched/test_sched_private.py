"""A private session leaves nothing behind, whatever it rewound, cancelled or had on its way to the host."""

from __future__ import annotations

from collections.abc import ValuesView

from agentspeed_engine.ids import BranchId
from agentspeed_engine.kv.branch import Branch
from agentspeed_engine.protocol import messages as wire
from agentspeed_engine.sched.redaction import Clear
from agentspeed_engine.sched.state_codec import packed, unpacked
from tests.support.scheduled import LINK, Scheduled


def closed(scheduled: Scheduled, branch: int) -> None:
    assert isinstance(scheduled.send(wire.Close(request=1, branch=branch)), wire.Done)


def test_rows_a_private_session_went_back_from_end_with_it() -> None:
    scheduled = Scheduled()
    branch = scheduled.open(private=True)
    _ = scheduled.turn(branch, range(1, 14), most=3)
    assert isinstance(scheduled.send(wire.Rewind(request=1, branch=branch, tokens=5)), wire.Done)
    del scheduled.logs[branch][5:]
    closed(scheduled, branch)
    assert scheduled.core.counts()["nodes"] == 0
    assert scheduled.core.counts()["pages_free"] == scheduled.core.config.pages


def test_rows_of_a_private_session_on_their_way_to_the_host_end_when_the_copy_does() -> None:
    scheduled = Scheduled(pages=12, host_slots=12)
    branch = scheduled.open(private=True)
    _ = scheduled.turn(branch, range(1, 22), most=3)
    scheduled.host = None
    other = scheduled.open()
    _ = scheduled.start(other, range(30, 52), most=1)
    orders = []
    while not orders:
        assert scheduled.step() or scheduled.copies
        orders, scheduled.copies = scheduled.copies, []
    closed(scheduled, branch)
    for order in orders:
        scheduled.device.copy(order)
        scheduled.hear(scheduled.core.copied(order.ticket, True, scheduled.now))
        scheduled.core.check()
    private = [node for node in scheduled.core.world.kv.tree.nodes.values() if node.root[2].partition("\0")[2]]
    assert private == []


def test_an_engine_forgets_the_roots_of_private_sessions() -> None:
    scheduled = Scheduled()
    for _ in range(3):
        branch = scheduled.open(private=True)
        _ = scheduled.turn(branch, [1, 2, 3])
        closed(scheduled, branch)
    assert len(scheduled.core.world.kv.tree.roots) == 0


class LookedAt(dict[BranchId, Branch]):
    """Counts the branches that are gone through."""

    count = 0

    def values(self) -> ValuesView[Branch]:
        self.count += len(self)
        return super().values()


def test_the_end_of_a_private_branch_looks_at_no_other_branch() -> None:
    scheduled = Scheduled(pages=60, max_sessions=50)
    for first in range(20):
        branch = scheduled.open([first, first + 1, first + 2, first + 3], private=True)
        assert isinstance(scheduled.send(wire.Fork(request=1, branch=branch, n=2)), wire.Forked)
    branches = scheduled.core.world.kv.branches = LookedAt(scheduled.core.world.kv.branches)
    _ = scheduled.core.drop_link(LINK, 0.0)
    assert branches.count == 0
    assert scheduled.core.counts()["branches"] == 0
    scheduled.core.check()


def private_family() -> tuple[Scheduled, int, int]:
    """A private session with rows that nobody refers to, and a child of it."""
    scheduled = Scheduled()
    trunk = scheduled.open(private=True)
    _ = scheduled.turn(trunk, range(1, 14), most=3)
    forked = scheduled.send(wire.Fork(request=1, branch=trunk, n=1))
    assert isinstance(forked, wire.Forked)
    child = forked.branches[0]
    scheduled.logs[child] = list(scheduled.logs[trunk])
    for branch in (trunk, child):
        assert isinstance(scheduled.send(wire.Rewind(request=1, branch=branch, tokens=5)), wire.Done)
        del scheduled.logs[branch][5:]
    return scheduled, trunk, child


def test_rows_of_a_private_session_stay_until_its_last_branch_ends() -> None:
    scheduled, trunk, child = private_family()
    closed(scheduled, trunk)
    scheduled.core.check()
    assert scheduled.core.counts()["nodes"] > 0
    closed(scheduled, child)
    assert scheduled.core.counts()["nodes"] == 0


def test_an_adopted_child_is_a_branch_less_of_its_private_session() -> None:
    scheduled, trunk, _ = private_family()
    child = scheduled.send(wire.Fork(request=1, branch=trunk, n=1))
    assert isinstance(child, wire.Forked)
    assert isinstance(scheduled.send(wire.Adopt(request=1, branch=trunk, child=child.branches[0])), wire.Done)
    scheduled.core.check()
    assert list(scheduled.core.world.kv.private.values()) == [2]
    _ = scheduled.core.drop_link(LINK, 0.0)
    assert scheduled.core.counts()["nodes"] == 0


def test_a_private_session_ends_whole_after_its_engine_was_put_back_or_replayed() -> None:
    scheduled, trunk, child = private_family()
    core = scheduled.core
    taken = core.snapshot()
    recorded = unpacked(packed(core.world, Clear()), core.config)
    for world in (taken, recorded):
        core.restore(world)
        core.check()
        for branch in (trunk, child):
            closed(scheduled, branch)
        assert core.counts()["nodes"] == 0
        assert core.world.kv.private == {}

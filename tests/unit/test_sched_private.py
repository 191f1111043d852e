"""A private session leaves nothing behind, whatever it rewound, cancelled or had on its way to the host."""

from __future__ import annotations

from agentspeed_engine import wire
from tests.scheduled import Scheduled


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

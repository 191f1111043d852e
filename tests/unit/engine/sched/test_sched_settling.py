"""What several orders to one branch in flight come to when its last row is acknowledged."""

from __future__ import annotations

from agentspeed_engine.protocol import messages as wire
from agentspeed_engine.protocol.token_ids import pack_ids
from tests.support.scheduled import LINK, Scheduled


def test_children_of_a_turn_that_is_then_cut_back_are_told_what_they_know() -> None:
    scheduled = Scheduled(depth=1)
    trunk = scheduled.open([1, 2, 3])
    _ = scheduled.start(trunk, [4, 5], most=3)
    plan = scheduled.core.plan(0.0)
    assert plan is not None
    scheduled.hear(scheduled.core.events())
    assert scheduled.core.handle(LINK, wire.Fork(request=2, branch=trunk, n=1), 0.0) == []
    assert scheduled.core.handle(LINK, wire.Cancel(request=3, branch=trunk, cut=3), 0.0) == []
    result = scheduled.device.execute(plan, {trunk: scheduled.logs[trunk]})
    said = [message for _, message in scheduled.core.apply(result, 0.0)]
    forked = next(message for message in said if isinstance(message, wire.Forked))
    ended = next(message for message in said if isinstance(message, wire.TurnEnded))
    cancelled = next(message for message in said if isinstance(message, wire.Done))
    child = scheduled.send(wire.Append(request=4, branch=forked.branches[0], ids=pack_ids([])))
    assert isinstance(child, wire.Done)
    assert forked.known == child.known == 5
    assert ended.known == cancelled.known == 3
    assert said.index(forked) < said.index(ended), "a front cuts its mirror at the end of the turn"


def test_children_that_are_due_when_their_client_dies_are_not_born() -> None:
    scheduled = Scheduled(depth=1)
    trunk = scheduled.open([1, 2, 3])
    _ = scheduled.start(trunk, [4, 5], most=3)
    plan = scheduled.core.plan(0.0)
    assert plan is not None
    scheduled.hear(scheduled.core.events())
    assert scheduled.core.handle(LINK, wire.Fork(request=2, branch=trunk, n=2), 0.0) == []
    assert scheduled.core.drop_link(LINK, 0.0) == []
    _ = scheduled.core.apply(scheduled.device.execute(plan, {trunk: scheduled.logs[trunk]}), 0.0)
    scheduled.core.check()
    counts = scheduled.core.counts()
    assert counts["branches"] == counts["sessions"] == 0

"""Which turns a plan tells the worker to forget: those it may know something of, each once."""

from __future__ import annotations

from agentspeed_engine.protocol import messages as wire
from tests.support.scheduled import LINK, Scheduled


def test_turns_that_no_step_computed_leave_nothing_behind_while_no_step_runs() -> None:
    world = Scheduled()
    branch = world.open(range(1, 9))
    _ = world.turn(branch, most=0)
    kept = len(world.core.world.ended)
    for _ in range(50):
        assert world.turn(branch, most=0).new == 0, "its rows are all there"
        _ = world.start(branch, (5,))
        _ = world.send(wire.Cancel(request=1, branch=branch, cut=8))
    assert len(world.core.world.ended) == kept <= 1


def test_a_worker_is_told_of_a_turn_that_was_cancelled_before_its_first_draw_came_back() -> None:
    world = Scheduled()
    branch = world.open(range(1, 9))
    assert isinstance(world.start(branch, most=3), wire.Done)
    plan = world.core.plan(0.0)
    assert plan is not None
    (row,) = plan.rows
    assert row.sample is not None
    world.hear(world.core.events())
    assert world.core.handle(LINK, wire.Cancel(request=2, branch=branch), 0.0) == []
    world.hear(world.core.apply(world.device.execute(plan, {branch: world.logs[branch]}), 0.0))
    assert isinstance(world.start(branch), wire.Done)
    following = world.core.plan(0.0)
    assert following is not None
    assert following.ended == (row.sample.turn,)


def test_a_worker_is_told_of_every_turn_that_drew_once() -> None:
    world = Scheduled()
    told: list[int] = []
    branch = world.open(range(1, 6))
    for _ in range(4):
        assert isinstance(world.start(branch, (5,), most=2), wire.Done)
        while (plan := world.core.plan(0.0)) is not None:
            told += plan.ended
            world.hear(world.core.events())
            world.hear(world.core.apply(world.device.execute(plan, {branch: world.logs[branch]}), 0.0))
    assert told == [1, 2, 3]
    assert world.core.world.ended == [4], "with the next step"

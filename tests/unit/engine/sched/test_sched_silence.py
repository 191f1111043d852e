"""Since when a branch counts as silent: what the pauses learnt, and who loses rows first, are computed from."""

from __future__ import annotations

import pytest

from agentspeed_engine.protocol import messages as wire
from tests.support.scheduled import Scheduled


def rested() -> tuple[Scheduled, int]:
    """A branch whose only turn ended at 0."""
    world = Scheduled(pages=20, context_limit=48)
    branch = world.open(range(1, 9))
    _ = world.turn(branch)
    return world, branch


def forked(world: Scheduled, branch: int) -> int:
    reply = world.send(wire.Fork(request=1, branch=branch, n=1))
    assert isinstance(reply, wire.Forked)
    (child,) = reply.branches
    world.logs[child] = list(world.logs[branch])
    return child


def learnt(world: Scheduled, branch: int) -> float:
    """The pause that a turn beginning now teaches."""
    law = world.core.world.law = type(world.core.world.law)()
    assert isinstance(world.start(branch, (6,)), wire.Done)
    pause = law.quantile(0.5)
    assert pause is not None
    return pause


def around(seconds: float) -> object:
    """A law of pauses knows them within a fifth or so."""
    return pytest.approx(seconds, rel=0.25)


def test_a_trunk_is_silent_since_the_child_it_adopted_computed() -> None:
    world, trunk = rested()
    child = forked(world, trunk)
    world.now = 600.0
    _ = world.turn(child, (50, 51))
    assert isinstance(world.send(wire.Adopt(request=1, branch=trunk, child=child)), wire.Done)
    world.now = 601.0
    assert learnt(world, trunk) == around(1.0)


def test_a_trunk_that_computed_later_than_the_child_it_adopts_stays_as_it_was() -> None:
    world, trunk = rested()
    world.now = 600.0
    _ = world.turn(trunk)
    child = forked(world, trunk)
    assert isinstance(world.send(wire.Adopt(request=1, branch=trunk, child=child)), wire.Done)
    assert world.core.world.kv.branches[trunk].rested_at == 600.0  # type: ignore[index]


@pytest.mark.parametrize("policy", ["next_use", "lru"])
def test_rows_that_a_trunk_took_over_just_now_are_kept_like_rows_it_computed_itself(policy: str) -> None:
    world = Scheduled(pages=20, context_limit=48, policy=policy)
    trunk = world.open(range(1, 20))
    _ = world.turn(trunk)
    world.now = 540.0
    other = world.open(range(30, 54))
    _ = world.turn(other)
    world.now = 600.0
    child = forked(world, trunk)
    _ = world.turn(child, (50, 51, 52, 53))
    assert isinstance(world.send(wire.Adopt(request=1, branch=trunk, child=child)), wire.Done)
    world.now = 601.0
    _ = world.turn(world.open(range(60, 95)))
    assert world.residence(trunk).device == 24, "all that is computed of it"
    assert world.residence(other).device == 20


@pytest.mark.parametrize("cut", [None, 3])
def test_waiting_in_the_queue_for_a_turn_that_is_cancelled_is_no_pause(cut: int | None) -> None:
    world, branch = rested()
    world.now = 10.0
    assert isinstance(world.start(branch, (5,)), wire.Done)
    world.now = 400.0
    assert isinstance(world.send(wire.Cancel(request=1, branch=branch, cut=cut)), wire.TurnEnded)
    world.now = 401.0
    assert learnt(world, branch) == around(1.0)


def test_waiting_in_the_queue_for_a_turn_with_nothing_to_fill_is_no_pause() -> None:
    world, branch = rested()
    world.now = 10.0
    assert isinstance(world.start(branch, most=0), wire.Done)
    world.now = 400.0
    world.run()
    world.now = 401.0
    assert learnt(world, branch) == around(1.0)


def test_a_child_of_a_turn_in_the_queue_is_silent_since_its_birth() -> None:
    world, branch = rested()
    world.now = 10.0
    assert isinstance(world.start(branch, (5,)), wire.Done)
    world.now = 400.0
    child = forked(world, branch)
    world.now = 401.0
    assert learnt(world, child) == around(1.0)

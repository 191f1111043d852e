"""Who loses rows first is found without looking at everybody, and is who it would be if everybody were looked at."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest

from agentspeed_engine.ids import BranchId
from agentspeed_engine.kv.tree import Node, tenant_of
from agentspeed_engine.protocol import messages as wire
from agentspeed_engine.sched import reclaim
from agentspeed_engine.sched.policy import needed_in
from agentspeed_engine.sched.ranking import Key, Ranking
from agentspeed_engine.sched.state import SchedulerState
from tests.support.any_command import any_command
from tests.support.scheduled import Scheduled

TENANTS = ("a", "b")


@contextmanager
def compared_with_everybody() -> Iterator[list[str]]:
    """Wherever the core asks who goes first, all nodes are asked for their key too. Yields what was asked for."""
    asked: list[str] = []
    first, next_victim = Ranking.first, reclaim.next_victim

    def checked(self: Ranking) -> Any:
        found = first(self)
        key: Any = self._key
        world = key.args[0]
        of = next((tenant for tenant, one in world.rankings.victims.items() if one is self), None)
        nodes = [node for node in world.kv.tree.nodes.values() if of in (None, tenant_of(node.root))]
        keys = [(rank, -node.id) for node in nodes if (rank := key(node)) is not None]
        best = max(keys, default=None)
        assert (None if found is None else (found[0], -found[1].id)) == best
        asked.append(key.func.__name__ if of is None else "of one tenant")
        return found

    def whole_branches(world: SchedulerState, tenant: str | None, now: float) -> Node | None:
        losing = world.rankings.losing if world.rankings else frozenset[BranchId]()
        found = next_victim(world, tenant, now)
        if world.rankings:
            world.rankings.moved(world.rankings.left)  # it is ranked only once it is passed over
        ranked = reclaim._victims(world, tenant, now).first()
        if found is not (None if ranked is None else ranked[1]):
            assert found is not None and losing and reclaim._held_below(found) == losing
            asked.append("what is left of it")
        return found

    with mock.patch.object(Ranking, "first", checked), mock.patch.object(reclaim, "next_victim", whole_branches):
        yield asked


@pytest.mark.parametrize("policy", ["next_use", "lru", "ttl", "min_waste"])
@pytest.mark.parametrize("slots", [0, 5, 40])
def test_the_order_of_victims_is_the_one_that_looking_at_everybody_gives(policy: str, slots: int) -> None:
    with compared_with_everybody() as asked:
        for seed in range(8):
            chance = random.Random(f"{policy} {slots} {seed}")
            world = Scheduled(
                pages=18,
                firm_pages=4,
                host_slots=slots,
                policy=policy,
                max_sessions=12,
                tenant_pages=chance.choice((None, 10)),
            )
            for _ in range(150):
                if chance.random() < 0.5:
                    any_command(world, chance, TENANTS)
                else:
                    _ = world.step()
                    world.host = chance.random() < 0.9
                    world.settle_copies()
                    world.now += chance.choice((0.0, 0.1, 3.0))
    assert asked.count("_victim_key") > 50 and asked.count("of one tenant") > 10
    assert slots != 5 or "_host_key" in asked
    assert policy != "min_waste" or "what is left of it" in asked


@pytest.mark.parametrize("tenant_pages", [None, 20])
def test_rows_below_which_a_child_ended_are_ranked_like_any(tenant_pages: int | None) -> None:
    world = Scheduled(pages=60 if tenant_pages else 20, context_limit=48, prefill_chunk=16, tenant_pages=tenant_pages)
    trunk = world.open(range(1, 25), tenant="a")
    _ = world.turn(trunk)
    end_a_child(world, trunk)
    late = world.open(range(30, 54), tenant="a")
    _ = world.turn(late)
    for session, seconds in ((trunk, 1.0), (late, 3600.0)):
        _ = world.send(wire.Expect(request=1, branch=session, seconds=seconds))
    _ = world.turn(world.open(range(60, 95), tenant="a"))
    assert world.residence(trunk).device == 24, "all but the last row, which is drawn from"
    assert 0 < world.residence(late).device < 24


def test_rows_that_nobody_has_go_before_those_a_branch_has_wherever_they_are() -> None:
    world = Scheduled(pages=20, context_limit=48, prefill_chunk=16)
    trunk = world.open(range(1, 25))
    _ = world.turn(trunk)
    end_a_child(world, trunk)
    world.now += 1
    gone = world.open(range(30, 54))
    _ = world.turn(gone)
    _ = world.send(wire.Close(request=1, branch=gone))
    world.now += 1
    _ = world.turn(world.open(range(60, 95)))
    assert world.residence(trunk).device == 24


def test_a_branch_that_has_begun_to_go_is_taken_up_to_where_one_that_is_needed_soon_has_its_rows_too() -> None:
    world = Scheduled(pages=19, context_limit=48, prefill_chunk=16)
    trunk = world.open(range(1, 25))
    _ = world.turn(trunk)
    child = world.send(wire.Fork(request=1, branch=trunk, n=1)).branches[0]
    world.logs[child] = list(world.logs[trunk])
    _ = world.turn(child, (90, 91, 92, 93, 94))
    late = world.open(range(30, 54))
    _ = world.turn(late)
    for session, seconds in ((trunk, 1.0), (late, 3600.0), (child, 7200.0)):
        _ = world.send(wire.Expect(request=1, branch=session, seconds=seconds))
    _ = world.turn(world.open(range(60, 95)))
    assert world.residence(child).device == 24, "what it has of its own went first"
    assert world.residence(trunk).device == 24
    assert 0 < world.residence(late).device < 24


def end_a_child(world: Scheduled, trunk: BranchId) -> None:
    """Leaves rows below the trunk's end that no branch has any more."""
    child = world.send(wire.Fork(request=1, branch=trunk, n=1)).branches[0]
    world.logs[child] = list(world.logs[trunk])
    _ = world.turn(child, (90, 91, 92, 93, 94))
    _ = world.send(wire.Close(request=1, branch=child))


class Ranked:
    """Enough of one to be ranked."""

    def __init__(self, number: int) -> None:
        self.id = number
        self.rank: float | None = float(number % 7)


def test_a_ranking_finds_keys_that_shrank_by_itself_and_others_when_told() -> None:
    chance = random.Random(3)
    nodes = [Ranked(number) for number in range(60)]

    def key(node: Any) -> Key | None:
        return None if node.rank is None else (0, node.rank)

    ranking: Any = Ranking(nodes, key)  # type: ignore[arg-type]
    assert list(ranking.as_made()) == list(ranking.candidates())
    for _ in range(400):
        node = chance.choice(nodes)
        was, node.rank = node.rank, chance.choice((None, chance.uniform(-9.0, 9.0), -9.0))
        if node.rank is not None and (was is None or node.rank > was):
            ranking.again(node)
        left = [one for one in nodes if one.rank is not None]
        order = sorted(left, key=lambda one: (-(one.rank or 0.0), one.id))
        found = ranking.first()
        assert (None if found is None else found[1]) is (order[0] if order else None)
    assert [node for _, node in ranking.candidates()] == order


def test_making_room_asks_about_each_resting_session_about_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    world = Scheduled(pages=900, context_limit=2000, prefill_chunk=4000, max_sessions=400)
    chance = random.Random(1)
    for _ in range(200):
        session = world.open([chance.randrange(90) for _ in range(14)])
        _ = world.turn(session)
        _ = world.send(wire.Expect(request=1, branch=session, seconds=chance.uniform(1.0, 100.0)))
    asked = 0

    def counted(expected: float, waiting: int | None) -> float:
        nonlocal asked
        asked += 1
        return needed_in(expected, waiting)

    monkeypatch.setattr(reclaim, "needed_in", counted)
    needs_all = world.open([chance.randrange(90) for _ in range(1900)])
    assert isinstance(world.start(needs_all), wire.Done)
    before = world.core.counts()["pages_evicted"]
    _ = world.step()
    assert world.core.counts()["pages_evicted"] - before > 300, "about every second session had to go"
    assert 0 < asked < 200 * 3
    assert BranchId(needs_all) in world.core.world.states

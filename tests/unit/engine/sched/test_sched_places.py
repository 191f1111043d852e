"""Sessions that have begun go on at their places and with their rows, where places are kept."""

from __future__ import annotations

import random

import pytest

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.protocol import messages as wire
from agentspeed_engine.protocol.token_ids import pack_ids
from agentspeed_engine.sched import places
from agentspeed_engine.sched.config import CoreConfig
from tests.support.scheduled import Scheduled

KEPT = {"turns_in_place": 3}


def one_draws_and_one_waits(pause: float = 0.0, **options: object) -> tuple[Scheduled, int, int]:
    """One session draws all the time, a second has ended its turn, and a third waits: it does not fit beside both."""
    world = Scheduled(pages=14, context_limit=48, prefill_chunk=64, **options)
    draws, goes_on, waits = world.open(range(1, 5)), world.open(range(5, 25)), world.open(range(30, 58))
    assert isinstance(world.start(draws, most=40), wire.Done)
    assert isinstance(world.start(goes_on, most=2), wire.Done)
    assert isinstance(world.start(waits, most=2), wire.Done)
    while not ended(world, goes_on):
        _ = world.step()
    world.now += pause
    return world, goes_on, waits


def ended(world: Scheduled, branch: int) -> list[wire.TurnUsage]:
    return [said.usage for said in world.heard if isinstance(said, wire.TurnEnded) and said.branch == branch]


def started(world: Scheduled, branch: int) -> bool:
    return any(isinstance(said, wire.TurnStarted) and said.branch == branch for said in world.heard)


def test_who_goes_on_at_once_finds_its_rows_and_goes_first() -> None:
    world, goes_on, waits = one_draws_and_one_waits(**KEPT)
    for _ in range(3):
        _ = world.step()  # nobody takes them while it is away

    assert isinstance(world.start(goes_on, [60, 61], most=2), wire.Done)
    while len(ended(world, goes_on)) < 2:
        _ = world.step()

    assert ended(world, goes_on)[-1].recomputed <= 1
    assert not started(world, waits)


def test_where_places_are_not_kept_it_goes_to_the_end_and_its_rows_make_room() -> None:
    world, goes_on, waits = one_draws_and_one_waits()
    _ = world.step()

    assert started(world, waits)
    assert isinstance(world.start(goes_on, [60, 61], most=2), wire.Done)
    world.run()
    assert ended(world, goes_on)[-1].recomputed > 4


def test_after_a_longer_pause_the_rows_have_made_room_and_the_place_is_kept() -> None:
    world, goes_on, waits = one_draws_and_one_waits(places.SECONDS + 0.01, **KEPT)
    _ = world.step()
    assert started(world, waits)

    last = world.open(range(60, 80))
    assert isinstance(world.start(last, most=2), wire.Done)
    assert isinstance(world.start(goes_on, [60, 61], most=2), wire.Done)
    while len(ended(world, goes_on)) < 2:
        _ = world.step()

    assert not started(world, last)


def test_who_announced_a_longer_pause_gives_its_rows_up_at_once() -> None:
    world, goes_on, waits = one_draws_and_one_waits(**KEPT)
    _ = world.send(wire.Expect(request=1, branch=goes_on, seconds=600.0, tool="build", keep="soft"))

    _ = world.step()

    assert started(world, waits)


def test_a_place_is_kept_for_so_many_turns_and_no_more() -> None:
    world, goes_on, waits = one_draws_and_one_waits(**KEPT)
    for turn in (2, 3):
        assert isinstance(world.start(goes_on, [60], most=1), wire.Done)
        while len(ended(world, goes_on)) < turn:
            _ = world.step()
    assert not started(world, waits)

    assert isinstance(world.start(goes_on, [60], most=1), wire.Done)
    while not ended(world, waits):
        _ = world.step()

    assert len(ended(world, goes_on)) == 3


def test_a_session_that_is_closed_keeps_no_place() -> None:
    world, goes_on, waits = one_draws_and_one_waits(**KEPT)
    _ = world.send(wire.Close(request=1, branch=goes_on))

    _ = world.step()

    assert started(world, waits)


def test_forks_are_of_the_place_of_their_session_and_use_it_up() -> None:
    world, goes_on, waits = one_draws_and_one_waits(**KEPT)
    forked = world.send(wire.Fork(request=1, branch=goes_on, n=2))
    assert isinstance(forked, wire.Forked)
    for child in forked.branches:
        world.logs[child] = world.logs[goes_on].copy()
        assert isinstance(world.start(child, [60], most=1), wire.Done)
        while not ended(world, child):
            _ = world.step()
    assert not started(world, waits)

    assert isinstance(world.start(goes_on, [60], most=1), wire.Done)
    while not ended(world, waits):
        _ = world.step()

    assert len(ended(world, goes_on)) == 1


@pytest.mark.parametrize("bound", ["pages", "tenant_pages"])
@pytest.mark.parametrize("pages", range(9, 14))
def test_turns_of_one_place_that_do_not_fit_beside_each_other_end_one_after_the_other(pages: int, bound: str) -> None:
    world = Scheduled(**{"pages": 40, bound: pages}, context_limit=32, **KEPT)
    trunk = world.open(range(1, 9))
    _ = world.turn(trunk)
    forked = world.send(wire.Fork(request=1, branch=trunk, n=2))
    assert isinstance(forked, wire.Forked)
    for child in forked.branches:
        world.logs[child] = world.logs[trunk].copy()
        assert isinstance(world.start(child, [60 + child], most=22), wire.Done)

    world.run()

    assert [ended(world, child)[0].drawn for child in forked.branches] == [22, 22]


def visits(world: Scheduled, count: int, turns: int) -> None:
    """So many sessions one after the other, each of so many turns that add 9 tokens, and gone."""
    for number in range(count):
        branch = world.open([number + 1])
        for turn in range(turns):
            _ = world.turn(branch, [number + 1] * 4 if turn else [], most=5)
        _ = world.send(wire.Close(request=1, branch=branch))


@pytest.mark.parametrize(("turns", "enters"), [(1, True), (3, False)])
def test_who_begins_is_let_in_where_there_is_room_for_what_others_will_yet_add(turns: int, enters: bool) -> None:
    world = Scheduled(pages=13, context_limit=48, prefill_chunk=64, **KEPT)
    visits(world, 4, turns)
    runs, comes = world.open(range(40, 60)), world.open(range(60, 80))
    assert isinstance(world.start(runs, most=5), wire.Done)
    _ = world.step()

    assert isinstance(world.start(comes, most=1), wire.Done)
    _ = world.step()

    assert started(world, comes) is enters
    world.run()
    assert ended(world, comes)


def test_a_turn_that_is_made_ready_for_keeps_its_rows_meanwhile() -> None:
    world, goes_on, waits = one_draws_and_one_waits(prepares=True, **KEPT)
    command = wire.Generate(request=1, branch=goes_on, ids=pack_ids([60, 61]), max_tokens=2, stop_strings=(b"x",))
    assert isinstance(world.send(command), wire.Done)
    world.logs[goes_on] += [60, 61]
    for _ in range(6):
        _ = world.step()
    assert not started(world, waits)

    for spec in world.core.preparations():
        world.hear(world.core.prepared(spec.turn, None, world.now))
    while len(ended(world, goes_on)) < 2:
        _ = world.step()

    assert ended(world, goes_on)[-1].recomputed <= 1


def test_who_was_not_let_in_is_to_enter_again_and_teaches_nothing() -> None:
    world = Scheduled(pages=13, context_limit=48, prefill_chunk=64, **KEPT)
    visits(world, 4, 3)
    learnt = world.core.world.growth.snapshot()
    runs, comes = world.open(range(40, 60)), world.open(range(60, 80))
    assert isinstance(world.start(runs, most=5), wire.Done)
    _ = world.step()
    assert isinstance(world.start(comes, most=1), wire.Done)
    _ = world.step()
    _ = world.send(wire.Cancel(request=1, branch=comes))

    assert isinstance(world.start(comes, most=1), wire.Done)
    _ = world.step()

    assert not started(world, comes)
    _ = world.send(wire.Close(request=1, branch=comes))
    assert world.core.world.growth.snapshot() == learnt


def test_of_a_visit_that_is_left_while_its_turns_run_nothing_is_learnt() -> None:
    world = Scheduled(pages=40, **KEPT)
    visits(world, 4, 3)
    learnt = world.core.world.growth.to_come(0)
    trunk = world.open(range(40, 44))
    forked = world.send(wire.Fork(request=1, branch=trunk, n=5))
    assert isinstance(forked, wire.Forked)
    for child in forked.branches:
        world.logs[child] = world.logs[trunk].copy()
        assert isinstance(world.start(child, [60 + child], most=1), wire.Done)

    assert world.core.world.growth.to_come(0) == learnt


def test_what_a_session_has_added_already_is_not_waited_for() -> None:
    world = Scheduled(pages=27, context_limit=80, prefill_chunk=64, turns_in_place=8)
    visits(world, 4, 6)
    runs, comes = world.open(range(40, 60)), world.open(range(60, 80))
    _ = world.turn(runs)
    _ = world.turn(runs, [1, 2], most=22)
    assert isinstance(world.start(runs, [1, 2], most=5), wire.Done)
    _ = world.step()

    assert isinstance(world.start(comes, most=1), wire.Done)
    _ = world.step()

    assert started(world, comes)


def test_who_waits_alone_is_let_in_whoever_rests() -> None:
    world = Scheduled(pages=9, context_limit=32, prefill_chunk=64, **KEPT)
    rests, comes = world.open(range(1, 25)), world.open(range(30, 54))
    _ = world.turn(rests)

    assert world.turn(comes).new == 24


@pytest.mark.parametrize("seed", range(6))
def test_every_turn_ends_whatever_comes(seed: int) -> None:
    chance = random.Random(seed)
    world = Scheduled(pages=12, host_slots=chance.choice((0, 8)), turns_in_place=chance.choice((2, 3, 8)))
    branches: list[int] = []
    for _ in range(120):
        roll = chance.random()
        if not branches or (roll < 0.15 and len(branches) < 6):
            branches.append(world.open([chance.randrange(90) for _ in range(chance.randint(1, 8))]))
        elif roll < 0.6:
            ids = [chance.randrange(90) for _ in range(chance.randint(1, 3))]
            _ = world.start(chance.choice(branches), ids, most=chance.randint(1, 3))  # or it is refused: it is busy
        elif roll < 0.9:
            _ = world.step()
            world.settle_copies()
        elif roll < 0.95:
            world.now += chance.choice((0.1, 1.0))
        else:
            gone = branches.pop(chance.randrange(len(branches)))
            _ = world.send(wire.Close(request=1, branch=gone))
    world.run()

    assert world.core.counts()["waiting_turns"] == 0


def test_fewer_turns_than_one_are_refused() -> None:
    with pytest.raises(EngineFault, match="turns_in_place is 0"):
        CoreConfig(pages=12, context_limit=32, vocab_size=97, turns_in_place=0).check()

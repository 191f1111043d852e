"""Each policy's order of victims, where it differs from the others'."""

from __future__ import annotations

from agentspeed_engine.sched.policy import POLICIES, Facts
from agentspeed_engine.sched.ranking import Rankings
from agentspeed_engine.sched.reclaim import reclaim
from tests.support.scheduled import Scheduled

PAUSED = Facts(tokens=100, rested=5.0, expected=30.0, copy_seconds=0.0, recompute_seconds=1e-4)
OLDER_TURN = PAUSED._replace(rested=90.0, expected=0.0, waiting=3)
YOUNGER_TURN = PAUSED._replace(rested=40.0, expected=0.0, waiting=8)


def order(policy: str, *victims: Facts) -> list[Facts]:
    """First to go first; those that never go are left out."""
    ranks = [(rank, victim) for victim in victims if (rank := POLICIES[policy](victim)) is not None]
    return [victim for _, victim in sorted(ranks, key=lambda pair: -pair[0])]


def test_furthest_next_use_takes_from_paused_branches_then_from_the_youngest_turn_that_waits() -> None:
    assert order("next_use", OLDER_TURN, YOUNGER_TURN, PAUSED) == [PAUSED, YOUNGER_TURN, OLDER_TURN]


def test_the_oracle_knows_better_only_about_pauses() -> None:
    told = PAUSED._replace(oracle=0.1)
    assert order("oracle", OLDER_TURN, YOUNGER_TURN, told) == [told, YOUNGER_TURN, OLDER_TURN]
    assert order("oracle", told, PAUSED._replace(expected=1.0, oracle=9.0))[0].oracle == 9.0


def test_lru_takes_what_was_used_longest_ago_even_from_the_turn_that_is_next() -> None:
    assert order("lru", OLDER_TURN, YOUNGER_TURN, PAUSED) == [OLDER_TURN, YOUNGER_TURN, PAUSED]


def test_a_time_to_live_protects_whoever_is_within_it() -> None:
    assert order("ttl", PAUSED._replace(rested=61.0), PAUSED._replace(rested=59.0)) == [
        PAUSED._replace(rested=61.0),
        PAUSED._replace(rested=59.0),
    ]
    late, later = PAUSED._replace(rested=70.0, expected=1.0), PAUSED._replace(rested=20.0, expected=500.0)
    assert order("ttl", later, late) == [late, later]


def test_a_time_to_live_protects_pauses_even_against_turns_that_wait() -> None:
    waits = PAUSED._replace(rested=2.0, expected=0.0, waiting=3)
    assert order("ttl", PAUSED, waits) == [waits, PAUSED]
    assert order("lru", PAUSED, waits) == [PAUSED, waits]


def test_pinned_rows_never_go() -> None:
    assert order("pin", PAUSED, OLDER_TURN) == []
    world = Scheduled(pages=12, policy="pin")
    branch = world.open(range(1, 25))
    _ = world.turn(branch)
    world.core.world.rankings = Rankings()
    assert not reclaim(world.core.world, 12, 50.0)
    assert world.residence(branch).device >= 24


def test_min_waste_weighs_what_is_held_for_nothing_against_the_way_back() -> None:
    short, long = PAUSED._replace(tokens=50_000, expected=0.5), PAUSED._replace(tokens=1000, expected=60.0)
    assert order("min_waste", short, long) == [long, short]
    cheap_copy = short._replace(copy_seconds=1e-7)
    assert order("min_waste", short, cheap_copy) == [cheap_copy, short]

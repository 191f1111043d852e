"""What is learnt of sessions: averages that follow what ends, and what is yet to come."""

from __future__ import annotations

from agentspeed_engine.sched.growth import Growth


def test_nothing_is_expected_before_anything_ended() -> None:
    growth = Growth()

    assert growth.to_come(0) == 0.0


def test_of_an_average_visit_what_is_left_is_expected_and_no_less_than_three_turns() -> None:
    growth = Growth()
    for tokens in (100, 300):
        growth.visit_ended(tokens)
    for tokens in (30, 50):
        growth.turn_ended(tokens)

    assert growth.to_come(0) == 200.0
    assert growth.to_come(50) == 150.0
    assert growth.to_come(5000) == 120.0


def test_before_a_visit_has_ended_a_few_turns_more_are_expected() -> None:
    growth = Growth()
    growth.turn_ended(30)

    assert growth.to_come(500) == 90.0


def test_where_sessions_have_one_turn_no_more_than_one_is_expected() -> None:
    growth = Growth()
    for _ in range(3):
        growth.turn_ended(30)
        growth.visit_ended(30)

    assert growth.to_come(0) == 30.0
    assert growth.to_come(25) == 30.0


def test_after_a_change_the_average_follows() -> None:
    growth = Growth()
    for _ in range(100):
        growth.visit_ended(1000)
    for _ in range(100):
        growth.visit_ended(10)

    assert growth.to_come(0) < 20

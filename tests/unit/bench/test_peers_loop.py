"""Agents that go on are measured in a window: by what came within it, the same for every engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from itertools import chain, islice
from math import isclose

import pytest

from bench.pauses_workload import LONGEST_PAUSE, PAUSE_QUANTILES
from bench.peers_loop import Loop, Script, Window, figures, going_on, possible_tokens, window_of
from bench.peers_turns import Step, Timing
from bench.peers_workload import AGENT_TURNS, AGENTS, SCALE, WARM_UP, WINDOW, cases, live_tokens

WITHIN = Window(10.0, 20.0)


def alike(pause: float, turns: int = 3, out: int = 4) -> Callable[[], Iterator[Script]]:
    def scripts() -> Iterator[Script]:
        while True:
            yield (Step("A", out, pause),) * turns

    return scripts


def agents_of_the_bench(seed: int) -> Loop:
    (loop,) = (case.loop for case in cases(1, seed) if case.loop is not None)
    return loop


# ---- the rule -----------------------------------------------------------------------------------------------------
def test_tokens_outside_of_the_window_count_nothing() -> None:
    assert WITHIN.tokens(Timing(begun=12, first=1, whole=4, drawn=40)) == 40
    assert WITHIN.tokens(Timing(begun=2, first=1, whole=7.9, drawn=40)) == 0
    assert WITHIN.tokens(Timing(begun=19, first=1, whole=4, drawn=40)) == 0
    assert WITHIN.tokens(Timing(begun=12, first=1, whole=1, drawn=0)) == 0


def test_of_a_turn_across_a_border_the_part_counts_that_came_within() -> None:
    assert WITHIN.tokens(Timing(begun=8, first=1, whole=5, drawn=5)) == 4  # at 9, 10, 11, 12, 13
    assert WITHIN.tokens(Timing(begun=17, first=1, whole=5, drawn=5)) == 2  # at 18, 19, 20, 21, 22


def test_the_window_begins_when_all_are_at_work_and_lasts_as_long_for_each_engine() -> None:
    loop = Loop((alike(0), alike(0)), warm_up=10, seconds=20)
    quick, slow = Timing(100, 1, 2, 4), Timing(101, 40, 45, 4)

    assert window_of(loop, [[quick], []]) is None
    assert window_of(loop, [[quick], [quick]]) == Window(110, 130)
    assert window_of(loop, [[quick], [slow]]) == Window(146, 166)


def test_a_resume_counts_if_its_turn_began_within_and_openings_are_none() -> None:
    loop = Loop((alike(0.5, turns=2),), warm_up=10, seconds=10)
    begun_and_waited = [(0, 9), (9.5, 8), (11, 7), (12, 0.5), (13, 6), (19, 3), (21, 5)]  # every other one opens
    turns = [Timing(begun, waited, waited + 0.5, 4) for begun, waited in begun_and_waited]

    found = figures(loop, [turns])

    assert found["resumes"] == 2
    assert (found["resume_p50"], found["resume_p99"]) == (3, 3)


def test_openings_are_told_beside_resumes_and_a_turn_of_either_kind_to_its_end() -> None:
    loop = Loop((alike(0.5, turns=2),), warm_up=10, seconds=10)
    begun_and_waited = [(0, 9), (9.5, 8), (11, 7), (12, 0.5), (13, 6), (19, 3), (21, 5)]  # every other one opens
    turns = [Timing(begun, waited, waited + 0.5, 4) for begun, waited in begun_and_waited]

    found = figures(loop, [turns])

    assert (found["opening_p50"], found["opening_max"]) == (7, 7)
    assert found["turn_mean"] == (7.5 + 1 + 6.5 + 3.5) / 4


def test_an_engine_that_takes_no_time_reaches_all_that_is_possible() -> None:
    loop = Loop((alike(0.5), alike(2.0)), warm_up=10, seconds=20)
    played = [[Timing(100 + number * pause, 0, 0, 4) for number in range(1, 100)] for pause in (0.5, 2.0)]

    found = figures(loop, played)

    assert possible_tokens(loop, 10, 30) == 4 * (40 + 10)
    assert isclose(
        found["of_possible"], 1, abs_tol=0.05
    )  # its first turn is the beginning, without the pause before it
    assert isclose(found["tokens_per_second"], 10, abs_tol=0.5)


def test_without_an_answer_of_every_agent_there_are_no_figures() -> None:
    with pytest.raises(ValueError, match="no window"):
        _ = figures(Loop((alike(0),), 1, 1), [[]])


# ---- playing ------------------------------------------------------------------------------------------------------
class Answers:
    """An engine that takes `seconds` for a turn and counts the conversations that are open."""

    def __init__(self, seconds: float, fails_at: int | None = None) -> None:
        self.seconds, self.fails_at = seconds, fails_at
        self.turns = self.opened = self.open = 0

    @asynccontextmanager
    async def conversation(self) -> AsyncIterator[Answers]:
        self.opened += 1
        self.open += 1
        try:
            yield self
        finally:
            self.open -= 1

    async def step(self, step: Step) -> Timing:
        self.turns += 1
        if self.turns == self.fails_at:
            raise ConnectionError("it went away")
        begun = asyncio.get_running_loop().time()
        await asyncio.sleep(self.seconds)
        return Timing(begun, self.seconds / 2, self.seconds, step.out)


def test_agents_go_on_with_new_conversations_and_leave_none_open() -> None:
    engine = Answers(0.01)

    played = asyncio.run(going_on(Loop((alike(0), alike(0)), 0.05, 0.2), engine.conversation))

    window = window_of(Loop((alike(0), alike(0)), 0.05, 0.2), played)
    assert window is not None
    assert all(turns[-1].ended >= window.end - 0.02 for turns in played)
    assert engine.opened > 4
    assert engine.open == 0


def test_turns_that_began_within_the_window_are_waited_for() -> None:
    loop = Loop((alike(0), alike(0)), warm_up=0.0, seconds=0.1)
    engine = Answers(0.25)

    played = asyncio.run(going_on(loop, engine.conversation))

    assert [len(turns) for turns in played] == [2, 2]  # the second began at the window's beginning, and outlasts it


def test_an_agent_in_a_long_pause_holds_nobody_up() -> None:
    def one_turn() -> Iterator[Script]:
        yield (Step("A", 4, 0), Step("A", 4, 3600))

    played = asyncio.run(going_on(Loop((alike(0), one_turn), 0.02, 0.1), Answers(0.01).conversation))

    assert len(played[1]) == 1


def test_what_a_conversation_raises_ends_all_agents() -> None:
    engine = Answers(0.01, fails_at=5)

    with pytest.raises(ConnectionError):
        _ = asyncio.run(going_on(Loop((alike(0), alike(0)), 0.5, 60), engine.conversation))

    assert engine.open == 0


# ---- the agents ---------------------------------------------------------------------------------------------------
def test_an_agent_does_the_same_in_every_engine_and_something_else_in_every_round() -> None:
    first, again, other = agents_of_the_bench(0), agents_of_the_bench(0), agents_of_the_bench(1)

    def beginnings(loop: Loop) -> list[list[Script]]:
        return [list(islice(agent(), 3)) for agent in loop.agents]

    assert beginnings(first) == beginnings(again) == beginnings(first)
    assert beginnings(first) != beginnings(other)


def test_pauses_follow_the_published_law_and_none_is_cut_that_a_window_could_hold() -> None:
    steps = chain.from_iterable(
        chain.from_iterable(islice(agent(), 100)) for seed in range(4) for agent in agents_of_the_bench(seed).agents
    )
    pauses = sorted(step.pause for step in steps if step.pause)

    for share, seconds in PAUSE_QUANTILES:
        assert isclose(pauses[int(share * len(pauses))], SCALE * seconds, rel_tol=0.15)
    assert SCALE * LONGEST_PAUSE >= WARM_UP + WINDOW


def test_conversations_are_joined_at_any_age_and_hold_what_the_pool_was_sized_for() -> None:
    loop = agents_of_the_bench(0)
    firsts = [next(agent()) for agent in loop.agents]

    assert {len(script) for script in firsts} >= {2, AGENT_TURNS - 1}
    assert all(script[0].pause == 0 for script in firsts)
    whole = [script for agent in loop.agents for script in islice(agent(), 1, 40)]
    held = sum(sum(len(step.add) + step.out for step in script) for script in whole) / len(whole)
    assert isclose(live_tokens(), 2048 + AGENTS * held / 2, rel_tol=0.05)

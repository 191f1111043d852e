"""Who is let in and whose rows go when turns wait for room: nothing is computed only to be thrown away."""

from __future__ import annotations

from agentspeed_engine.protocol import messages as wire
from tests.support.scheduled import Scheduled


def test_a_prompt_that_does_not_fit_beside_the_older_one_waits_and_is_computed_once() -> None:
    world = Scheduled(pages=12, context_limit=40, prefill_chunk=8)
    older, younger = world.open(range(1, 29)), world.open(range(30, 58))
    for branch in (older, younger):
        assert isinstance(world.start(branch, (), 2), wire.Done)
    world.run()
    assert world.core.counts()["preemptions"] == 0
    assert world.device.tokens_computed == 2 * 28 + 2


def test_two_prompts_that_fit_together_are_computed_together() -> None:
    world = Scheduled(pages=12, context_limit=40, prefill_chunk=16)
    branches = [world.open(range(1, 9)), world.open(range(30, 38))]
    for branch in branches:
        assert isinstance(world.start(branch, (), 2), wire.Done)
    _ = world.step()
    assert world.core.counts()["branches_decoding"] == 2


def test_of_the_rows_that_wait_for_their_turn_the_youngest_turns_go_first() -> None:
    world = Scheduled(pages=16, context_limit=48)
    second, third = world.open(range(30, 46)), world.open(range(50, 66))
    for branch in (second, third):
        _ = world.turn(branch)
    first = world.open(range(1, 30))
    for branch in (first, second, third):
        assert isinstance(world.start(branch, (70 + branch,), 1), wire.Done)
    while world.core.counts()["pages_evicted"] == 0:
        assert world.step()
    assert world.residence(second).device >= 16 > world.residence(third).device


def test_a_few_rows_copied_from_another_session_do_not_disturb_its_load_from_the_host() -> None:
    world = Scheduled(pages=12, context_limit=40, host_slots=16)
    first = world.open(range(1, 25))
    _ = world.turn(first)
    second = world.open([*range(1, 7), 50, 51])  # shares a page, and two rows of the next one
    third = world.open(range(30, 58))
    _ = world.turn(third)
    _ = world.send(wire.Close(request=1, branch=third))
    where = world.residence(first)
    assert where.host > 0 and where.device >= 8
    for branch in (first, second):
        assert isinstance(world.start(branch, (7,), 3), wire.Done)
    plan = world.core.plan(0.0)
    (load,) = world.core.host_copies()
    assert plan is not None and load.direction == "load"
    world.device.copy(load)  # it ends while the step is in flight
    _ = world.core.copied(load.ticket, True, 0.0)
    world.core.check()
    result = world.device.execute(plan, {row.branch: world.logs[row.branch] for row in plan.rows})
    world.hear(world.core.apply(result, 0.0))
    world.run()
    assert [len(world.logs[branch]) for branch in (first, second)] == [29, 12]


def test_nothing_is_copied_to_the_host_while_rows_that_nobody_would_miss_can_go_for_nothing() -> None:
    world = Scheduled(pages=20, context_limit=40, host_slots=24)
    gone = world.open(range(1, 33))
    _ = world.turn(gone)
    _ = world.send(wire.Close(request=1, branch=gone))
    first, second = world.open(range(40, 64)), world.open(range(65, 89))
    for branch in (first, second, first, second):
        _ = world.turn(branch, (7,))
    counts = world.core.counts()
    assert counts["pages_evicted"] > 0 and counts["pages_saved"] == counts["tickets"] == 0


def test_a_branch_that_lost_some_rows_loses_no_more_when_another_is_needed_later_by_now() -> None:
    world = Scheduled(pages=15, context_limit=40)
    first, second = world.open(range(1, 25)), world.open(range(30, 54))
    for branch, seconds in ((first, 90.0), (second, 50.0)):
        _ = world.turn(branch)
        _ = world.send(wire.Expect(request=1, branch=branch, seconds=seconds))
    third = world.open(range(60, 76))
    _ = world.turn(third)
    kept = world.residence(first).device
    assert 0 < kept < 24 <= world.residence(second).device
    for branch, seconds in ((first, 1.0), (third, 0.0)):
        _ = world.send(wire.Expect(request=1, branch=branch, seconds=seconds))
    _ = world.turn(world.open(range(80, 92)))
    assert world.residence(first).device == kept and world.residence(second).device < 24

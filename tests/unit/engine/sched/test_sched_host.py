"""Paused rows on the host: what comes back, what a failed copy costs, and that nothing waits for one for ever."""

from __future__ import annotations

import pytest

from agentspeed_engine.protocol import messages as wire
from tests.support.scheduled import LINK, Scheduled

FIRST, SECOND = range(1, 25), range(30, 54)


def two_sessions_and_room_for_one(**options: object) -> tuple[Scheduled, int, int]:
    """Nine pages; each session's turn fills six of them and one row."""
    world = Scheduled(pages=9, host_slots=16, **options)
    first, second = world.open(FIRST), world.open(SECOND)
    _ = world.turn(first)
    _ = world.turn(second)
    return world, first, second


def test_rows_that_moved_to_the_host_are_resumed_and_not_computed_again() -> None:
    world, first, _ = two_sessions_and_room_for_one()
    where = world.residence(first)
    assert where.host > 0 and where.lost <= 4
    computed = world.device.tokens_computed
    usage = world.turn(first, (7,))
    assert usage.resumed_host >= where.host - 4 and usage.recomputed <= 4
    assert world.device.tokens_computed - computed <= 6


def test_without_host_slots_the_same_rows_are_computed_again() -> None:
    world = Scheduled(pages=9)
    first, second = world.open(FIRST), world.open(SECOND)
    _ = world.turn(first)
    _ = world.turn(second)
    usage = world.turn(first, (7,))
    assert usage.resumed_host == 0 and usage.recomputed > 4 and usage.why


COPIES_COST_MORE = {"copy_seconds_per_token": 1.0, "recompute_seconds_per_token": 1e-6}


def test_rows_that_are_computed_sooner_than_copied_are_not_saved() -> None:
    world, first, _ = two_sessions_and_room_for_one(**COPIES_COST_MORE)
    assert world.residence(first).host == 0
    assert world.turn(first, (7,)).recomputed > 4


def test_where_rows_are_always_saved_no_cost_decides() -> None:
    world, first, _ = two_sessions_and_room_for_one(**COPIES_COST_MORE, host_saves="always")
    assert world.residence(first).host > 0
    usage = world.turn(first, (7,))
    assert usage.resumed_host > 4 and usage.recomputed <= 4


def test_a_save_that_fails_drops_the_rows_and_the_turn_that_needed_room_goes_on() -> None:
    world = Scheduled(pages=9, host_slots=16)
    first, second = world.open(FIRST), world.open(SECOND)
    _ = world.turn(first)
    world.host = False
    _ = world.turn(second)
    assert world.residence(first).host == 0
    assert world.core.counts()["slots_free"] == 16


def test_a_load_that_fails_twice_loses_the_rows_and_the_turn_computes_them() -> None:
    world, first, _ = two_sessions_and_room_for_one()
    assert world.residence(first).host > 0
    world.host = False
    usage = world.turn(first, (7,))
    assert usage.recomputed > 4 and usage.drawn == 1


def test_copies_that_never_end_fail_by_their_deadline() -> None:
    world, first, _ = two_sessions_and_room_for_one(ticket_deadline=2.0)
    world.host = None
    before = world.now
    usage = world.turn(first, (7,))
    assert usage.drawn == 1 and before < world.now <= before + 8.0
    assert world.core.counts()["tickets_late"] > 0


def test_a_late_report_of_an_expired_copy_is_ignored() -> None:
    world = Scheduled(pages=9, host_slots=16, ticket_deadline=2.0)
    first, second = world.open(FIRST), world.open(SECOND)
    _ = world.turn(first)
    world.host = None
    _ = world.start(second)
    while not world.core.world.tickets:
        _ = world.step()
    order = world.copies[0]
    world.run()
    assert order.begin_by < world.now
    assert world.core.copied(order.ticket, True, world.now) == []
    world.core.check()


def test_a_copy_that_has_begun_keeps_its_pages_past_its_deadline() -> None:
    world, first, _ = two_sessions_and_room_for_one()
    _ = world.start(first, (7,))
    while not world.core.counts()["branches_promoting"]:
        _ = world.step()
        if not world.core.counts()["branches_promoting"]:
            world.settle_copies()  # what must be saved first to make room
    (order,) = world.copies
    assert order.direction == "load"
    world.core.begun(order.ticket)
    world.now += 1000.0
    _ = world.core.plan(world.now)
    assert world.core.counts()["tickets_late"] == 0
    assert world.core.counts()["branches_promoting"] == 1, "it still writes: nobody else may have its pages"
    assert world.core.wake_at(world.now) is None
    world.settle_copies()
    world.run()
    assert world.core.counts()["branches_held"] == 2


def test_a_branch_that_waits_for_its_rows_can_be_cancelled_at_once() -> None:
    world, first, _ = two_sessions_and_room_for_one()
    _ = world.start(first, (7,))
    while not world.core.counts()["branches_promoting"]:
        _ = world.step()
        if not world.core.counts()["branches_promoting"]:
            world.settle_copies()  # what must be saved first to make room
    replies = world.core.handle(LINK, wire.Cancel(request=9, branch=first), world.now)
    assert [type(message).__name__ for _, message in replies] == ["TurnEnded", "Done"]
    world.core.check()
    world.settle_copies()
    assert world.turn(first).drawn == 1


def test_rows_are_back_before_the_tool_is_due_when_pages_are_free() -> None:
    world, first, second = two_sessions_and_room_for_one()
    _ = world.send(wire.Expect(request=1, branch=first, seconds=10.0))
    _ = world.send(wire.Close(request=1, branch=second))
    world.core.world.kv.drop_with_all_below(
        next(
            node
            for node in world.core.world.kv.tree.nodes.values()
            if node.parent is not None and node.parent.parent is None and not node.pinned_by and node.ids[0] == 30
        )
    )
    assert world.residence(first).host > 0
    wake = world.core.wake_at(world.now)
    assert wake is not None and wake < 10.0
    world.now = wake
    _ = world.step()
    world.settle_copies()
    assert world.residence(first).host == 0
    assert world.core.counts()["prefetches"] == 1


def test_a_full_host_drops_what_is_needed_last() -> None:
    world = Scheduled(pages=9, host_slots=7)
    first, second, third = world.open(FIRST), world.open(SECOND), world.open(range(60, 84))
    _ = world.turn(first)
    _ = world.send(wire.Expect(request=1, branch=first, seconds=900.0))
    _ = world.turn(second)
    _ = world.send(wire.Expect(request=1, branch=second, seconds=5.0))
    _ = world.turn(third)
    assert world.residence(second).lost < world.residence(first).lost


def test_private_rows_do_not_outlive_their_session() -> None:
    world = Scheduled(pages=9, host_slots=16)
    secret = world.open(FIRST, private=True)
    _ = world.turn(secret)
    _ = world.turn(world.open(SECOND))
    assert world.residence(secret).host > 0
    _ = world.send(wire.Close(request=1, branch=secret))
    assert world.core.counts()["slots_free"] == 16


def many_sessions_at_rest() -> Scheduled:
    """A nearly full pool of sessions that took two turns each: beside the rows of the second lies the old end of the
    first, which may be on the host alone."""
    world = Scheduled(pages=64, host_slots=256, context_limit=40)
    for number in range(10):
        branch = world.open(range(number + 1, number + 19))
        for more in ((), (7, 8, 9)):
            _ = world.turn(branch, more, most=2)
    assert world.core.counts()["pages_free"] < 8
    return world


def steps_until_all_computed(world: Scheduled, tokens: int, turns: int) -> int:
    """Of as many turns that begin together with prompts of so many tokens."""
    branches = [world.open([90 - number, *range(tokens - 1)], private=True) for number in range(turns)]
    for branch in branches:
        _ = world.start(branch)
    before = world.device.tokens_computed
    for steps in range(1, 40):
        _ = world.step()
        world.settle_copies()
        if world.device.tokens_computed - before >= tokens * turns:
            return steps
    raise AssertionError("they wait for ever")


@pytest.mark.parametrize("turns", [1, 2, 3, 4])
def test_turns_that_need_room_do_not_wait_for_copies_one_after_the_other(turns: int) -> None:
    assert steps_until_all_computed(many_sessions_at_rest(), 18, turns) <= 2, "one that copies, one that computes"

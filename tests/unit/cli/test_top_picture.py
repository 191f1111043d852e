"""The picture a core gives of itself: complete in its numbers, bounded in what it describes, and read-only."""

from __future__ import annotations

import time

import pytest

from agentspeed_engine.protocol import messages as wire
from agentspeed_engine.protocol.frames import encode_outbox
from agentspeed_engine.sched import inspection
from tests.support.scheduled import Scheduled

PROMPT = tuple(range(1, 13))


def look(world: Scheduled, branches: int = 200) -> wire.Picture:
    world.hear(world.core.events())
    reply = world.send(wire.Look(request=9, branches=branches))
    assert isinstance(reply, wire.Picture) and reply.request == 9
    return reply


def views(picture: wire.Picture) -> dict[int, wire.BranchView]:
    return {view.branch: view for session in picture.sessions for view in session.branches}


def test_pages_by_owner_add_up_to_the_pool_at_every_moment() -> None:
    world = Scheduled(pages=14, host_slots=6)
    branches = [world.open(tuple(range(start, start + 14))) for start in (1, 20, 40, 60)]
    for branch in branches:
        assert isinstance(world.start(branch, most=3), wire.Done)
    seen: set[str] = set()
    for _ in range(40):
        pages = look(world).pages
        assert sum(pages.values()) == 14
        seen |= {owner for owner, count in pages.items() if count}
        _ = world.step()
        world.settle_copies()
    for branch in branches[:2]:
        _ = world.send(wire.Close(request=1, branch=branch))
    pages = look(world).pages
    assert sum(pages.values()) == 14
    assert seen | {owner for owner, count in pages.items() if count} >= {"free", "tails", "pinned", "held", "cached"}


def test_where_the_rows_are_adds_up_to_the_tokens_known() -> None:
    world = Scheduled(pages=12, host_slots=12)
    branches = [world.open(tuple(range(start, start + 14))) for start in (1, 20, 40, 60)]
    for branch in branches:
        _ = world.turn(branch)
    described = views(look(world))
    for view in described.values():
        places = view.places
        assert places.device + places.both + places.host + places.loading + places.lost == view.known
    assert sum(view.places.host for view in described.values()) > 0


def test_a_turn_says_that_it_waits_for_room_and_behind_whom() -> None:
    world = Scheduled(pages=9, context_limit=32)
    first, second, third = (world.open(tuple(range(start, start + 20))) for start in (1, 30, 60))
    for branch in (first, second, third):
        assert isinstance(world.start(branch, most=8), wire.Done)
    assert views(look(world))[second].waiting_for == "the next step"
    for _ in range(4):
        _ = world.step()
    described = views(look(world))
    assert described[first].state == "Decoding"
    assert described[second].waiting_for == "room"
    assert described[third].waiting_for == f"room after branch {second}"
    assert described[second].age == 2


def test_a_cold_prompt_beside_another_waits_for_token_budget_not_for_room() -> None:
    world = Scheduled(pages=40, prefill_chunk=8, extend_tokens=1)
    first, second = world.open(tuple(range(1, 31))), world.open(tuple(range(40, 70)))
    for branch in (first, second):
        assert isinstance(world.start(branch), wire.Done)
    assert world.core.plan(world.now) is not None
    described = views(look(world))
    assert described[first].state == "Prefilling"
    assert described[second].waiting_for == "token budget"


def test_a_sibling_says_whose_fill_it_waits_for() -> None:
    world = Scheduled(pages=40, prefill_chunk=8, context_limit=64)
    trunk = world.open(tuple(range(1, 25)))
    forked = world.send(wire.Fork(request=1, branch=trunk, n=2))
    assert isinstance(forked, wire.Forked)
    one, two = forked.branches
    world.logs |= {one: world.logs[trunk][:], two: world.logs[trunk][:]}
    for child in (one, two):
        assert isinstance(world.start(child), wire.Done)
    _ = world.step()
    assert views(look(world))[two].waiting_for == f"branch {one}'s prefix"


def test_rows_in_flight_keep_a_cancelled_branch_settling_and_it_says_so() -> None:
    world = Scheduled()
    branch = world.open(PROMPT)
    assert isinstance(world.start(branch), wire.Done)
    plan = world.core.plan(world.now)
    assert plan is not None
    _ = world.core.handle(1, wire.Cancel(request=2, branch=branch), world.now)  # type: ignore[arg-type]
    picture = look(world)
    assert (views(picture)[branch].state, views(picture)[branch].waiting_for) == ("Settling", "rows in flight")
    assert picture.counts["settling"] == 1 and picture.counts["held"] == 0


def test_busy_branches_are_described_before_those_at_rest_and_the_rest_is_counted() -> None:
    world = Scheduled(pages=60)
    resting = [world.open((1, 2, number + 3)) for number in range(10)]
    busy = world.open(PROMPT)
    assert isinstance(world.start(busy), wire.Done)
    picture = look(world, branches=3)
    assert sorted(views(picture)) == sorted([*resting[:2], busy])
    assert (picture.counts["sessions"], picture.counts["branches"], picture.counts["queued"]) == (11, 11, 1)


@pytest.mark.parametrize("asked", [0, -5])
def test_a_picture_without_branches_still_counts(asked: int) -> None:
    world = Scheduled()
    _ = world.open(PROMPT)
    picture = look(world, branches=asked)
    assert picture.sessions == () and picture.counts["branches"] == 1


def test_a_session_is_described_with_what_its_front_calls_it() -> None:
    world = Scheduled()
    named, plain = world.open(PROMPT, label="8d8935cc"), world.open(PROMPT)
    assert {view.session: view.label for view in look(world).sessions} == {named: "8d8935cc", plain: ""}
    for label in ("x" * 257, "a\0b"):
        refused = world.send(wire.Open(request=1, label=label))
        assert isinstance(refused, wire.Failed) and "The name of a session" in refused.message


def test_nobody_can_ask_for_an_unbounded_picture() -> None:
    world = Scheduled(max_sessions=1200)
    for _ in range(1100):
        _ = world.open((1,))
    assert len(views(look(world, branches=10**9))) == wire.MAX_LOOK


def test_looking_changes_nothing() -> None:
    world = Scheduled()
    branch = world.open(PROMPT)
    assert isinstance(world.start(branch), wire.Done)
    _ = world.step()
    before = world.core.key()
    _ = look(world)
    assert world.core.key() == before


def test_no_token_leaves_the_engine_in_a_picture() -> None:
    world = Scheduled(pages=40, context_limit=128)
    branch = world.open((93, 94, 95) * 30)
    _ = world.turn(branch, most=4)
    text = encode_outbox((look(world),))
    assert bytes((93, 94, 95)) not in text
    assert bytes((93, 0, 0, 0, 94, 0, 0, 0)) not in text


def test_a_picture_of_a_full_engine_is_taken_in_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    world = Scheduled(pages=20_000, max_sessions=2000, max_branches=256, context_limit=32)
    for start in range(1500):
        branch = world.open(tuple((start * 7 + i) % 97 for i in range(16)))
        if start % 3 == 0:
            _ = world.send(wire.Fork(request=1, branch=branch, n=4))
        if start < 300:
            _ = world.start(branch)
    for _ in range(30):
        _ = world.step()
    begun = time.process_time()
    for _ in range(5):
        _ = look(world)
    # Far above what it takes (a few ms), far below what an unbounded walk would: a count is checked below.
    assert (time.process_time() - begun) / 5 < 0.1
    monkeypatch.setattr(inspection, "MOST_WALKED", 3)
    pages = look(world).pages
    assert pages["unsorted"] > 0 and sum(pages.values()) == 20_000

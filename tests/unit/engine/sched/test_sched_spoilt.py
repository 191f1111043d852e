"""A turn whose logits are no finite numbers leaves no rows behind that another one would find."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from agentspeed_engine.protocol import messages as wire
from agentspeed_engine.protocol.token_ids import pack_ids
from agentspeed_engine.sched.digest import digests
from agentspeed_engine.sched.plan import StepPlan
from agentspeed_engine.serve.recording import RecordingOrder, Tape
from agentspeed_engine.serve.replay import Replay
from tests.support.scheduled import LINK, Scheduled

POISON = 66
PROMPT = tuple(range(1, 11))


def world(**options: object) -> Scheduled:
    made = Scheduled(**options)
    made.device.poison = POISON
    return made


def spoilt(one: Scheduled, branch: int, ids: tuple[int, ...]) -> wire.TurnEnded:
    _ = one.turn(branch, ids)
    (ended,) = [said for said in one.heard if isinstance(said, wire.TurnEnded)]
    assert (ended.reason, ended.message) == ("error", "no finite numbers")
    return ended


def pages_of_nodes(one: Scheduled) -> int:
    return one.core.counts()["pages_nodes"]


def test_rows_of_a_spoilt_turn_are_found_by_nobody() -> None:
    one = world()
    first = one.open()
    _ = spoilt(one, first, (*PROMPT, POISON, *PROMPT))
    assert pages_of_nodes(one) == 0
    again = one.turn(one.open(), PROMPT)
    assert (again.shared, again.new) == (0, len(PROMPT))


def test_the_branch_goes_on_before_what_spoilt_it_and_computes_its_rows_again() -> None:
    one = world()
    branch = one.open()
    _ = one.turn(branch, PROMPT)
    known = len(one.logs[branch])
    _ = spoilt(one, branch, (POISON,))
    assert one.residence(branch).lost == known + 1
    assert isinstance(one.send(wire.Rewind(request=1, branch=branch, tokens=known)), wire.Done)
    del one.logs[branch][known:]
    usage = one.turn(branch, (3,))
    assert (usage.recomputed, usage.new) == (known, 1)
    assert "no finite numbers" in usage.why


def test_rows_that_others_lead_to_stay() -> None:
    one = world()
    trunk = one.open()
    _ = one.turn(trunk, PROMPT)
    forked = one.send(wire.Fork(request=1, branch=trunk, n=1))
    assert isinstance(forked, wire.Forked)
    (child,) = forked.branches
    one.logs[child] = list(one.logs[trunk])
    before = one.residence(trunk)
    _ = spoilt(one, child, (POISON, *PROMPT))
    assert one.residence(trunk) == before
    assert one.turn(trunk, (3,)).recomputed == 0
    assert isinstance(one.send(wire.Rewind(request=1, branch=child, tokens=8)), wire.Done)
    del one.logs[child][8:]
    assert one.turn(child, (9,)).recomputed < 4, "it finds the full pages of its trunk again"


def test_whoever_waited_for_the_same_prompt_computes_it_and_hears_the_same() -> None:
    one = world(prefill_chunk=4, pages=24)
    branches = [one.open(), one.open()]
    for branch in branches:
        assert isinstance(one.start(branch, (*PROMPT, POISON, 5, 6)), wire.Done)
    one.run()
    assert [said.reason for said in one.heard if isinstance(said, wire.TurnEnded)] == ["error", "error"]
    assert pages_of_nodes(one) == 0


def test_rows_on_the_host_go_too() -> None:
    one = world(host_slots=20, pages=12)
    first = one.open()
    _ = one.turn(first, (*PROMPT, *PROMPT))
    other = one.open()
    _ = one.turn(other, tuple(range(30, 60)))
    assert one.residence(first).host
    _ = spoilt(one, first, (POISON,))
    assert one.residence(first).host == one.residence(first).device == 0


def test_a_turn_that_was_cancelled_before_it_was_known_to_be_spoilt_leaves_none_either() -> None:
    one = world()
    branch = one.open()
    assert isinstance(one.start(branch, (*PROMPT, POISON)), wire.Done)
    plan = one.core.plan(0.0)
    assert plan is not None
    one.hear(one.core.events())
    one.hear(one.core.handle(LINK, wire.Cancel(request=1, branch=branch), 0.0))
    assert pages_of_nodes(one) == 0
    one.hear(one.core.apply(one.device.execute(plan, {branch: one.logs[branch]}), 0.0))
    one.core.check()
    assert one.core.counts()["pages_free"] == one.core.counts()["pages_total"]


@pytest.mark.parametrize("content", [True, False])
def test_a_recording_says_which_turns_were_spoilt(tmp_path: Path, content: bool) -> None:
    one = world()
    core, log = one.core, (*PROMPT, POISON)
    tape = Tape(core, RecordingOrder(folder=tmp_path, most_bytes=1 << 20, content=content, every=1), began=0.0)
    ((_, opened),) = tape.core.handle(LINK, wire.Open(request=1), 0.0)
    assert isinstance(opened, wire.Opened)
    branch = opened.branch
    asked = wire.Generate(request=1, branch=branch, ids=pack_ids(log), max_tokens=1)
    one.hear(tape.core.handle(LINK, asked, 0.0))
    while (plan := tape.core.plan(0.0)) is not None:
        one.hear(tape.core.apply(one.device.execute(plan, {branch: log}), 0.0))
    tape.flush()
    tape.close()
    replay = Replay(tape.path)
    for _ in replay.steps():
        pass
    assert (replay.notes, replay.broke) == ([], "")
    assert digests(replay.core.world) == digests(core.world)
    assert replay.core.counts()["pages_nodes"] == 0


def test_what_cannot_be_drawn_for_another_reason_costs_no_rows() -> None:
    one = world()
    branch = one.open()
    assert isinstance(one.start(branch, PROMPT), wire.Done)
    plan = one.core.plan(0.0)
    assert plan is not None
    one.hear(one.core.events())
    one.device.poison = PROMPT[0]
    result = one.device.execute(plan, {branch: one.logs[branch]})
    assert result.spoilt
    one.hear(one.core.apply(type(result)(result.seq, (), result.refused), 0.0))
    assert one.residence(branch).device == len(PROMPT)


def test_rows_that_only_the_cache_holds_keep_none_above_them_to_be_found() -> None:
    """Else whoever begins with the same prompt reads the same rows, until they are evicted."""
    one = world()
    first = one.open()
    _ = one.turn(first, (*PROMPT, 20, 21, 22, 23))
    _ = one.send(wire.Close(request=1, branch=first))
    second = one.open()
    _ = spoilt(one, second, (*PROMPT[:8], POISON))
    again = one.turn(one.open(), (*PROMPT[:8], 30))
    assert (again.shared, again.new) == (0, 9)


def test_neither_does_what_hangs_below_a_page_that_was_copied() -> None:
    one = world()
    first = one.open()
    _ = one.turn(first, PROMPT)
    _ = one.send(wire.Close(request=1, branch=first))
    second = one.open()
    assert one.core.world.kv.tree.nodes
    _ = spoilt(one, second, (*PROMPT[:2], POISON))
    again = one.turn(one.open(), (*PROMPT[:2], 30))
    assert (again.shared, again.new) == (0, 3)


def test_rows_below_them_that_a_branch_rests_on_keep_what_leads_there() -> None:
    one = world()
    first = one.open()
    _ = one.turn(first, (*PROMPT, 20, 21, 22, 23))
    second = one.open()
    _ = spoilt(one, second, (*PROMPT[:8], POISON))
    assert one.turn(first, (5,)).recomputed == 0


def planned(one: Scheduled) -> StepPlan:
    plan = one.core.plan(0.0)
    assert plan is not None
    one.hear(one.core.events())
    one.core.check()
    return plan


def carried_out(one: Scheduled, plan: StepPlan) -> None:
    one.hear(one.core.apply(one.device.execute(plan, {row.branch: one.logs[row.branch] for row in plan.rows}), 0.0))
    one.core.check()


def being_saved() -> tuple[Scheduled, int]:
    """A branch whose rows of the prompt are being copied to the host while a turn of it is spoilt."""
    one = world(host_slots=20, pages=16, context_limit=48)
    first = one.open()
    _ = one.turn(first, PROMPT)
    one.host = None
    other = one.open()
    _ = one.turn(other, tuple(range(30, 76)))
    assert one.core.world.tickets, "the rows that would go next are saved early"
    assert one.residence(first).device == len(PROMPT)
    _ = spoilt(one, first, (POISON,))
    _ = one.send(wire.Close(request=1, branch=other))
    assert one.core.world.tickets
    return one, first


@pytest.mark.parametrize("copied", [True, False])
def test_rows_that_are_being_copied_go_when_the_copy_ends(copied: bool) -> None:
    one, _ = being_saved()
    for ticket in list(one.core.world.tickets):
        one.hear(one.core.copied(ticket, copied, 0.0))
        one.core.check()
    again = one.turn(one.open(), PROMPT)
    assert (again.shared, again.new) == (0, len(PROMPT))
    assert one.core.counts()["slots_free"] == 20


def test_whoever_found_rows_before_their_copy_ended_keeps_them() -> None:
    one, _ = being_saved()
    finder = one.open()
    assert one.turn(finder, (*PROMPT, 3)).shared > 0
    for ticket in list(one.core.world.tickets):
        one.hear(one.core.copied(ticket, True, 0.0))
        one.core.check()
    assert one.residence(finder).lost == 1, "only its last token has no row"
    assert one.turn(finder, (5,)).recomputed == 0


def test_a_turn_closed_while_its_row_ahead_runs_leaves_no_rows() -> None:
    one = world(depth=1, decode_ahead=True)
    branch = one.open()
    assert isinstance(one.start(branch, PROMPT, most=4), wire.Done)
    carried_out(one, planned(one))
    first, ahead = planned(one), planned(one)
    one.device.poison = PROMPT[0]
    carried_out(one, first)
    assert one.core.counts()["branches_settling"] == 1, "it is known to be spoilt, and a row of it is in flight"
    one.hear(one.core.handle(LINK, wire.Close(request=1, branch=branch), 0.0))
    one.hear(one.core.apply(one.device.execute(ahead, {branch: one.logs[branch]}), 0.0))
    assert one.core.counts()["pages_free"] == one.core.counts()["pages_total"]


def test_a_turn_closed_before_it_was_known_to_be_spoilt_leaves_none_either() -> None:
    one = world()
    branch = one.open()
    assert isinstance(one.start(branch, (*PROMPT, POISON)), wire.Done)
    plan = planned(one)
    one.hear(one.core.handle(LINK, wire.Close(request=1, branch=branch), 0.0))
    carried_out(one, plan)
    assert one.core.counts()["pages_free"] == one.core.counts()["pages_total"]


def forked_while_it_ran() -> tuple[Scheduled, int, int]:
    one = world()
    branch = one.open()
    assert isinstance(one.start(branch, (*PROMPT, POISON)), wire.Done)
    plan = planned(one)
    one.hear(one.core.handle(LINK, wire.Fork(request=2, branch=branch, n=1), 0.0))
    carried_out(one, plan)
    (forked,) = [said for said in one.heard if isinstance(said, wire.Forked)]
    (child,) = forked.branches
    one.logs[child] = list(one.logs[branch])
    return one, branch, child


def test_a_turn_that_waits_again_computes_its_rows_again_and_its_fork_has_none() -> None:
    one, branch, child = forked_while_it_ran()
    assert pages_of_nodes(one) == 0
    assert one.residence(child).device == 0
    one.run()
    (ended,) = [said for said in one.heard if isinstance(said, wire.TurnEnded)]
    assert (ended.branch, ended.reason, ended.usage.recomputed) == (branch, "error", len(PROMPT) + 1)
    assert pages_of_nodes(one) == 0


def test_a_turn_that_waits_again_and_then_ends_well_keeps_its_rows() -> None:
    one, branch, _ = forked_while_it_ran()
    one.device.poison = None
    one.run()
    (ended,) = [said for said in one.heard if isinstance(said, wire.TurnEnded)]
    assert ended.reason == "max_tokens"
    assert one.residence(branch).device == len(PROMPT) + 1


def test_what_a_spoilt_turn_wrote_stands_in_for_nobodys_rows_on_the_host() -> None:
    one = world(host_slots=20, pages=16, context_limit=48, max_branches=8)
    trunk = one.open()
    _ = one.turn(trunk, PROMPT[:8])
    forked = one.send(wire.Fork(request=1, branch=trunk, n=1))
    assert isinstance(forked, wire.Forked)
    (twin,) = forked.branches
    one.logs[twin] = list(one.logs[trunk])
    for branch, most in ((twin, 30), (trunk, 9)):
        assert isinstance(one.start(branch, (3,), most=most), wire.Done)
    one.heard.clear()
    while not any(isinstance(said, wire.TurnEnded) and said.branch == trunk for said in one.heard):
        assert one.step()
    assert isinstance(one.start(one.open(), tuple(range(30, 66))), wire.Done)
    while one.residence(trunk).host < 4:
        assert one.step()
        one.settle_copies()
    before = one.residence(trunk)
    assert one.core.counts()["branches_decoding"] == 1, "the twin has the same rows in its own tail"
    while (plan := one.core.plan(0.0)) is not None:
        result = one.device.execute(plan, {row.branch: one.logs[row.branch] for row in plan.rows})
        drawn = [token for token in result.drawn if token.branch == twin]
        refused = tuple((token.branch, token.epoch, "no finite numbers") for token in drawn)
        spoilt = frozenset((branch, epoch) for branch, epoch, _ in refused)
        others = tuple(token for token in result.drawn if token.branch != twin)
        one.hear(one.core.apply(replace(result, drawn=others, refused=refused, spoilt=spoilt), 0.0))
        one.core.check()
    assert one.residence(trunk) == before

"""A turn whose logits are no finite numbers leaves no rows behind that another one would find."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentspeed_engine.protocol import messages as wire
from agentspeed_engine.protocol.token_ids import pack_ids
from agentspeed_engine.sched.digest import digests
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

"""A turn whose grammar is being compiled waits outside of the queue: at its age, and in nobody's way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from agentspeed_engine.protocol import messages as wire
from agentspeed_engine.protocol.token_ids import pack_ids
from agentspeed_engine.sched.digest import digests
from agentspeed_engine.serve.replay import Replay
from tests.support.recorded_run import LINK as RECORDED
from tests.support.recorded_run import RecordedRun
from tests.support.scheduled import LINK, Scheduled

STOP = (b"stop",)


class Preparing(Scheduled):
    """Nothing is prepared before a test says so."""

    def __init__(self, **options: object) -> None:
        super().__init__(prepares=True, **options)

    def constrained(self, branch: int, ids: Sequence[int] = (5,), most: int = 1) -> int:
        """Begins a turn that has to be prepared; returns its number."""
        reply = self.send(wire.Generate(request=1, branch=branch, ids=pack_ids(list(ids)), max_tokens=most,
                                        stop_strings=STOP))  # fmt: skip
        assert isinstance(reply, wire.Done), reply
        self.logs[branch] += ids
        return self.core.world.next_turn

    def say(self, turn: int, refusal: str | None = None) -> None:
        self.hear(self.core.prepared(turn, refusal, self.now))
        self.core.check()

    def ended(self, branch: int) -> list[wire.TurnEnded]:
        return [said for said in self.heard if isinstance(said, wire.TurnEnded) and said.branch == branch]

    def steps(self) -> None:
        while self.step():
            pass


def test_each_turn_is_handed_out_once_and_the_others_are_not() -> None:
    world = Preparing()
    one, other = world.open([1, 2]), world.open([3, 4])
    _ = world.start(other)
    turn = world.constrained(one)
    (spec,) = world.core.preparations()
    assert (spec.turn, spec.stop_strings) == (turn, STOP)
    assert world.core.preparations() == () and world.core.awaits(turn)


def test_younger_turns_go_ahead_of_one_that_is_being_prepared() -> None:
    world = Preparing()
    one, other = world.open([1, 2]), world.open([3, 4])
    turn = world.constrained(one)
    _ = world.start(other)
    world.steps()
    assert world.ended(other) and not world.ended(one)
    world.say(turn)
    world.steps()
    assert [end.reason for end in world.ended(one)] == ["max_tokens"]


def test_it_keeps_its_age_when_it_was_prepared() -> None:
    world = Preparing(prefill_chunk=1, extend_tokens=1)
    first, second = world.open([1, 2, 3, 4, 5, 6]), world.open([7, 8, 9, 10, 11, 12])
    turn = world.constrained(first)
    _ = world.start(second)
    world.say(turn)
    plan = world.core.plan(world.now)
    assert plan is not None and plan.rows[0].branch == first


def test_what_cannot_be_prepared_ends_with_its_reason_and_nothing_was_computed() -> None:
    world = Preparing()
    one = world.open([1, 2])
    turn = world.constrained(one)
    world.say(turn, "the grammar does not compile")
    (end,) = world.ended(one)
    assert (end.reason, end.message, end.usage.new) == ("error", "the grammar does not compile", 0)
    assert world.core.plan(world.now) is None and world.core.world.ended == []
    assert world.turn(one).drawn == 1, "the branch goes on"


def test_a_cancelled_turn_is_awaited_no_more_and_its_preparation_is_ignored() -> None:
    world = Preparing()
    one = world.open([1, 2])
    before, turn = world.core.preparations(), world.constrained(one)
    assert before == ()
    _ = world.send(wire.Cancel(request=2, branch=one))
    assert world.core.preparations() == () and not world.core.awaits(turn), "it was not handed out yet"
    world.say(turn)
    assert [end.reason for end in world.ended(one)] == ["cancelled"]
    assert world.core.plan(world.now) is None


def test_a_prepared_turn_that_never_computes_is_told_to_the_executor_with_the_next_step() -> None:
    world = Preparing()
    one, other = world.open([1, 2]), world.open([3, 4])
    turn = world.constrained(one)
    world.say(turn)
    _ = world.send(wire.Cancel(request=2, branch=one))
    _ = world.start(other)
    plan = world.core.plan(world.now)
    assert plan is not None and plan.ended == (turn,)


def test_a_fork_of_a_turn_that_is_being_prepared_is_born_at_once_and_the_turn_still_waits() -> None:
    world = Preparing()
    one = world.open([1, 2])
    turn = world.constrained(one)
    forked = world.send(wire.Fork(request=2, branch=one, n=1))
    assert isinstance(forked, wire.Forked) and world.core.awaits(turn)
    world.core.check()
    assert world.core.plan(world.now) is None
    world.say(turn)
    world.steps()
    assert world.ended(one)


def test_its_session_may_close_and_its_client_may_die_meanwhile() -> None:
    world = Preparing()
    one, other = world.open([1, 2]), world.open([3, 4])
    turns = [world.constrained(one), world.constrained(other)]
    _ = world.send(wire.Close(request=2, branch=one))
    assert world.core.drop_link(LINK, world.now) == []
    for turn in turns:
        world.say(turn)
    assert world.core.counts()["branches"] == world.core.counts()["waiting_turns"] == 0


def test_it_counts_among_the_turns_that_wait_and_says_for_what() -> None:
    world = Preparing(max_waiting=1)
    one, other = world.open([1, 2]), world.open([3, 4])
    _ = world.constrained(one)
    refused = world.start(other)
    assert isinstance(refused, wire.Failed) and refused.code == "overloaded"
    inspected = world.send(wire.Inspect(request=3, branch=one))
    assert isinstance(inspected, wire.Inspected)
    assert (inspected.state, inspected.waiting_for) == ("Queued", "its grammar or stop strings")
    assert world.core.counts()["waiting_turns"] == 1


def test_a_recording_replays_what_was_prepared_refused_and_cancelled(tmp_path: Path) -> None:
    run = RecordedRun(tmp_path, prepares=True)
    branches = [run.open(20 + number) for number in range(3)]
    for branch in branches:
        _ = run.send(wire.Generate, branch=branch, max_tokens=3, stop_strings=STOP)
    _ = run.send(wire.Cancel, branch=branches[2])
    specs = run.core.preparations()
    assert len(specs) == 2
    run.tape.flush()
    run.tape.begin_segment()  # with turns that wait in it
    _ = run.core.prepared(specs[0].turn, None, run.now)
    _ = run.core.prepared(specs[1].turn, "it does not compile: secret", run.now)
    run.steps()
    assert run.core.drop_link(RECORDED, run.now) == []
    run.tape.close()
    replay = Replay(run.path)
    assert sum(1 for _ in replay.steps()) > 2
    assert digests(replay.core.world) == digests(run.inner.world) and replay.notes == []
    assert all(b"secret" not in segment.read_bytes() for segment in run.path.iterdir())

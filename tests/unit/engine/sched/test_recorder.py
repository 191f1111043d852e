"""Recordings: the replay is the run, what is content stays out of them, and they never outgrow their bound."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentspeed_engine.errors import BrokenInvariant, EngineFault
from agentspeed_engine.ids import LinkId
from agentspeed_engine.protocol import messages as wire
from agentspeed_engine.protocol.token_ids import pack_ids, unpack_ids
from agentspeed_engine.sched import digest, step
from agentspeed_engine.sched.config import CoreConfig
from agentspeed_engine.sched.core import Core
from agentspeed_engine.sched.digest import digests, whole
from agentspeed_engine.sched.plan import StepPlan
from agentspeed_engine.sched.state import SchedulerState
from agentspeed_engine.serve import recording
from agentspeed_engine.serve.recording import SUFFIX, RecordingOrder, Tape
from agentspeed_engine.serve.replay import Replay
from agentspeed_engine.serve.stand_ins import Opaque
from tests.support.recorded_run import DRAWN, FIRST, LINK, STOP, RecordedRun


def replayed(path: Path) -> Replay:
    replay = Replay(path)
    for _ in replay.steps():
        pass
    return replay


def segments(path: Path) -> list[Path]:
    return sorted(path.glob(f"*{SUFFIX}"))


def everything(path: Path) -> bytes:
    return b"".join(segment.read_bytes() for segment in segments(path))


# ---- the replay is the run ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("content", [True, False])
@pytest.mark.parametrize("slots", [0, 30])
def test_a_replay_ends_in_the_recorded_state_and_passes_every_digest(tmp_path: Path, content: bool, slots: int) -> None:
    run = RecordedRun(tmp_path, content=content, host_slots=slots)
    run.life(12)
    counts = run.inner.counts()
    assert (counts["pages_saved"] > 0) == bool(slots)
    run.tape.close()
    replay = replayed(run.path)
    assert replay.compared >= run.inner.world.next_seq > 20
    assert digests(replay.core.world) == digests(run.inner.world)
    assert replay.core.counts() == counts
    assert (replay.notes, replay.broke) == ([], "")


def test_step_lines_say_what_each_step_held(tmp_path: Path) -> None:
    run = RecordedRun(tmp_path)
    branch = run.open(20)
    run.generate(branch, 3)
    run.tape.close()
    steps = list(Replay(run.path).steps())
    assert [(one.seq, one.rows, one.tokens) for one in steps] == [(0, 1, 16), (1, 1, 4), (2, 1, 1), (3, 1, 1)]
    assert [one.states["prefilling"] for one in steps] == [1, 1, 0, 0]
    assert all(sum(one.pages.values()) == 52 for one in steps)
    assert [round(one.at, 6) for one in steps] == [0.0, 0.01, 0.02, 0.03]
    assert len({one.digest for one in steps}) == 4


def test_without_content_a_stop_id_ends_the_replayed_turn_too(tmp_path: Path) -> None:
    run = RecordedRun(tmp_path)
    branch = run.open(10)
    run.stop_at = 12
    run.generate(branch, 50, stop_ids=(STOP,))
    assert run.inner.counts()["branches_held"] == 1
    assert run.inner.world.kv.branches[next(iter(run.inner.world.states))].known == 13
    run.tape.close()
    assert digests(replayed(run.path).core.world) == digests(run.inner.world)


def test_commands_that_were_refused_are_refused_again(tmp_path: Path) -> None:
    run = RecordedRun(tmp_path)
    branch = run.open(3)
    refused: list[tuple[Callable[..., wire.Command], dict[str, Any]]] = [
        (wire.Append, {"branch": branch, "ids": b"\0"}),
        (wire.Append, {"branch": branch, "ids": pack_ids([1 << 31])}),
        (wire.Append, {"branch": branch, "ids": pack_ids([1] * 500)}),
        (wire.Generate, {"branch": 77}),
        (wire.Open, {"ids": pack_ids([7] * 201)}),
        (wire.Generate, {"branch": branch, "sampling": wire.Sampling(logit_bias=((5, 1.0), (1 << 33, 1.0)))}),
        (wire.Generate, {"branch": branch, "sampling": wire.Sampling(frequency_penalty=3.0)}),
        (wire.Generate, {"branch": branch, "penalty_consumed": 99}),
    ]
    for kind, fields in refused:
        assert isinstance(run.send(kind, **fields), wire.Failed)
    run.generate(branch)
    run.tape.close()
    assert digests(replayed(run.path).core.world) == digests(run.inner.world)


def test_every_part_of_the_state_is_in_the_digest() -> None:
    source = Path(digest.__file__).read_text(encoding="utf-8")
    left_out = {"config", "oracle", "out", "rankings"}  # the last: only while a plan is made
    world = Core(CoreConfig(pages=9, context_limit=8, vocab_size=9, page_tokens=4)).world
    missing = {name for name in vars(world) if f"world.{name}" not in source and f'"{name}"' not in source}
    assert missing == left_out


def test_the_digest_changes_with_a_page_a_clock_and_an_order() -> None:
    core = Core(CoreConfig(pages=9, context_limit=8, vocab_size=9, page_tokens=4, firm_pages=0))
    seen = {whole(core.world)}
    for change in (
        lambda: core.world.kv.pages.take(1),
        lambda: core.handle(LinkId(1), wire.Open(request=1, ids=pack_ids([1])), 0.5),
        lambda: core.handle(LinkId(1), wire.Generate(request=2, branch=1), 0.5),
        lambda: core.plan(0.6),
    ):
        _ = change()
        seen.add(whole(core.world))
    assert len(seen) == 5


# ---- content ------------------------------------------------------------------------------------------------------
def secretive(folder: Path, *, content: bool) -> RecordedRun:
    """A run that is given every kind of content; segments begin in the middle of turns too."""
    run = RecordedRun(folder, content=content)
    branch = run.open(40, tenant="acme-corp", label="ada-s-session")
    _ = run.send(wire.Expect, branch=branch, seconds=5.0, tool="searching-the-web")
    run.tape.begin_segment()
    _ = run.send(
        wire.Generate,
        branch=branch,
        max_tokens=9,
        stop_ids=(STOP,),
        stop_strings=(b"the-stop-string",),
        grammar=wire.Grammar(source="the-grammar", consumed=3),
        sampling=wire.Sampling(repetition_penalty=1.25, presence_penalty=0.5, logit_bias=((STOP, 1.5),)),
        penalty_consumed=20,
    )
    for _ in range(6):
        run.steps(1)
        run.tape.begin_segment()
    run.tape.close()
    return run


def test_a_recording_has_no_ids_and_no_names(tmp_path: Path) -> None:
    data = everything(secretive(tmp_path, content=False).path)
    for word in (b"acme-corp", b"ada-s-session", b"searching-the-web", b"the-stop-string", b"the-grammar"):
        assert word not in data
    for first in (*range(FIRST, FIRST + 40), *range(DRAWN + 40, DRAWN + 50), STOP):
        for form in (first.to_bytes(4, "little") + b"", b"\xce" + first.to_bytes(4, "big")):
            assert data.count(form) <= 1, "once may be chance"
        assert pack_ids([first, first + 1]) not in data


def test_with_content_the_same_recording_has_them(tmp_path: Path) -> None:
    data = everything(secretive(tmp_path, content=True).path)
    for word in (
        b"acme-corp",
        b"ada-s-session",
        b"searching-the-web",
        b"the-stop-string",
        b"the-grammar",
        pack_ids([FIRST, FIRST + 1]),
    ):
        assert word in data


@given(first=st.integers(0, 2**32 - 1), second=st.integers(0, 2**32 - 1), at=st.integers(0, 9000))
@settings(max_examples=200, deadline=None)
def test_stand_ins_are_equal_exactly_when_the_ids_at_that_position_are(first: int, second: int, at: int) -> None:
    one, other = (VEIL.ids(pack_ids([token]), at) for token in (first, second))
    assert (one == other) == (first == second)
    assert VEIL.drawn([first], [at]) == one
    assert VEIL.ids(pack_ids([5, first, 6]), max(0, at - 1))[4:8] == (one if at else VEIL.ids(pack_ids([first]), 1))


VEIL = Opaque()


def test_the_same_id_stands_for_others_at_other_positions_and_in_other_recordings() -> None:
    row = unpack_ids(VEIL.ids(pack_ids([7] * 1000), 0))
    assert len(set(row)) > 990
    assert Opaque().ids(pack_ids([7] * 10), 0) != VEIL.ids(pack_ids([7] * 10), 0)
    assert VEIL.name("") == "" and VEIL.name("a") == VEIL.name("a") != VEIL.name("b")


# ---- the bound ----------------------------------------------------------------------------------------------------
def test_a_long_run_stays_within_its_bound_and_its_oldest_segment_replays(tmp_path: Path) -> None:
    bound = 1 << 16
    run = RecordedRun(tmp_path, most_bytes=bound, every=4, pages=200)
    sizes: list[int] = []
    for _ in range(60):
        run.life(1)
        sizes.append(sum(segment.stat().st_size for segment in segments(run.path)))
        for number in list(run.inner.world.states)[:-2]:
            _ = run.send(wire.Close, branch=number)
    assert max(sizes) <= bound and sizes[-1] > bound // 2
    assert run.tape.size == sum(segment.stat().st_size for segment in segments(run.path))
    assert segments(run.path)[0].name > f"000003{SUFFIX}", "old ones went"
    run.tape.close()
    for path in (run.path, *segments(run.path)):
        replay = replayed(path)
        assert replay.compared > 0 and replay.notes == []
    assert digests(replayed(run.path).core.world) == digests(run.inner.world)


def test_an_engine_whose_state_outgrows_the_bound_goes_on_unrecorded_and_says_so(tmp_path: Path) -> None:
    run = RecordedRun(tmp_path, most_bytes=1 << 16, pages=5000, context_limit=15_000)
    for number in range(6):
        run.generate(run.open(5000, first=FIRST + 10_000 * number), 1)
    assert len(run.said) == 1 and "record_bytes" in run.said[0]
    run.life(1)
    assert sum(segment.stat().st_size for segment in segments(run.path)) <= 1 << 16
    assert ["could not write on" in note for note in replayed(run.path).notes] == [True]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_a_disk_that_is_full_ends_the_recording_and_not_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RecordedRun(tmp_path)
    run.life(1)
    run.tape.begin_segment()
    monkeypatch.setattr(recording, "_private", lambda path, flags: os.open("/dev/full", os.O_WRONLY))
    run.tape.begin_segment()
    run.life(1)
    run.tape.close()
    assert len(run.said) == 1 and "No space left" in run.said[0]
    replay = replayed(run.path)
    assert replay.compared > 0 and ["could not write on" in note for note in replay.notes] == [True]


def test_a_write_that_the_disk_took_only_half_of_leaves_what_was_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RecordedRun(tmp_path)
    run.life(1)
    before = replayed(run.path).compared
    monkeypatch.setattr(run.tape, "_file", _Filling(run.tape._file, most=20))
    run.life(1)
    run.tape.close()
    assert len(run.said) == 1 and "No space left" in run.said[0]
    replay = replayed(run.path)
    assert replay.compared == before > 0 and len(replay.notes) == 1


class _Filling:
    """A file on a disk with room for a few more bytes."""

    def __init__(self, inner: Any, most: int) -> None:
        self.inner, self.most = inner, most

    def write(self, data: bytes) -> int:
        if not self.most:
            raise OSError(28, "No space left on device")
        took: int = self.inner.write(data[: self.most])
        self.most -= took
        return took

    def close(self) -> None:
        self.inner.close()


def test_inputs_larger_than_the_bound_leave_a_gap_that_the_replay_names(tmp_path: Path) -> None:
    bound = 1 << 16
    run = RecordedRun(tmp_path, most_bytes=bound)
    run.life(1)
    for number in range(400):
        _ = run.core.handle(LINK, wire.Open(request=9000 + number, ids=pack_ids([FIRST + number] * 100)), run.now)
        _ = run.core.drop_link(LINK, run.now)
    run.tape.flush()
    run.life(1)
    run.tape.close()
    assert run.said == [] and run.tape.size <= bound
    replay = replayed(run.path)
    assert digests(replay.core.world) == digests(run.inner.world)
    assert [("missing" in note) for note in replay.notes] == [True]


@pytest.mark.parametrize(
    ("gone", "told"), [((1,), "segment 000003 is missing"), ((1, 2), "segments 000003 to 000004 are missing")]
)
def test_segments_missing_in_the_middle_are_named_after_the_steps_before_them(
    tmp_path: Path, gone: tuple[int, ...], told: str
) -> None:
    run = RecordedRun(tmp_path)
    for _ in range(5):
        run.life(1)
        run.tape.begin_segment()
    run.tape.close()
    segments(run.path)[0].unlink()  # the oldest goes in a long run
    left = segments(run.path)
    before = sum(1 for _ in Replay(left[0]).steps())
    for place in gone:
        left[place].unlink()
    steps = 0
    with pytest.raises(EngineFault, match=told) as refused:
        for _ in Replay(run.path).steps():
            steps += 1
    assert (refused.value.code, steps) == ("invalid_request", before)
    assert "can be replayed by itself" in refused.value.remedy
    _ = replayed(left[3])


def test_a_folder_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    _ = (tmp_path / "file").write_text("")
    core = Core(CoreConfig(pages=9, context_limit=8, vocab_size=9, page_tokens=4))
    with pytest.raises(EngineFault, match="Cannot record into") as refused:
        _ = Tape(core, RecordingOrder(folder=tmp_path / "file", most_bytes=1 << 20, content=False), began=0.0)
    assert refused.value.remedy


def test_a_bound_too_small_for_the_pool_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(EngineFault, match="record_bytes") as refused:
        _ = RecordedRun(tmp_path, most_bytes=1 << 16, pages=20_000)
    assert refused.value.code == "bad_options" and list(tmp_path.rglob(f"*{SUFFIX}")) == []


# ---- the engine's bugs --------------------------------------------------------------------------------------------
def test_what_broke_the_core_breaks_the_replay_at_the_same_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = step.plan

    def breaks(world: SchedulerState, now: float) -> StepPlan | None:
        if world.next_seq == 5:
            raise BrokenInvariant("a rule that step 5 breaks")
        return honest(world, now)

    run = RecordedRun(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(step, "plan", breaks)
        with pytest.raises(BrokenInvariant) as broke:
            run.life(1)
        run.tape.close(broke.value)
        replay = replayed(run.path)
    assert replay.reproduced and replay.broke == "BrokenInvariant: a rule that step 5 breaks"
    assert replay.core.world.next_seq == 5
    cured = replayed(run.path)
    assert cured.broke == replay.broke and not cured.reproduced


def test_the_words_of_a_foreign_error_are_kept_only_with_content(tmp_path: Path) -> None:
    for content, words in ((False, "KeyError"), (True, "KeyError: 'secret'")):
        run = RecordedRun(tmp_path / str(content), content=content)
        run.life(1)
        run.tape.close(KeyError("secret"))
        assert replayed(run.path).broke == words

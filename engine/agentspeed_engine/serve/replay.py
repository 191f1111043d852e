"""Runs a recorded engine run again through the production core, step by step, and compares as it goes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import final
from zlib import crc32

import msgspec

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.ids import LinkId, StepSeq, TicketId
from agentspeed_engine.kv.node_states import Both, Host, Loading, Saving
from agentspeed_engine.kv.tree import Node
from agentspeed_engine.sched.core import Core
from agentspeed_engine.sched.digest import PARTS, digests, whole
from agentspeed_engine.sched.inspection import pages_by_owner
from agentspeed_engine.sched.plan import StepPlan, StepResult
from agentspeed_engine.sched.recorder import (
    FLIGHT,
    FORMAT,
    FRAME_HEAD,
    MAGIC,
    SUFFIX,
    Applied,
    Begun,
    Checked,
    Copied,
    Dropped,
    Ended,
    Handled,
    Header,
    Ordered,
    Planned,
    Prepared,
    Preparing,
    Record,
    decode_batch,
    decode_header,
    decode_state,
    result_of,
)
from agentspeed_engine.sched.state import SchedulerState
from agentspeed_engine.sched.state_codec import unpacked

STATES = ("held", "queued", "promoting", "prefilling", "decoding", "settling")
_REMEDY = "Give a folder that an engine wrote (option `record`), or one segment of it."
_OTHERS = "Each other segment of the recording can be replayed by itself: give its file."
_OTHER_VERSION = "Replay it with the agentspeed that recorded it."


@final
class ReplayDiffers(Exception):
    """The replayed core is not in the state that was recorded."""

    def __init__(self, step: int, field: str, recorded: str, replayed: str) -> None:
        super().__init__(f"The replay differs at step {step} in {field}: recorded {recorded}, replayed {replayed}.")
        self.step = step
        self.field = field


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The state right after a step was planned, its rows in flight."""

    seq: int
    at: float
    """Virtual seconds since the recording began."""
    rows: int
    tokens: int
    states: dict[str, int]
    """Branches per state."""
    pages: dict[str, int]
    """By owner; they add up to the pool."""
    slots_free: int
    leases: int
    firm_pages: int
    queue: int
    digest: str


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class NodeLine:
    """One node of the tree, for a person."""

    id: int
    parent: int | None
    """None below a root."""
    start: int
    end: int
    state: str
    pages: tuple[int, ...]
    slots: tuple[int, ...]
    leaf_of: tuple[int, ...]
    seed_of: tuple[int, ...]
    pinned_by: tuple[int, ...]


def nodes_of(world: SchedulerState) -> list[NodeLine]:
    """By number."""
    return [_node_line(node) for _, node in sorted(world.kv.tree.nodes.items())]


def _node_line(node: Node) -> NodeLine:
    above = node.parent
    return NodeLine(
        id=node.id,
        parent=None if above is None or above.parent is None else above.id,
        start=node.start,
        end=node.end,
        state=type(node.state).__name__,
        pages=tuple(node.pages),
        slots=tuple(node.state.slots) if isinstance(node.state, Saving | Both | Host | Loading) else (),
        leaf_of=tuple(sorted(node.leaf_of)),
        seed_of=tuple(sorted(node.seed_of)),
        pinned_by=tuple(sorted(node.pinned_by)),
    )


@final
class Replay:
    """One recording. Iterate over `steps`; then `notes` and `broke` say how it ended."""

    def __init__(self, path: Path) -> None:
        """Raises `EngineFault` (invalid_request) when `path` is no recording that this version can read."""
        self._segments = _segments(path)
        self._whole = path.is_dir()
        """Not one segment of it."""
        self._ended = False
        self.notes: list[str] = []
        self.broke = ""
        """The error that stopped the recorded engine, if one did."""
        self.reproduced = False
        """The replayed core broke at the same input."""
        self.compared = 0
        """Digests that were recorded and found equal."""
        self.header = _Segment(self._segments[0]).header
        self.core = Core(self.header.config)
        self.now = self.header.began

    def steps(self) -> Iterator[Step]:
        """Every recorded step. Raises `ReplayDiffers`, and `EngineFault` where the recording is damaged."""
        expected = 0
        for place, path in enumerate(self._segments):
            last = place == len(self._segments) - 1
            if last and place and _is_torn_head(path):
                self.notes.append(f"{path.name} was cut off before its state was whole; nothing of it is replayed")
                return
            segment = _Segment(path)
            number = segment.header.segment
            if place and number != expected:
                until = f"s {expected:06d} to {number - 1:06d} are" if number > expected + 1 else f" {expected:06d} is"
                raise _refused(path.parent, f"segment{until} missing", _OTHERS)
            expected = number + 1
            self._go_on(segment, follows=place > 0)
            yield from self._replayed(segment, last)
        if not self._ended and not self.notes and self._whole:
            self.notes.append(
                "the recording ends without a last word: its engine was killed, still runs, or could not "
                "write on; everything that was written was replayed"
            )

    def _go_on(self, segment: _Segment, *, follows: bool) -> None:
        """The next segment's state; it must be the one that the segment before led to."""
        core = Core(segment.header.config)
        core.world = segment.world
        if follows and segment.header.gap:
            self.notes.append(f"inputs before segment {segment.header.segment} are missing: they were too large")
        elif follows:
            self._compare(core.world.next_seq - 1, digests(core.world))
        self.core = core

    def _replayed(self, segment: _Segment, last: bool) -> Iterator[Step]:
        failed: Exception | None = None
        for record in segment.records(last, self.notes):
            if isinstance(record, Ended):
                self._ended = True
                self.broke, self.reproduced = record.broke, failed is not None
                return
            if failed is not None:
                raise ReplayDiffers(self.core.world.next_seq, "an error", "none", repr(failed)) from failed
            try:
                plan = self._carry_out(record)
            except (ReplayDiffers, EngineFault):
                raise
            except Exception as error:  # noqa: BLE001 - what broke the engine breaks the replay, and is what was sought
                failed = error
                continue
            if plan is not None:
                yield self._step(plan)
        if failed is not None:
            self._ended, self.broke, self.reproduced = True, f"{type(failed).__name__}: {failed}", True

    def _carry_out(self, record: Record) -> StepPlan | None:
        core = self.core
        self.now = getattr(record, "now", self.now)
        match record:
            case Handled(link=link, command=command, now=now):
                _ = core.handle(LinkId(link), command, now)
            case Dropped(link=link, now=now):
                _ = core.drop_link(LinkId(link), now)
            case Planned(now=now):
                plan = core.plan(now)
                _ = core.events()
                return plan
            case Applied(seq=seq, now=now):
                _ = core.apply(self._result(record), now)
            case Begun(ticket=ticket):
                core.begun(TicketId(ticket))
            case Copied(ticket=ticket, ok=ok, now=now):
                _ = core.copied(TicketId(ticket), ok, now)
            case Ordered():
                _ = core.host_copies()
            case Preparing():
                _ = core.preparations()
            case Prepared(turn=turn, refusal=refusal, now=now):
                _ = core.prepared(turn, refusal, now)
            case Checked(seq=seq, digests=recorded):
                self._compare(seq, recorded)
            case Ended():
                pass
        return None

    def _result(self, applied: Applied) -> StepResult:
        plan = self.core.world.flights.get(StepSeq(applied.seq))
        if plan is None:  # it came out of order then, and does so again
            return StepResult(StepSeq(applied.seq))
        try:
            return result_of(plan, applied)
        except ValueError as error:
            raise ReplayDiffers(applied.seq, "rows", "another number that draw", str(error)) from error

    def _compare(self, seq: int, recorded: tuple[bytes, ...]) -> None:
        replayed = digests(self.core.world)
        if len(recorded) > len(replayed):
            raise ReplayDiffers(seq, "parts of the state", str(len(recorded)), str(len(replayed)))
        for name, one, other in zip(PARTS, recorded, replayed, strict=False):
            if one != other:
                raise ReplayDiffers(seq, name, one.hex(), other.hex())
        self.compared += 1

    def _step(self, plan: StepPlan) -> Step:
        world = self.core.world
        states = Counter(type(state).__name__.lower() for state in world.states.values())
        return Step(
            seq=plan.seq,
            at=self.now - self.header.began,
            rows=len(plan.rows),
            tokens=sum(row.tokens for row in plan.rows),
            states={name: states[name] for name in STATES},
            pages=pages_by_owner(world),
            slots_free=world.kv.slots.free,
            leases=len(world.leases),
            firm_pages=sum(pages for _, pages in world.firm.values()),
            queue=len(world.queue),
            digest=whole(world),
        )


@final
class _Segment:
    """One file: its header and state, read at once, and its records, read on demand."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._data = _read(path)
        at = _after_magic(path, self._data)
        try:
            header, at = _frame_at(self._data, at)
            self.header: Header = decode_header(header)
            self._state, self._at = _frame_at(self._data, at)
        except _Torn as error:
            raise _refused(path, "it breaks off inside of the state it begins with", _OTHERS) from error
        except _Damaged as error:
            raise _refused(path, f"its beginning is damaged ({error})", _OTHERS) from error
        except msgspec.DecodeError as error:
            raise _refused(path, f"its header is not one of this version ({error})", _OTHER_VERSION) from error

    @property
    def world(self) -> SchedulerState:
        """The state it begins with, made anew."""
        try:
            return unpacked(decode_state(self._state), self.header.config)
        except (ValueError, msgspec.DecodeError) as error:
            raise _refused(
                self._path, str(error), f"Replay it with the agentspeed that recorded it, {self.header.engine}."
            ) from error

    def records(self, last: bool, notes: list[str]) -> Iterator[Record]:
        """In their order. A torn end is noted where a kill can have left one."""
        at = self._at
        while at < len(self._data):
            try:
                body, at = _frame_at(self._data, at)
                batch = decode_batch(body)
            except _Torn:
                if not last:
                    raise _refused(self._path, f"it breaks off at byte {at}, and others follow it", _OTHERS) from None
                notes.append(
                    f"{self._path.name} breaks off in the middle of a record (byte {at}): the engine was "
                    "killed there, or its disk was full; everything before it was replayed"
                )
                return
            except (_Damaged, msgspec.DecodeError) as error:
                raise _refused(self._path, f"it is damaged at byte {at} ({error})", _OTHERS) from error
            yield from batch


class _Torn(Exception):
    """The file ends inside a frame."""


class _Damaged(Exception):
    """A frame's bytes are not what was written."""


def _frame_at(data: bytes, at: int) -> tuple[bytes, int]:
    head = data[at : at + FRAME_HEAD]
    if len(head) < FRAME_HEAD:
        raise _Torn("it ends in a frame's head")
    length, sum_of = int.from_bytes(head[:4], "little"), int.from_bytes(head[4:], "little")
    end = at + FRAME_HEAD + length
    if end > len(data):
        raise _Torn("it ends in a frame")
    body = data[at + FRAME_HEAD : end]
    if crc32(body) != sum_of:
        raise _Damaged("a checksum is wrong")
    return body, end


def _after_magic(path: Path, data: bytes) -> int:
    end = data.find(b"\n", 0, len(MAGIC) + 12)
    if not data.startswith(MAGIC) or end < 0:
        raise _refused(path, "it is no recording of an engine")
    number = data[len(MAGIC) : end].decode("ascii", "replace")
    if number != str(FORMAT):
        raise _refused(path, f"it has format {number}, and this version reads {FORMAT}", _OTHER_VERSION)
    return end + 1


def _is_torn_head(path: Path) -> bool:
    """A kill between two segments left the newer one without its whole state."""
    data = _read(path)
    if len(data) < len(MAGIC) + 2:
        return True
    at = _after_magic(path, data)
    try:
        for _ in range(2):
            _, at = _frame_at(data, at)
    except _Torn:
        return True
    except _Damaged as error:
        raise _refused(path, f"its beginning is damaged ({error})", _OTHERS) from error
    return False


def _segments(path: Path) -> list[Path]:
    """In their order. Raises `EngineFault` when there is none."""
    if path.is_dir():
        found = sorted(path.glob(f"*{SUFFIX}"))
        if found:
            return found
        recordings = sorted(path.glob(f"*{FLIGHT}"))
        if recordings:
            raise _refused(
                path,
                f"it holds {len(recordings)} recordings, and one is replayed at a time",
                f"Give one of them; the newest is {recordings[-1]}.",
            )
        raise _refused(path, "the folder has no segments")
    if not path.exists():
        raise _refused(path, "there is no such file or folder")
    return [path]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _refused(path, str(error)) from error


def _refused(path: Path, why: str, remedy: str = _REMEDY) -> EngineFault:
    return EngineFault("invalid_request", f"{path} cannot be replayed: {why}.", remedy)

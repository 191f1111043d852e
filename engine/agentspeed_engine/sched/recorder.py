"""What is recorded of a core and how it is written: every input in its order, so that a replay is the same run.

A segment is a magic line, then frames: a header, the state it begins with, then batches of records. An input is noted
before it is carried out, so the one that broke the core is the last of its recording. Nothing here does I/O.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final, TypeAlias, final
from zlib import crc32

import msgspec

from agentspeed_engine.ids import BranchId, LinkId, StepSeq, TicketId
from agentspeed_engine.kv.views import TurnSpec
from agentspeed_engine.protocol import messages as wire
from agentspeed_engine.protocol.token_ids import unpack_ids
from agentspeed_engine.sched.config import CoreConfig
from agentspeed_engine.sched.core import Core
from agentspeed_engine.sched.digest import digests
from agentspeed_engine.sched.plan import Drawn, DrawnEnd, HostCopy, StepPlan, StepResult
from agentspeed_engine.sched.redaction import UNUSABLE, UNUSABLE_NAME, Veil, usable, usable_name
from agentspeed_engine.sched.state import Out
from agentspeed_engine.sched.state_codec import packed

FORMAT: Final = 1
MAGIC: Final = b"agentspeed flight recording "
FLIGHT: Final = ".flight"
"""How the folder of one recording is called at its end, and below, each of its segments."""
SUFFIX: Final = ".segment"
FRAME_HEAD: Final = 8
"""Length and CRC-32 of the body, little-endian uint32 each."""
ANY_ID: Final = 1 << 32
"""The vocabulary of a core that decides over stand-ins."""


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """What every segment says first."""

    engine: str
    """The version that recorded."""
    model: str
    pid: int
    started: float
    """Unix time."""
    began: float
    """The engine's clock when the recording began: virtual time 0."""
    segment: int
    content: bool
    """Ids and names are the real ones."""
    gap: bool = False
    """Inputs between the segment before and this one are missing: they were larger than the bound."""
    config: CoreConfig


class Handled(msgspec.Struct, frozen=True, array_like=True, tag="handle"):
    link: int
    now: float
    command: wire.Command


class Dropped(msgspec.Struct, frozen=True, array_like=True, tag="drop_link"):
    link: int
    now: float


class Planned(msgspec.Struct, frozen=True, array_like=True, tag="plan"):
    now: float


class Applied(msgspec.Struct, frozen=True, array_like=True, tag="apply"):
    """The rows are those of the plan; only what was drawn for those that sample is recorded, in their order."""

    seq: int
    now: float
    ids: bytes
    ends: dict[int, DrawnEnd] = {}
    """By place among the drawn."""
    refused: dict[int, str] = {}
    """By place among the rows that sample."""
    missing: tuple[int, ...] = ()
    """Rows that were to draw and did not: our bug, replayed."""
    spoilt: tuple[int, ...] = ()
    """Of the refused those whose logits are no finite numbers."""


class Begun(msgspec.Struct, frozen=True, array_like=True, tag="begun"):
    ticket: int


class Copied(msgspec.Struct, frozen=True, array_like=True, tag="copied"):
    ticket: int
    ok: bool
    now: float


class Ordered(msgspec.Struct, frozen=True, array_like=True, tag="host_copies"):
    """Tickets were handed out."""


class Preparing(msgspec.Struct, frozen=True, array_like=True, tag="preparations"):
    """Turns were handed out to be prepared."""


class Prepared(msgspec.Struct, frozen=True, array_like=True, tag="prepared"):
    turn: int
    refusal: str | None
    """Empty where only the fact is recorded."""
    now: float


class Checked(msgspec.Struct, frozen=True, array_like=True, tag="digests"):
    """Not an input: what the state was after step `seq` had been planned."""

    seq: int
    digests: tuple[bytes, ...]


class Ended(msgspec.Struct, frozen=True, array_like=True, tag="end"):
    """The engine ended in order; `broke` names the error that stopped it otherwise."""

    broke: str = ""


Record: TypeAlias = (
    Handled | Dropped | Planned | Applied | Begun | Copied | Ordered | Preparing | Prepared | Checked | Ended
)

_ENCODER = msgspec.msgpack.Encoder()
_HEADER = msgspec.msgpack.Decoder(Header)
_STATE = msgspec.msgpack.Decoder(list[Any])
_BATCH = msgspec.msgpack.Decoder(list[Record])


def frame(value: Any) -> bytes:
    """One frame of a segment."""
    body = _ENCODER.encode(value)
    return len(body).to_bytes(4, "little") + crc32(body).to_bytes(4, "little") + body


def opening(header: Header) -> bytes:
    """The magic line and the header's frame."""
    return MAGIC + b"%d\n" % FORMAT + frame(header)


def decode_header(body: bytes) -> Header:
    """Raises `msgspec.DecodeError`, as the two below."""
    return _HEADER.decode(body)


def decode_state(body: bytes) -> list[Any]:
    return _STATE.decode(body)


def decode_batch(body: bytes) -> list[Record]:
    return _BATCH.decode(body)


@final
class RecordedCore:
    """A core whose every input is noted first. It has the core's verbs, and passes on what only reads."""

    def __init__(self, core: Core, veil: Veil, *, every: int) -> None:
        """`every`: steps between two digests."""
        self._core = core
        self._veil = veil
        self._every = every
        self._records: list[Record] = []
        self.config = core.config
        self.check, self.counts, self.picture = core.check, core.counts, core.picture
        self.events, self.wake_at, self.awaits = core.events, core.wake_at, core.awaits

    # ---- for who writes it down -----------------------------------------------------------------------------------
    def taken(self) -> list[Record]:
        """What was noted since the last call."""
        records, self._records = self._records, []
        return records

    def state(self) -> list[Any]:
        """What a segment begins with; to be taken between two inputs."""
        return packed(self._core.world, self._veil)

    def checked(self) -> Checked:
        """The state as it is now."""
        return Checked(self._core.world.next_seq - 1, digests(self._core.world))

    def replayed_config(self) -> CoreConfig:
        """The configuration under which the recorded ids are replayed."""
        return self.config if self._veil.clear else replace(self.config, vocab_size=ANY_ID)

    # ---- the core's verbs -----------------------------------------------------------------------------------------
    @property
    def idle(self) -> bool:
        return self._core.idle

    def handle(self, link: LinkId, command: wire.Command, now: float) -> Out:
        if not isinstance(command, wire.GetStats | wire.Look | wire.Hello):  # these only read
            recorded = command if self._veil.clear else self._hidden(command)
            self._records.append(Handled(link, now, recorded))
        return self._core.handle(link, command, now)

    def drop_link(self, link: LinkId, now: float) -> Out:
        self._records.append(Dropped(link, now))
        return self._core.drop_link(link, now)

    def plan(self, now: float) -> StepPlan | None:
        self._records.append(Planned(now))
        plan = self._core.plan(now)
        if plan is not None and plan.seq % self._every == 0:
            self._records.append(self.checked())
        return plan

    def apply(self, result: StepResult, now: float) -> Out:
        self._records.append(self._applied(self._core.world.flights.get(result.seq), result, now))
        return self._core.apply(result, now)

    def preparations(self) -> tuple[TurnSpec, ...]:
        if self._core.world.unprepared:
            self._records.append(Preparing())
        return self._core.preparations()

    def prepared(self, turn: int, refusal: str | None, now: float) -> Out:
        told = refusal if refusal is None or self._veil.clear else ""
        self._records.append(Prepared(turn, told, now))
        return self._core.prepared(turn, refusal, now)

    def begun(self, ticket: TicketId) -> None:
        self._records.append(Begun(ticket))
        self._core.begun(ticket)

    def copied(self, ticket: TicketId, ok: bool, now: float) -> Out:
        self._records.append(Copied(ticket, ok, now))
        return self._core.copied(ticket, ok, now)

    def host_copies(self) -> tuple[HostCopy, ...]:
        orders = self._core.host_copies()
        if orders:
            self._records.append(Ordered())
        return orders

    # ---- what is noted --------------------------------------------------------------------------------------------
    def _applied(self, plan: StepPlan | None, result: StepResult, now: float) -> Applied:
        if plan is None:  # out of order: our bug, which the replay repeats
            return Applied(result.seq, now, b"")
        rows = [row for row in plan.rows if row.sample is not None]
        by_row = {(drawn.branch, drawn.epoch): drawn for drawn in result.drawn}
        ids: list[int] = []
        positions: list[int] = []
        ends: dict[int, DrawnEnd] = {}
        refused = {(branch, epoch): reason for branch, epoch, reason in result.refused}
        missing: list[int] = []
        for place, row in enumerate(rows):
            drawn = by_row.get((row.branch, row.epoch))
            if drawn is None:
                if (row.branch, row.epoch) not in refused:
                    missing.append(place)
                continue
            if not self._veil.clear and row.sample is not None and drawn.id in row.sample.stop_ids:
                ends[len(ids)] = "stop_id"
            elif drawn.end is not None:
                ends[len(ids)] = drawn.end
            ids.append(drawn.id)
            positions.append(row.end)
        reasons = (
            {
                place: refused[row.branch, row.epoch] if self._veil.clear else ""
                for place, row in enumerate(rows)
                if (row.branch, row.epoch) in refused
            }
            if refused
            else {}
        )
        spoilt = tuple(place for place in reasons if (rows[place].branch, rows[place].epoch) in result.spoilt)
        return Applied(result.seq, now, self._veil.drawn(ids, positions), ends, reasons, tuple(missing), spoilt)

    def _hidden(self, command: wire.Command) -> wire.Command:
        changed = msgspec.structs.replace
        match command:
            case wire.Open():
                return changed(
                    command,
                    ids=self._ids(command.ids, 0),
                    tenant=self._name(command.tenant),
                    label=self._name(command.label),
                )
            case wire.Append():
                return changed(command, ids=self._ids(command.ids, self._known(command.branch)))
            case wire.Generate(grammar=grammar):
                return changed(
                    command,
                    ids=self._ids(command.ids, self._known(command.branch)),
                    stop_ids=(),
                    stop_strings=tuple(bytes(len(stop)) for stop in command.stop_strings),
                    grammar=None if grammar is None else changed(grammar, source=""),
                    sampling=changed(command.sampling, logit_bias=self._bias(command.sampling.logit_bias)),
                )
            case wire.Expect():
                return changed(command, tool=self._name(command.tool))
            case _:
                return command

    def _known(self, number: int) -> int:
        state = self._core.world.states.get(BranchId(number))
        return 0 if state is None else state.branch.known

    def _name(self, text: str) -> str:
        return self._veil.name(text) if usable_name(text) else UNUSABLE_NAME

    def _bias(self, bias: tuple[tuple[int, float], ...]) -> tuple[tuple[int, float], ...]:
        """The same number of biases; one that the core refuses is replaced by one that it refuses."""
        if self._veil.clear:
            return bias
        return tuple((0 if 0 <= number < self.config.vocab_size else -1, value) for number, value in bias)

    def _ids(self, packed_ids: bytes, start: int) -> bytes:
        """Ids the core refuses are replaced by others that it refuses for the same reason."""
        if not usable(packed_ids, self.config.vocab_size):
            return UNUSABLE
        fitting = self.config.context_limit - start
        if len(packed_ids) // 4 > fitting:
            return bytes(4 * (fitting + 1))
        return self._veil.ids(packed_ids, start)


def result_of(plan: StepPlan, applied: Applied) -> StepResult:
    """The result that was recorded. Raises `ValueError` when it does not fit the plan."""
    rows = [row for row in plan.rows if row.sample is not None]
    drawing = [row for place, row in enumerate(rows) if place not in applied.refused and place not in applied.missing]
    ids = unpack_ids(applied.ids)
    if len(ids) != len(drawing):
        raise ValueError(f"{len(ids)} tokens were drawn, and {len(drawing)} rows of the replayed plan draw one")
    drawn = tuple(
        Drawn(row.branch, row.epoch, token, end=applied.ends.get(place))
        for place, (row, token) in enumerate(zip(drawing, ids, strict=True))
    )
    refused = tuple((rows[place].branch, rows[place].epoch, reason) for place, reason in applied.refused.items())
    spoilt = frozenset((rows[place].branch, rows[place].epoch) for place in applied.spoilt)
    return StepResult(StepSeq(applied.seq), drawn, refused, spoilt=spoilt)

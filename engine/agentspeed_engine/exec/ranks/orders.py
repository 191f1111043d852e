"""What rank 0 and the others tell each other, as bytes: a frame for each step, arrays as they lie in memory, and for
each host copy."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Literal, final

import msgspec
import numpy as np
from numpy.typing import NDArray

from agentspeed_engine.errors import Code, EngineFault
from agentspeed_engine.exec.penalties import Adjustment
from agentspeed_engine.exec.ranks.shard_draw import ShardSample
from agentspeed_engine.exec.sampler import Draw, NotFinite
from agentspeed_engine.ids import PageId
from agentspeed_engine.kv.views import PageCopy
from agentspeed_engine.models.inputs import FlatBatch, Run
from agentspeed_engine.protocol.messages import Sampling

_LENGTH_BYTES = 8


@final
class SampleOrder(msgspec.Struct, frozen=True, array_like=True):
    """One token to be drawn."""

    sampling: Sampling
    key: tuple[int, int, int]
    position: int
    allowed: bytearray | None = None
    """A bit for each id of the whole vocabulary, the lowest first; None: all may be drawn."""
    adjustment: tuple[bytearray, bytearray, bytearray] | None = None
    """int64 ids, and float32 scales and shifts, as `exec.penalties.Adjustment` has them."""


@final
class StepOrder(msgspec.Struct, frozen=True, array_like=True):
    """One step: `exec.step_input.StepInput` with every id known, and without what only rank 0 keeps of turns."""

    tokens: int
    selected: int
    runs: tuple[tuple[int, int, int, int, bool], ...]
    """(start, tokens, pages, queries, causal) of each; the last two but one are counts."""
    wide: bytearray
    """int64: ids, positions, slots, select, hidden."""
    narrow: bytearray
    """int32: the pages of all runs, then their queries."""
    copies: tuple[tuple[PageId, PageId, int], ...]
    """(from, to, rows)."""
    samples: tuple[SampleOrder, ...]
    tokens_per_rank: tuple[int, ...]


@final
class DrawTold(msgspec.Struct, frozen=True, array_like=True):
    """One sample of `StepDone`: `exec.sampler.Draw`, or why there is none."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    draw_logprob: float | None = None
    fault: tuple[Code, str, str] | None = None
    """As of an `EngineFault`: its code, its message and its remedy."""
    finite: bool = True
    """Not so: the fault is a `NotFinite`."""


@final
class StepDone(msgspec.Struct, frozen=True, array_like=True):
    """What a dp rank has drawn that is not rank 0's, told by the first of its ranks."""

    drawn: tuple[DrawTold, ...]
    model_seconds: float
    sampling_seconds: float


@final
class CopyOrder(msgspec.Struct, frozen=True, array_like=True):
    """Whole pages between device and host."""

    direction: Literal["save", "load"]
    pages: tuple[int, ...]
    slots: tuple[int, ...]


@final
class CopyDone(msgspec.Struct, frozen=True, array_like=True):
    """A rank's answer to `CopyOrder`."""

    failed: str | None
    """Why it was not made."""


def step_order(batch: FlatBatch, copies: tuple[PageCopy, ...], samples: tuple[SampleOrder, ...]) -> StepOrder:
    wide = (batch.ids, batch.positions, batch.slots, batch.select, batch.hidden)
    narrow = [*(run.pages for run in batch.runs), *(run.queries for run in batch.runs)]
    return StepOrder(
        tokens=len(batch.ids),
        selected=len(batch.select),
        runs=tuple((run.start, run.tokens, len(run.pages), len(run.queries), run.causal) for run in batch.runs),
        wide=_bytes(list(wide), np.int64),
        narrow=_bytes(narrow, np.int32),
        copies=tuple((copy.src, copy.dst, copy.rows) for copy in copies),
        samples=samples,
        tokens_per_rank=batch.tokens_per_rank,
    )


def batch_of(order: StepOrder) -> FlatBatch:
    """The arrays may be written to, and are views of the order's."""
    wide = np.frombuffer(order.wide, np.int64)
    cuts = list(accumulate((order.tokens, order.tokens, order.tokens, order.selected)))
    ids, positions, slots, select, hidden = np.split(wide, cuts)
    narrow = np.frombuffer(order.narrow, np.int32)
    counts = [run[2] for run in order.runs] + [run[3] for run in order.runs]
    parts = np.split(narrow, list(accumulate(counts))[:-1]) if counts else []
    half = len(order.runs)
    runs = tuple(
        Run(pages=parts[index], start=start, tokens=tokens, queries=parts[half + index], causal=causal)
        for index, (start, tokens, _, _, causal) in enumerate(order.runs)
    )
    return FlatBatch(
        ids=ids,
        positions=positions,
        slots=slots,
        runs=runs,
        select=select,
        tokens_per_rank=order.tokens_per_rank,
        hidden=hidden,
    )


def step_done(drawn: Sequence[Draw | EngineFault], model_seconds: float, sampling_seconds: float) -> StepDone:
    told = tuple(
        DrawTold(0, fault=(one.code, one.message, one.remedy), finite=not isinstance(one, NotFinite))
        if isinstance(one, EngineFault)
        else DrawTold(one.id, one.logprob, one.top, one.draw_logprob)
        for one in drawn
    )
    return StepDone(told, model_seconds, sampling_seconds)


def drawn_of(done: StepDone) -> list[Draw | EngineFault]:
    return [_outcome(one) for one in done.drawn]


def _outcome(told: DrawTold) -> Draw | EngineFault:
    if told.fault is None:
        return Draw(told.id, told.logprob, told.top, told.draw_logprob)
    return EngineFault(*told.fault) if told.finite else NotFinite(*told.fault)


def sample_order(
    sampling: Sampling,
    key: tuple[int, int, int],
    position: int,
    allowed: NDArray[Any] | None,
    adjustment: Adjustment | None,
) -> SampleOrder:
    """`allowed` [vocab]."""
    bits = None if allowed is None else bytearray(np.packbits(allowed, bitorder="little").tobytes())
    changed = None
    if adjustment is not None:
        arrays = (adjustment.ids, adjustment.scale, adjustment.shift)
        ids, scale, shift = (bytearray(np.ascontiguousarray(array).data) for array in arrays)
        changed = (ids, scale, shift)
    return SampleOrder(sampling, key, position, bits, changed)


def shard_sample(order: SampleOrder, first: int, count: int) -> ShardSample:
    """As the rank needs it that holds `count` ids from `first` on."""
    allowed: NDArray[np.bool_] | None = None
    if order.allowed is not None:
        bits = np.unpackbits(np.frombuffer(order.allowed, np.uint8), count=first + count, bitorder="little")
        allowed = bits[first:].astype(np.bool_)
    adjustment: Adjustment | None = None
    if order.adjustment is not None:
        ids = np.frombuffer(order.adjustment[0], np.int64) - first
        scale, shift = (np.frombuffer(part, np.float32) for part in order.adjustment[1:])
        mine = (ids >= 0) & (ids < count)
        adjustment = Adjustment(ids[mine], scale[mine], shift[mine])
    return ShardSample(order.sampling, order.key, order.position, allowed, adjustment)


def _bytes(parts: list[NDArray[Any]], dtype: type[np.signedinteger[Any]]) -> bytearray:
    return bytearray(np.concatenate(parts).astype(dtype, copy=False).data) if parts else bytearray()


@final
class Channel:
    """Frames over a socket, each with its length before it. One thread sends and one receives."""

    def __init__(self, peer: socket.socket, seconds: float | None = None) -> None:
        """`seconds`: how long the other side may keep this one waiting; None: for ever."""
        self._socket = peer
        self._socket.settimeout(seconds)

    def send(self, frame: bytes) -> None:
        """Raises `OSError`, of which `TimeoutError` is one."""
        self._socket.sendall(len(frame).to_bytes(_LENGTH_BYTES, "little") + frame)

    def receive(self) -> bytearray | None:
        """The next frame; None at the end. Raises `OSError`."""
        length = self._exactly(_LENGTH_BYTES)
        return None if length is None else self._exactly(int.from_bytes(length, "little"))

    def end(self) -> None:
        """Whoever sends or receives, on either side, is told of the end. From any thread."""
        with contextlib.suppress(OSError):  # the other side has ended it already
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()

    def _exactly(self, count: int) -> bytearray | None:
        frame = bytearray(count)
        view = memoryview(frame)
        while len(view):
            got = self._socket.recv_into(view)
            if not got:
                return None
            view = view[got:]
        return frame

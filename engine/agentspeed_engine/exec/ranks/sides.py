"""Who computes the rows of one dp rank: the ranks around rank 0, or ranks that tell rank 0 what they have drawn."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, final

import msgspec

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.exec.executor import CopyFailed
from agentspeed_engine.exec.ranks.group import Group, GroupBroken
from agentspeed_engine.exec.ranks.launches import LaunchOrder
from agentspeed_engine.exec.ranks.model import ShardModel, draw_together, shard_logits
from agentspeed_engine.exec.ranks.orders import (
    Channel,
    CopyDone,
    CopyOrder,
    SampleOrder,
    StepDone,
    StepOrder,
    drawn_of,
    step_order,
)
from agentspeed_engine.exec.sampler import Draw
from agentspeed_engine.kv.views import PageCopy
from agentspeed_engine.models.inputs import FlatBatch


@final
@dataclass(frozen=True, slots=True)
class DrawnStep:
    """One step of one dp rank."""

    drawn: list[Draw | EngineFault]
    model_seconds: float
    sampling_seconds: float


class Side(Protocol):
    """All of it may raise `GroupBroken` and `OSError` where a rank is lost, and `RuntimeError` of torch.distributed."""

    @property
    def page_tokens(self) -> int: ...

    def begin(self, batch: FlatBatch, copies: tuple[PageCopy, ...], samples: tuple[SampleOrder, ...]) -> None:
        """Tells a step to the ranks. `finish` is due before the next."""
        ...

    def finish(self) -> DrawnStep:
        """Returns when the step is through on every one of them."""
        ...

    def copy(self, order: CopyOrder) -> None:
        """Returns when all have made it. Raises `CopyFailed` when one has not."""
        ...


@final
class Followers:
    """Rank 0's lines to others: two each, so that no host copy waits for a step or the other way about."""

    def __init__(
        self, steps: Sequence[socket.socket], copies: Sequence[socket.socket], *, seconds: float, first: int = 1
    ) -> None:
        """Of ranks `first` and following. `seconds`: how long one of them may take no order, say nothing while it has
        to answer a step, and take longer than rank 0 for a host copy."""
        self._first = first
        self._steps = [Channel(one, seconds) for one in steps]
        self._copies = [Channel(one, seconds) for one in copies]
        self._encoder = msgspec.msgpack.Encoder()
        self._done = msgspec.msgpack.Decoder(StepDone)
        self._answers = msgspec.msgpack.Decoder(CopyDone)

    def __len__(self) -> int:
        return len(self._steps)

    def begin(self) -> None:
        """Tells those that have loaded that all have. Raises `OSError`."""
        for channel in self._steps:
            channel.send(b"")

    def step(self, order: StepOrder | LaunchOrder) -> None:
        """Raises `OSError`."""
        frame = self._encoder.encode(order)
        for channel in self._steps:
            channel.send(frame)

    def answer(self) -> StepDone:
        """Of the first of them, to the step that it was told. Raises `GroupBroken` when it does not answer, `OSError`
        when it is gone."""
        try:
            frame = self._steps[0].receive()
            while frame is not None and not frame:  # it is at work
                frame = self._steps[0].receive()
        except TimeoutError as error:
            raise GroupBroken(f"rank {self._first} did not answer in time", self._first) from error
        if frame is None:
            raise ConnectionResetError(f"rank {self._first} ended during a step")
        return self._done.decode(frame)

    def copy(self, order: CopyOrder, mine: Callable[[], None]) -> None:
        """Carries out `mine` while the others do theirs, and returns when all have. Raises `CopyFailed` when one has
        not, `GroupBroken` when one does not answer, `OSError` when one is gone."""
        frame = self._encoder.encode(order)
        for channel in self._copies:
            channel.send(frame)
        failed: list[str] = []
        try:
            mine()
        except CopyFailed as reason:
            failed.append(f"rank 0: {reason}")
        for rank, channel in enumerate(self._copies, self._first):
            try:
                answer = channel.receive()
            except TimeoutError as error:
                raise GroupBroken(f"rank {rank} did not make a host copy in time", rank) from error
            if answer is None:
                raise ConnectionResetError(f"rank {rank} ended during a host copy")
            if (why := self._answers.decode(answer).failed) is not None:
                failed.append(f"rank {rank}: {why}")
        if failed:
            raise CopyFailed("; ".join(failed))

    def close(self) -> None:
        for channel in (*self._steps, *self._copies):
            channel.close()


@final
class Home:
    """`Side` of rank 0's own dp rank: it computes its share in the calling thread."""

    def __init__(self, model: ShardModel, group: Group, followers: Followers) -> None:
        self._model, self._group, self._followers = model, group, followers
        self._told: tuple[FlatBatch, tuple[PageCopy, ...], tuple[SampleOrder, ...]] | None = None
        self.page_tokens = model.page_tokens

    def begin(self, batch: FlatBatch, copies: tuple[PageCopy, ...], samples: tuple[SampleOrder, ...]) -> None:
        if len(self._followers):
            self._followers.step(step_order(batch, copies, samples))
        self._told = batch, copies, samples

    def finish(self) -> DrawnStep:
        assert self._told is not None
        (batch, copies, samples), self._told = self._told, None
        started = time.perf_counter()
        logits = shard_logits(self._model, batch, copies)
        computed = time.perf_counter()
        drawn = draw_together(self._group, self._model, logits, samples)
        return DrawnStep(drawn, computed - started, time.perf_counter() - computed)

    def copy(self, order: CopyOrder) -> None:
        self._followers.copy(order, lambda: self._carry_out(order))

    def _carry_out(self, order: CopyOrder) -> None:
        if order.direction == "save":
            self._model.save(order.pages, order.slots)
        else:
            self._model.load(order.slots, order.pages)


@final
class Away:
    """`Side` of a dp rank without rank 0."""

    def __init__(self, followers: Followers, page_tokens: int) -> None:
        self._followers = followers
        self.page_tokens = page_tokens

    def begin(self, batch: FlatBatch, copies: tuple[PageCopy, ...], samples: tuple[SampleOrder, ...]) -> None:
        self._followers.step(step_order(batch, copies, samples))

    def finish(self) -> DrawnStep:
        done = self._followers.answer()
        return DrawnStep(drawn_of(done), done.model_seconds, done.sampling_seconds)

    def copy(self, order: CopyOrder) -> None:
        self._followers.copy(order, lambda: None)

"""The executor of rank 0: it tells the other ranks each step, computes its own share, and draws together with them."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from typing import Protocol, final

import msgspec
import numpy as np
from numpy.typing import NDArray

from agentspeed_engine.errors import BrokenInvariant, EngineFault
from agentspeed_engine.exec.automata import REFUSALS, Automata
from agentspeed_engine.exec.cpu import Computed
from agentspeed_engine.exec.executor import CopyFailed, Pending, Refusal, Sampled, Token
from agentspeed_engine.exec.penalties import Adjustment
from agentspeed_engine.exec.ranks.group import Group, GroupBroken
from agentspeed_engine.exec.ranks.model import ShardModel, draw_together, shard_logits
from agentspeed_engine.exec.ranks.orders import (
    Channel,
    CopyDone,
    CopyOrder,
    SampleOrder,
    StepOrder,
    sample_order,
    step_order,
)
from agentspeed_engine.exec.recent_tokens import RecentTokens
from agentspeed_engine.exec.sampler import Draw
from agentspeed_engine.exec.step_input import StepInput
from agentspeed_engine.exec.vocabulary import Vocabulary
from agentspeed_engine.kv.views import PageCopy, TurnSpec
from agentspeed_engine.models.inputs import FlatBatch


class Losses(Protocol):
    """Who knows how the other ranks are (`serve.rank_processes.RankProcesses`)."""

    def fault(self, error: Exception) -> EngineFault | None:
        """Why a step or a copy went wrong, where another rank is the reason."""
        ...


@final
class Followers:
    """Rank 0's lines to the others: two each, so that no host copy waits for a step or the other way about."""

    def __init__(self, steps: Sequence[socket.socket], copies: Sequence[socket.socket], *, seconds: float) -> None:
        """`seconds`: how long one of them may take no order, and how long after rank 0 it may make a host copy."""
        self._steps = [Channel(one, seconds) for one in steps]
        self._copies = [Channel(one, seconds) for one in copies]
        self._encoder = msgspec.msgpack.Encoder()
        self._answers = msgspec.msgpack.Decoder(CopyDone)

    def step(self, order: StepOrder) -> None:
        """Raises `OSError`."""
        frame = self._encoder.encode(order)
        for channel in self._steps:
            channel.send(frame)

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
        for rank, channel in enumerate(self._copies, 1):
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
class LeadingExecutor:
    """`exec.executor.Executor` over the ranks of a group. A launched step is computed when `launch` returns."""

    def __init__(
        self,
        model: ShardModel,
        vocabulary: Vocabulary,
        group: Group,
        followers: Followers,
        losses: Losses,
        *,
        depth: int = 0,
    ) -> None:
        """`depth`: steps that are planned before an earlier one was collected (`CoreConfig.depth`)."""
        self._model, self._group, self._followers, self._losses = model, group, followers, losses
        self._automata = Automata(vocabulary)
        self._tokens = RecentTokens(depth)
        self.page_tokens = model.page_tokens
        self.model_seconds = 0.0
        self.sampling_seconds = 0.0

    def launch(self, step: StepInput) -> Computed:
        self._automata.forget(step.ended)
        samples, refused = self._orders(step)
        drawn = self._computed(self._tokens.known(step), step.copies, samples)
        started = time.perf_counter()
        sampled = tuple(
            Refusal(refused[place]) if place in refused else self._token(step, place, one)
            for place, one in enumerate(drawn)
        )
        self._tokens.keep(step.step, sampled)
        self.sampling_seconds += time.perf_counter() - started
        return Computed(step.step, sampled)

    def collect(self, pending: Pending) -> Sampled:
        if not isinstance(pending, Computed):
            raise BrokenInvariant(f"step {pending.step} was not launched here")
        return pending.sampled

    def prepare(self, spec: TurnSpec) -> str | None:
        return self._automata.prepare(spec)

    def discard(self, turn: int) -> None:
        self._automata.discard(turn)

    @property
    def turns(self) -> frozenset[int]:
        """The turns of which something is kept."""
        return self._automata.turns

    def save(self, pages: Sequence[int], slots: Sequence[int]) -> None:
        self._copy(CopyOrder("save", tuple(pages), tuple(slots)), lambda: self._model.save(pages, slots))

    def load(self, slots: Sequence[int], pages: Sequence[int]) -> None:
        self._copy(CopyOrder("load", tuple(pages), tuple(slots)), lambda: self._model.load(slots, pages))

    def run(self, batch: FlatBatch) -> None:
        """One pass on all ranks of which nothing is drawn: what it costs is measured so."""
        self._computed(batch, (), ())

    # ---- one step -------------------------------------------------------------------------------------------------
    def _orders(self, step: StepInput) -> tuple[tuple[SampleOrder, ...], dict[int, str]]:
        """How each sample is drawn, and by place why some will not be."""
        started = time.perf_counter()
        orders: list[SampleOrder] = []
        refused: dict[int, str] = {}
        for place, one in enumerate(step.samples):
            allowed: NDArray[np.bool_] | None = None
            adjustment: Adjustment | None = None
            try:
                allowed, adjustment = self._automata.allowed(one), self._automata.adjustment(one)
            except REFUSALS as reason:
                refused[place] = str(reason)
            orders.append(sample_order(one.spec.sampling, one.spec.draw_key, one.position, allowed, adjustment))
        self.sampling_seconds += time.perf_counter() - started
        return tuple(orders), refused

    def _computed(
        self, batch: FlatBatch, copies: tuple[PageCopy, ...], samples: tuple[SampleOrder, ...]
    ) -> list[Draw | EngineFault]:
        """Raises `EngineFault` (rank_lost, or what the other rank said) when one is lost."""
        started = time.perf_counter()
        try:
            self._followers.step(step_order(batch, copies, samples))
            logits = shard_logits(self._model, batch, copies)
            computed = time.perf_counter()
            drawn = draw_together(self._group, self._model, logits, samples)
        except (GroupBroken, OSError, RuntimeError) as error:
            if (fault := self._losses.fault(error)) is not None:
                raise fault from error
            raise
        self.model_seconds += computed - started
        self.sampling_seconds += time.perf_counter() - computed
        return drawn

    def _token(self, step: StepInput, place: int, drawn: Draw | EngineFault) -> Token | Refusal:
        if isinstance(drawn, EngineFault):
            return Refusal(str(drawn))
        try:
            end = self._automata.end(step.samples[place], drawn.id)
            return Token(drawn.id, drawn.logprob, drawn.top, end, drawn.draw_logprob)
        except REFUSALS as reason:
            return Refusal(str(reason))

    def _copy(self, order: CopyOrder, mine: Callable[[], None]) -> None:
        try:
            self._followers.copy(order, mine)
        except (GroupBroken, OSError) as error:
            if (fault := self._losses.fault(error)) is not None:
                raise fault from error
            raise

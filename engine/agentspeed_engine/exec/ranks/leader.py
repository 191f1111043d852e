"""The executor of one dp rank, in rank 0's process: it keeps what turns have on the host, and tells ranks each step."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol, final

import numpy as np
from numpy.typing import NDArray

from agentspeed_engine.errors import BrokenInvariant, EngineFault
from agentspeed_engine.exec.automata import REFUSALS, refusal
from agentspeed_engine.exec.cpu import Computed
from agentspeed_engine.exec.executor import Pending, Refusal, Sampled, Token
from agentspeed_engine.exec.penalties import Adjustment
from agentspeed_engine.exec.ranks.group import GroupBroken
from agentspeed_engine.exec.ranks.orders import CopyOrder, SampleOrder, sample_order
from agentspeed_engine.exec.ranks.sides import Side
from agentspeed_engine.exec.recent_tokens import RecentTokens
from agentspeed_engine.exec.sampler import Draw
from agentspeed_engine.exec.step_input import StepInput
from agentspeed_engine.exec.turns_on_host import TurnsOnHost
from agentspeed_engine.exec.vocabulary import Vocabulary
from agentspeed_engine.kv.views import PageCopy
from agentspeed_engine.models.inputs import FlatBatch


class Losses(Protocol):
    """Who knows how the other ranks are (`serve.rank_processes.RankProcesses`)."""

    def fault(self, error: Exception) -> EngineFault | None:
        """Why a step or a copy went wrong, where another rank is the reason."""
        ...


@final
@dataclass(frozen=True, slots=True)
class BegunStep:
    """A step that its ranks were told."""

    step: StepInput
    refused: dict[int, str]
    """By place: why a sample will not be drawn."""


@final
class LeadingExecutor(TurnsOnHost):
    """`exec.executor.Executor` over the ranks of one dp rank. A launched step is computed when `launch` returns."""

    def __init__(self, side: Side, vocabulary: Vocabulary, losses: Losses, *, depth: int = 0) -> None:
        """`depth`: steps that are planned before an earlier one was collected (`CoreConfig.depth`)."""
        super().__init__(vocabulary, side.page_tokens)
        self._side, self._losses = side, losses
        self._tokens = RecentTokens(depth)

    def launch(self, step: StepInput) -> Computed:
        return self.finish(self.begin(step))

    def begin(self, step: StepInput, tokens_per_rank: tuple[int, ...] = ()) -> BegunStep:
        """The first half of `launch`; `finish` is the other. `tokens_per_rank`: where dp ranks are in lock-step."""
        self._automata.forget(step.ended)
        samples, refused = self._orders(step)
        batch = self._tokens.known(step)
        self._begin(replace(batch, tokens_per_rank=tokens_per_rank), step.copies, samples)
        return BegunStep(step, refused)

    def finish(self, begun: BegunStep) -> Computed:
        drawn, step = self._finish(), begun.step
        started = time.perf_counter()
        sampled = tuple(
            Refusal(begun.refused[place]) if place in begun.refused else self._token(step, place, one)
            for place, one in enumerate(drawn)
        )
        self._tokens.keep(step.step, sampled)
        self.sampling_seconds += time.perf_counter() - started
        return Computed(step.step, sampled)

    def collect(self, pending: Pending) -> Sampled:
        if not isinstance(pending, Computed):
            raise BrokenInvariant(f"step {pending.step} was not launched here")
        return pending.sampled

    def save(self, pages: Sequence[int], slots: Sequence[int]) -> None:
        self._copy(CopyOrder("save", tuple(pages), tuple(slots)))

    def load(self, slots: Sequence[int], pages: Sequence[int]) -> None:
        self._copy(CopyOrder("load", tuple(pages), tuple(slots)))

    def run(self, batch: FlatBatch) -> None:
        """One pass on its ranks of which nothing is drawn: what it costs is measured so."""
        self.begin_pass(batch)
        self.finish_pass()

    def begin_pass(self, batch: FlatBatch) -> None:
        """The first half of `run`: of a step, too, in which this dp rank has no rows."""
        self._begin(batch, (), ())

    def finish_pass(self) -> None:
        """The other half."""
        _ = self._finish()

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

    def _begin(self, batch: FlatBatch, copies: tuple[PageCopy, ...], samples: tuple[SampleOrder, ...]) -> None:
        with self._losses_named():
            self._side.begin(batch, copies, samples)

    def _finish(self) -> list[Draw | EngineFault]:
        with self._losses_named():
            done = self._side.finish()
        self.model_seconds += done.model_seconds
        self.sampling_seconds += done.sampling_seconds
        return done.drawn

    def _token(self, step: StepInput, place: int, drawn: Draw | EngineFault) -> Token | Refusal:
        if isinstance(drawn, EngineFault):
            return refusal(drawn)
        try:
            end = self._automata.end(step.samples[place], drawn.id)
            return Token(drawn.id, drawn.logprob, drawn.top, end, drawn.draw_logprob)
        except REFUSALS as reason:
            return refusal(reason)

    def _copy(self, order: CopyOrder) -> None:
        with self._losses_named():
            self._side.copy(order)

    @contextmanager
    def _losses_named(self) -> Iterator[None]:
        """Raises `EngineFault` (rank_lost, or what the other rank said) when one is lost."""
        try:
            yield
        except (GroupBroken, OSError, RuntimeError) as error:
            if (fault := self._losses.fault(error)) is not None:
                raise fault from error
            raise

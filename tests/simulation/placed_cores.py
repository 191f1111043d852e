"""The production cores of several dp ranks behind the face of one, with their steps in lock-step.

Tickets of rank r are numbered n * ranks + r, its pages and slots lie behind those of the ranks before, so that one
simulated device holds all pools, and a read across ranks would be heard.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, final

from agentspeed_engine.ids import LinkId, PageId, SlotId, StepSeq, TicketId
from agentspeed_engine.protocol import messages as wire
from agentspeed_engine.sched import dp_cores
from agentspeed_engine.sched.config import CoreConfig
from agentspeed_engine.sched.dp_cores import DpCores
from agentspeed_engine.sched.plan import HostCopy, Row, StepPlan, StepResult, TokenOf
from agentspeed_engine.sched.state import Out
from tests.simulation.marks import Glance


@final
@dataclass(slots=True)
class PlacedCores:
    """`sched.dp_cores.DpCores` as the simulated engine drives one core."""

    config: CoreConfig
    ranks: int
    every: DpCores = field(init=False)
    placed: Counter[int] = field(default_factory=Counter[int])
    """Sessions that each rank was given."""
    empty: int = 0
    """Shares without rows, of steps in which others had some."""
    _seq: int = 0
    _flying: dict[StepSeq, list[StepSeq | None]] = field(default_factory=dict[StepSeq, list[StepSeq | None]])
    """The steps of every rank that make up one of all."""
    _places: dict[tuple[int, StepSeq], tuple[StepSeq, int]] = field(
        default_factory=dict[tuple[int, StepSeq], tuple[StepSeq, int]]
    )
    """(Rank, its step) -> the step of all, and the place of its first sampled row there."""

    def __post_init__(self) -> None:
        self.every = DpCores(dp_cores.made(self.config, self.ranks))

    @property
    def cores(self) -> tuple[Any, ...]:
        return self.every.cores

    def glance(self) -> Glance:
        every = [Glance.at(core) for core in self.cores]
        counters: Counter[str] = Counter()
        for one in every:
            counters.update(one.counters)
        return Glance({number: name for one in every for number, name in one.states.items()}, dict(counters))

    def check(self) -> None:
        self.every.check()

    # ---- commands -------------------------------------------------------------------------------------------------
    def handle(self, link: LinkId, command: wire.Command, now: float) -> Out:
        out = self.every.handle(link, command, now)
        for _, message in out:
            if isinstance(message, wire.Opened):
                self.placed[message.branch % self.ranks] += 1
        return out

    def drop_link(self, link: LinkId, now: float) -> Out:
        return self.every.drop_link(link, now)

    def events(self) -> Out:
        return self.every.events()

    def wake_at(self, now: float) -> float | None:
        """With all steps in flight the end of one wakes everybody."""
        return None if self.every.full else self.every.wake_at(now)

    # ---- steps ----------------------------------------------------------------------------------------------------
    def plan(self, now: float) -> StepPlan | None:
        plans = self.every.plan_together(now)
        if plans is None:
            return None
        self._seq += 1
        seq, rows, copies, sampled = StepSeq(self._seq), list[Row](), list[Any](), 0
        self._flying[seq] = [None if plan is None else plan.seq for plan in plans]
        for rank, plan in enumerate(plans):
            if plan is None:
                self.empty += 1
                continue
            self._places[rank, plan.seq] = (seq, sampled)
            sampled += sum(row.sample is not None for row in plan.rows)
            rows += [self._row(rank, row) for row in plan.rows]
            copies += [replace(copy, src=self._page(rank, copy.src), dst=self._page(rank, copy.dst))
                       for copy in plan.copies]  # fmt: skip
        return StepPlan(seq, tuple(rows), tuple(copies))

    def apply(self, result: StepResult, now: float) -> Out:
        every = [
            None
            if seq is None
            else StepResult(
                seq,
                tuple(one for one in result.drawn if one.branch % self.ranks == rank),
                tuple(one for one in result.refused if one[0] % self.ranks == rank),
            )
            for rank, seq in enumerate(self._flying.pop(result.seq))
        ]
        return self.every.apply_together(every, now)

    def _row(self, rank: int, row: Row) -> Row:
        token_of = row.token_of
        if token_of is not None:
            seq, first = self._places[rank, token_of.step]
            token_of = TokenOf(seq, first + token_of.place)
        return replace(
            row,
            path=tuple(replace(run, pages=tuple(self._page(rank, page) for page in run.pages)) for run in row.path),
            tail_pages=tuple(self._page(rank, page) for page in row.tail_pages),
            token_of=token_of,
        )

    # ---- copies ---------------------------------------------------------------------------------------------------
    def host_copies(self) -> tuple[HostCopy, ...]:
        return tuple(
            replace(
                copy,
                ticket=TicketId(self._outside(rank, copy.ticket)),
                pages=tuple(self._page(rank, page) for page in copy.pages),
                slots=tuple(SlotId(rank * self.config.host_slots + slot) for slot in copy.slots),
            )
            for rank, core in enumerate(self.cores)
            for copy in core.host_copies()
        )

    def begun(self, ticket: TicketId) -> None:
        self.cores[ticket % self.ranks].begun(TicketId(ticket // self.ranks))

    def copied(self, ticket: TicketId, ok: bool, now: float) -> Out:
        out: Out = self.cores[ticket % self.ranks].copied(TicketId(ticket // self.ranks), ok, now)
        return out

    # ---- names ----------------------------------------------------------------------------------------------------
    def _outside(self, rank: int, number: int) -> int:
        return number * self.ranks + rank

    def _page(self, rank: int, page: PageId) -> PageId:
        return PageId(rank * self.config.pages + page)

"""Several production cores behind the face of one, as dp ranks whose steps are in lock-step.

Branches, pages, slots and tickets of rank r are numbered n * ranks + r or lie behind those of the ranks before, so that
one simulated device holds all pools, and a read across ranks would be heard.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, final

import msgspec

from agentspeed_engine.ids import BranchId, LinkId, PageId, SlotId, StepSeq, TicketId
from agentspeed_engine.protocol import messages as wire
from agentspeed_engine.sched.config import CoreConfig
from agentspeed_engine.sched.core import Core
from agentspeed_engine.sched.placing import load_of, place
from agentspeed_engine.sched.plan import HostCopy, Row, StepPlan, StepResult, TokenOf
from agentspeed_engine.sched.state import Out
from tests.simulation.marks import Glance


@final
@dataclass(slots=True)
class PlacedCores:
    """A new session goes to the rank that `place` says; everything later goes where its branch is."""

    config: CoreConfig
    ranks: int
    cores: list[Core] = field(init=False)
    placed: Counter[int] = field(default_factory=Counter[int])
    """Sessions that each rank was given."""
    empty: int = 0
    """Shares without rows, of steps in which others had some."""
    _seq: int = 0
    _flying: dict[StepSeq, list[tuple[int, StepSeq]]] = field(default_factory=dict[StepSeq, list[tuple[int, StepSeq]]])
    _places: dict[tuple[int, StepSeq], tuple[StepSeq, int]] = field(
        default_factory=dict[tuple[int, StepSeq], tuple[StepSeq, int]]
    )
    """(Rank, its step) -> the step of all, and the place of its first sampled row there."""

    def __post_init__(self) -> None:
        self.cores = [Core(self.config) for _ in range(self.ranks)]

    def glance(self) -> Glance:
        every = [Glance.at(core) for core in self.cores]
        counters: Counter[str] = Counter()
        for one in every:
            counters.update(one.counters)
        states = {
            self._outside(rank, number): name for rank, one in enumerate(every) for number, name in one.states.items()
        }
        return Glance(states, dict(counters))

    def check(self) -> None:
        for core in self.cores:
            core.check()

    # ---- commands -------------------------------------------------------------------------------------------------
    def handle(self, link: LinkId, command: wire.Command, now: float) -> Out:
        if isinstance(command, wire.Open):
            rank = self._place(command)
            self.placed[rank] += 1
            return self._told(rank, self.cores[rank].handle(link, command, now))
        rank = command.branch % self.ranks  # type: ignore[union-attr]
        inside: dict[str, int] = {"branch": command.branch // self.ranks}  # type: ignore[union-attr]
        if isinstance(command, wire.Adopt):
            assert command.child % self.ranks == rank, "a session lies on two ranks"
            inside["child"] = command.child // self.ranks
        return self._told(rank, self.cores[rank].handle(link, msgspec.structs.replace(command, **inside), now))

    def _place(self, command: wire.Open) -> int:
        """A private session shares nothing with others, so nothing is kept for it. Full ranks refuse by name."""
        root = (self.config.model, self.config.adapter, f"{command.tenant}\0{'alone' if command.private else ''}")
        loads = [load_of(core.world, root, command.ids) for core in self.cores]
        rank = place(len(command.ids) // 4, loads)
        return 0 if rank is None else rank

    def drop_link(self, link: LinkId, now: float) -> Out:
        return [one for rank, core in enumerate(self.cores) for one in self._told(rank, core.drop_link(link, now))]

    def events(self) -> Out:
        return [one for rank, core in enumerate(self.cores) for one in self._told(rank, core.events())]

    def wake_at(self, now: float) -> float | None:
        """With all steps in flight the end of one wakes everybody."""
        if self._full:
            return None
        return min((wake for core in self.cores if (wake := core.wake_at(now)) is not None), default=None)

    # ---- steps ----------------------------------------------------------------------------------------------------
    @property
    def _full(self) -> bool:
        return len(self._flying) > self.config.depth

    def plan(self, now: float) -> StepPlan | None:
        """One step of all ranks, also of those without rows: experts that others chose are theirs."""
        if self._full:
            return None
        plans = [core.plan(now) for core in self.cores]
        if not any(plans):
            return None
        self._seq += 1
        seq, rows, copies, sampled = StepSeq(self._seq), list[Row](), list[Any](), 0
        flying = self._flying[seq] = []
        for rank, plan in enumerate(plans):
            if plan is None:
                self.empty += 1
                continue
            flying.append((rank, plan.seq))
            self._places[rank, plan.seq] = (seq, sampled)
            sampled += sum(row.sample is not None for row in plan.rows)
            rows += [self._row(rank, row) for row in plan.rows]
            copies += [replace(copy, src=self._page(rank, copy.src), dst=self._page(rank, copy.dst))
                       for copy in plan.copies]  # fmt: skip
        return StepPlan(seq, tuple(rows), tuple(copies))

    def apply(self, result: StepResult, now: float) -> Out:
        out: Out = []
        for rank, seq in self._flying.pop(result.seq):
            mine = StepResult(
                seq,
                tuple(
                    replace(one, branch=BranchId(one.branch // self.ranks))
                    for one in result.drawn
                    if one.branch % self.ranks == rank
                ),
                tuple(
                    (BranchId(branch // self.ranks), epoch, why)
                    for branch, epoch, why in result.refused
                    if branch % self.ranks == rank
                ),
            )
            out = [*out, *self._told(rank, self.cores[rank].apply(mine, now))]
        return out

    def _row(self, rank: int, row: Row) -> Row:
        token_of = row.token_of
        if token_of is not None:
            seq, first = self._places[rank, token_of.step]
            token_of = TokenOf(seq, first + token_of.place)
        return replace(
            row,
            branch=BranchId(self._outside(rank, row.branch)),
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
        rank = ticket % self.ranks
        return self._told(rank, self.cores[rank].copied(TicketId(ticket // self.ranks), ok, now))

    # ---- names ----------------------------------------------------------------------------------------------------
    def _outside(self, rank: int, number: int) -> int:
        return number * self.ranks + rank

    def _page(self, rank: int, page: PageId) -> PageId:
        return PageId(rank * self.config.pages + page)

    def _told(self, rank: int, out: Out) -> Out:
        return [(link, self._renamed(rank, message)) for link, message in out]

    def _renamed(self, rank: int, message: wire.Outgoing) -> wire.Outgoing:
        changes: dict[str, Any] = {}
        if hasattr(message, "branch"):
            changes["branch"] = self._outside(rank, message.branch)
        if hasattr(message, "branches") and isinstance(message, wire.Forked):
            changes["branches"] = tuple(self._outside(rank, number) for number in message.branches)
        return msgspec.structs.replace(message, **changes)

"""The schedulers of all dp ranks behind the face of one: where a session goes, and what they are together. Pure.

A session stays with all its branches on the dp rank where it was opened, and the numbers of its branches say which one
that is (`CoreConfig.dp`), so nothing that a core hears or says is translated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import final

import msgspec

from agentspeed_engine.ids import LinkId
from agentspeed_engine.kv.tree import ID_BYTES
from agentspeed_engine.protocol.messages import MAX_LOOK, Command, DpView, GetStats, Hello, Look, Open, Picture
from agentspeed_engine.sched.config import CoreConfig
from agentspeed_engine.sched.core import Core
from agentspeed_engine.sched.placing import load_of, place
from agentspeed_engine.sched.plan import StepPlan, StepResult
from agentspeed_engine.sched.recorder import RecordedCore
from agentspeed_engine.sched.state import Out


def made(config: CoreConfig, dp: int) -> list[Core]:
    """The core of every dp rank. The pool and every limit of `config` are those of each. Raises `EngineFault`."""
    return [Core(replace(config, dp=dp, dp_index=index)) for index in range(dp)]


@final
class DpCores:
    """Steps of one core by itself are its own `plan` and `apply`."""

    def __init__(self, cores: Sequence[Core], used: Sequence[Core | RecordedCore] | None = None) -> None:
        """`used`: what is to be told in the place of each core, where that is not the core itself."""
        self._seen = tuple(cores)
        self.cores: tuple[Core | RecordedCore, ...] = self._seen if used is None else tuple(used)
        self.config = self._seen[0].config
        self._flying = 0
        """Steps of all dp ranks together that were planned and not applied."""

    # ---- commands -------------------------------------------------------------------------------------------------
    def handle(self, link: LinkId, command: Command, now: float) -> Out:
        """As `Core.handle`, on the dp rank that the command is for."""
        return self.cores[self._rank_for(command)].handle(link, command, now)

    def _rank_for(self, command: Command) -> int:
        match command:
            case Open():
                return self._placed(command)
            case Hello() | GetStats() | Look():
                return 0
            case _:
                number: int = getattr(command, "branch", 0)
                return number % len(self.cores)

    def _placed(self, command: Open) -> int:
        """Nothing is kept for a private session, which shares nothing with others. Full dp ranks refuse by name."""
        if len(self.cores) == 1:
            return 0
        salt = f"{command.tenant}\0{'alone' if command.private else ''}"
        root = (self.config.model, self.config.adapter, salt)
        rank = place(len(command.ids) // ID_BYTES, [load_of(core.world, root, command.ids) for core in self._seen])
        return 0 if rank is None else rank

    def drop_link(self, link: LinkId, now: float) -> Out:
        """As `Core.drop_link`, on all of them."""
        return [one for core in self.cores for one in core.drop_link(link, now)]

    # ---- steps of all together ------------------------------------------------------------------------------------
    @property
    def full(self) -> bool:
        """As many steps of all together are in flight as may be."""
        return self._flying > self.config.depth

    def plan_together(self, now: float) -> tuple[StepPlan | None, ...] | None:
        """One step of all dp ranks, with None for those without rows: experts that others chose may be theirs. None
        where nobody has rows, or `full`."""
        if self.full:
            return None
        plans = tuple(core.plan(now) for core in self.cores)
        if not any(plans):
            return None
        self._flying += 1
        return plans

    def apply_together(self, results: Sequence[StepResult | None], now: float) -> Out:
        """The outcome of the oldest step of all together."""
        self._flying -= 1
        return [
            one
            for core, result in zip(self.cores, results, strict=True)
            if result is not None
            for one in core.apply(result, now)
        ]

    # ---- what they are together -----------------------------------------------------------------------------------
    def events(self) -> Out:
        return [one for core in self.cores for one in core.events()]

    def wake_at(self, now: float) -> float | None:
        """As `Core.wake_at`; while nothing may be planned the end of a step is what wakes."""
        if self.full:
            return None
        return min((wake for core in self.cores if (wake := core.wake_at(now)) is not None), default=None)

    @property
    def idle(self) -> bool:
        return all(core.idle for core in self.cores)

    def check(self) -> None:
        for core in self.cores:
            core.check()

    def counts(self) -> tuple[dict[str, int], ...]:
        """As `Core.counts`, of every dp rank."""
        return tuple(core.counts() for core in self.cores)

    def picture(self, command: Look, now: float) -> Picture:
        """As `Core.picture`, of all: each describes its share of the branches that were asked for."""
        if len(self.cores) == 1:
            return self.cores[0].picture(command, now)
        share = -(-max(0, min(command.branches, MAX_LOOK)) // len(self.cores))
        seen = [core.picture(msgspec.structs.replace(command, branches=share), now) for core in self.cores]
        sessions = sorted((session for one in seen for session in one.sessions), key=lambda view: view.session)
        return msgspec.structs.replace(
            seen[0],
            sessions=tuple(sessions),
            pages=summed(one.pages for one in seen),
            slots=summed(one.slots for one in seen),
            counts=summed(one.counts for one in seen),
            tenants=summed(one.tenants for one in seen),
            tenant_quota=None if seen[0].tenant_quota is None else len(seen) * seen[0].tenant_quota,
            dp=tuple(DpView(pages=one.pages, slots=one.slots, counts=one.counts) for one in seen),
        )


def summed(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Name by name, in the order in which they first come."""
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    return dict(total)

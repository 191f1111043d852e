"""One policy under one load: a production core, a device whose steps take modelled time, and agents in closed loop."""

from __future__ import annotations

import heapq
import math
import random
from dataclasses import dataclass, field
from typing import final

from agentspeed_engine.ids import BranchId, LinkId, TicketId, pages_for
from agentspeed_engine.protocol.messages import Close, Generate, Open, Opened, TurnEnded
from agentspeed_engine.sched.config import CoreConfig
from agentspeed_engine.sched.core import Core
from agentspeed_engine.sched.plan import Drawn, StepPlan, StepResult
from agentspeed_engine.sched.state import Out
from bench.pauses_workload import CONTEXT_LIMIT, Agent, Trace, Turn, live_tokens

LINK = LinkId(1)
DRAWN_ID = 5
SLOTS_PER_PAGE = 2
"""Of a host tier, where there is one."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Seconds, for real lengths."""

    prefill_token: float = 10e-6
    decode_step: float = 3e-3
    decode_row: float = 0.5e-3
    copy_token: float = 0.8e-6


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Everything but the policy."""

    trace: Trace
    agents: int
    pressure: float
    host: bool
    seed: int
    scale: int
    warm: float
    """Virtual seconds before anything is counted: first prompts are computed and the pool fills."""
    seconds: float
    """Virtual seconds that are counted."""
    costs: Costs = field(default_factory=Costs)
    page_tokens: int = 4
    chunk: int = 512
    turns_in_place: int = 1


@final
@dataclass(slots=True)
class Counted:
    """What one run came to, after its warm-up; tokens are the scaled ones."""

    prefilled: int = 0
    """Tokens computed before the first draw of each turn that ended, over all its admissions."""
    needed: int = 0
    """Tokens those turns added: what a perfect memory would compute."""
    drawn: int = 0
    jobs: int = 0
    waits: list[float] = field(default_factory=list[float])
    """Seconds from the return of a tool to the first token."""
    wedged: bool = False
    """Nothing could ever move again."""

    @property
    def amplification(self) -> float:
        """Infinite when no turn ended."""
        return self.prefilled / self.needed if self.needed else math.inf

    def wait(self, share: float) -> float:
        ordered = sorted(self.waits) or [math.inf]
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


@final
@dataclass(slots=True)
class _Running:
    """An agent at work."""

    agent: Agent
    turn: Turn
    branch: BranchId | None = None
    due: float = 0.0
    """When its tool returns."""


@final
class Run:
    """Virtual time: events (tools that return, copies that end) happen at their own moment, also during a step."""

    def __init__(self, load: Load, policy: str) -> None:
        self.load = load
        costs, scale = load.costs, load.scale
        pages = pages_for(round(live_tokens(load.trace, load.agents, scale) / load.pressure), load.page_tokens)
        self.core = Core(
            CoreConfig(
                pages=pages,
                context_limit=CONTEXT_LIMIT // scale + 64,
                vocab_size=2**32,
                page_tokens=load.page_tokens,
                prefill_chunk=load.chunk,
                extend_tokens=load.chunk // 2,
                firm_pages=0,
                policy=policy,
                turns_in_place=load.turns_in_place,
                host_slots=SLOTS_PER_PAGE * pages if load.host else 0,
                copy_seconds_per_token=costs.copy_token * scale,
                recompute_seconds_per_token=costs.prefill_token * scale,
            )
        )
        self.now = 0.0
        self.counted = Counted()
        self._shared = random.Random(load.seed).randbytes(4 * (load.trace.shared_tokens // scale))
        self._agents = [Agent(load.trace, scale, load.seed, number) for number in range(load.agents)]
        self._running = [_Running(agent, agent.turn()) for agent in self._agents]
        self._of_branch: dict[int, _Running] = {}
        self._returns = [(number * 0.5, number) for number in range(load.agents)]
        """A heap of (when a tool returns, whose)."""
        self._copies: list[tuple[float, TicketId]] = []
        """A heap of copies by their end."""
        self._link_free = 0.0
        if policy == "oracle":
            self.core.world.oracle = lambda branch, now: max(0.0, self._of_branch[branch].due - now)

    def result(self) -> Counted:
        end = self.load.warm + self.load.seconds
        while self.now < end and not self.counted.wedged:
            plan = self.core.plan(self.now)
            self._hear(self.core.events())
            self._start_copies()
            if plan is None:
                self._wait()
            else:
                self._step(plan)
        self.core.check()
        return self.counted

    @property
    def _counts(self) -> bool:
        return self.now >= self.load.warm

    # ---- time -----------------------------------------------------------------------------------------------------
    def _wait(self) -> None:
        """Nothing to compute: on to the next thing that happens."""
        times = [heap[0][0] for heap in (self._returns, self._copies) if heap]
        wake = self.core.wake_at(self.now)
        if wake is not None:
            times.append(wake)
        if not times:
            self.counted.wedged = True
            return
        self._until(min(times))

    def _step(self, plan: StepPlan) -> None:
        load = self.load
        fed = sum(row.tokens for row in plan.rows)
        decoding = sum(row.sample is not None and row.tokens == 1 for row in plan.rows)
        seconds = load.scale * (
            load.costs.decode_step + load.costs.decode_row * decoding + load.costs.prefill_token * (fed - decoding)
        )
        self._until(self.now + seconds)
        drawn = tuple(Drawn(row.branch, row.epoch, DRAWN_ID) for row in plan.rows if row.sample is not None)
        self._hear(self.core.apply(StepResult(plan.seq, drawn, seconds=seconds), self.now))

    def _until(self, end: float) -> None:
        """Everything that happens up to `end`, in order."""
        while True:
            tool = self._returns[0][0] if self._returns else math.inf
            copy = self._copies[0][0] if self._copies else math.inf
            if min(tool, copy) > end:
                break
            self.now = max(self.now, min(tool, copy))
            if tool <= copy:
                self._resume(self._running[heapq.heappop(self._returns)[1]])
            else:
                _, ticket = heapq.heappop(self._copies)
                self._hear(self.core.copied(ticket, True, self.now))
        self.now = max(self.now, end)

    def _start_copies(self) -> None:
        """One link, one copy after the other; none is late, for each begins when the one before it ended."""
        for copy in self.core.host_copies():
            tokens = self.load.page_tokens * len(copy.pages) * self.load.scale
            self._link_free = max(self.now, self._link_free) + tokens * self.load.costs.copy_token
            heapq.heappush(self._copies, (self._link_free, copy.ticket))

    # ---- agents ---------------------------------------------------------------------------------------------------
    def _resume(self, running: _Running) -> None:
        """A tool returned: the next model call."""
        turn = running.turn
        ids = running.agent.ids(turn.append)
        if turn.fresh:
            ids = self._shared + ids
            if running.branch is not None:
                del self._of_branch[running.branch]
                self._hear(self.core.handle(LINK, Close(request=1, branch=running.branch), self.now))
            opened = self.core.handle(LINK, Open(request=1), self.now)[0][1]
            assert isinstance(opened, Opened)
            running.branch = BranchId(opened.branch)
            self._of_branch[opened.branch] = running
        assert running.branch is not None
        command = Generate(request=1, branch=running.branch, ids=ids, max_tokens=turn.output)
        self._hear(self.core.handle(LINK, command, self.now))

    def _hear(self, out: Out) -> None:
        for _, message in out:
            if isinstance(message, TurnEnded):
                self._ended(message)

    def _ended(self, message: TurnEnded) -> None:
        if message.reason == "closed":
            return
        running = self._of_branch[message.branch]
        done = running.turn
        if self._counts:
            usage = message.usage
            self.counted.prefilled += usage.new - usage.shared + usage.recomputed
            # The last token drawn before a pause has no rows yet: the next turn computes it.
            self.counted.needed += done.append + (not done.fresh)
            self.counted.drawn += usage.drawn
            self.counted.jobs += done.ends_job
            if not done.fresh:
                self.counted.waits.append(message.usage.queue_seconds + message.usage.prefill_seconds)
        running.due = self.now + done.pause
        running.turn = running.agent.turn()
        heapq.heappush(self._returns, (running.due, self._running.index(running)))

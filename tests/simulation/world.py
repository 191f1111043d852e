"""One simulated run: production `kv` and `sched`, a virtual clock, a device that takes its time, agents and faults.

Everything happens in the order of one heap of moments; chance comes from named streams of one seed. So a seed is a
run, and the same seed is the same run.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any, final

import msgspec

from agentspeed_engine.clock import VirtualClock
from agentspeed_engine.errors import BrokenInvariant
from agentspeed_engine.ids import LinkId
from agentspeed_engine.protocol import messages as wire
from agentspeed_engine.sched.core import Core
from agentspeed_engine.sched.plan import HostCopy, StepPlan
from agentspeed_engine.sched.recorder import RecordedCore
from agentspeed_engine.sched.state import Out
from tests.simulation import checkers
from tests.simulation.agents import Agent, Ending, Refused, cast, hog
from tests.simulation.branches import Branches
from tests.simulation.checkers import Checkers, Sight, Violation
from tests.simulation.device import Device, Step, WrongRow
from tests.simulation.faults import Faults
from tests.simulation.front import Alone, Answer, Ask, Died, Ends, Handle, Join, Sleep, Start, Tool
from tests.simulation.marks import Event, Glance, marks_of
from tests.simulation.moments import Moments
from tests.simulation.outcome import Outcome
from tests.simulation.placed_cores import PlacedCores
from tests.simulation.workload import VOCABULARY, Workload

_LAST = 25
_BY_THEMSELVES = frozenset({"clock_jumps", "abort", "client_gone", "famine", "engine_killed"})
"""Faults that strike between events; the others wait for a step, a copy or a tool."""
_SPINS = 1000
"""Wake-ups at one moment without anything moving."""


@final
class Simulation:
    """The world around one core. `run` once."""

    def __init__(
        self,
        workload: Workload,
        seed: int,
        *,
        sight: Sight = Sight.LEDGER,
        recorded: Callable[[Core], RecordedCore] | None = None,
        ranks: int = 1,
    ) -> None:
        """`recorded`: what notes the inputs of each core that is started, one after every death of the engine. `ranks`:
        dp ranks, each with a core and a pool of the workload's size."""
        self.workload = workload
        self._recorded, self._ranks = recorded, ranks
        self.seed = seed
        self.clock = VirtualClock()
        self.faults = Faults.of(workload, seed)
        self.checkers = Checkers(sight)
        self._within = random.Random(f"{workload.name}/within-steps/{seed}")
        self._pace = random.Random(f"{workload.name}/device/{seed}")
        self._moments = Moments()
        self._life = 0
        self._request = 0
        self._hogs = 0
        self._asked: dict[int, tuple[Agent | None, Handle, wire.Command]] = {}
        self._branches = Branches(self.checkers)
        self._agents: dict[str, Agent] = {}
        self._busy: dict[str, Agent] = {}
        """Those that are neither done nor stuck."""
        self._kinds = {fault.kind for fault in workload.faults}
        self._joining: list[tuple[Agent, tuple[Agent, ...]]] = []
        self._last: deque[str] = deque(maxlen=_LAST)
        self._trace = hashlib.blake2b(digest_size=16)
        self._marks: Counter[str] = Counter()
        self._events = self._steps = self._turns = 0
        self._longest_turn = 0.0
        self._links = 0
        self._gone: set[LinkId] = set()
        self._boot()

    def run(self) -> Outcome:
        """To the end of all agents, then of all sessions."""
        violation: str | None = None
        try:
            self._begin()
            self._live()
            checkers.everybody_came_to_an_end(list(self._agents.values()), list(self._branches))
            self._close()
        except (Violation, WrongRow) as broken:
            violation = str(broken)
        except BrokenInvariant as broken:
            violation = f"stopped: the engine found its own rule broken: {broken}"
        except (LookupError, ValueError, AssertionError) as crash:
            violation = f"crash: {crash!r}"
        return Outcome(
            self.workload.name,
            self.seed,
            violation,
            list(self._last),
            self._trace.hexdigest(),
            self._marks,
            self.faults.counts,
            self._events,
            self._steps,
            self._turns,
            self.clock.now(),
            self._longest_turn,
            self.checkers.granted,
            self.checkers.broken,
            self.checkers.leaked_pages,
            self._agents,
        )

    # ---- time -----------------------------------------------------------------------------------------------------
    def _in_this_life(self, when: float, action: Callable[[], None]) -> None:
        """Something of the engine that runs now: it dies with it."""
        life = self._life

        def unless_dead() -> None:
            if self._life == life:
                action()

        self._moments.add(when, unless_dead, work=True)

    def _stand_still(self, seconds: float) -> None:
        """The machine stops and goes on: clocks and tools have moved, its own work is where it was."""
        self._moments.put_off_work(seconds)
        self._device.stand_still(seconds)
        self._device_free_at += seconds
        self._copier_free_at += seconds
        self._forward(self.clock.now() + seconds)

    def _live(self) -> None:
        """Moment after moment, until nothing is left that could happen."""
        spins = 0
        while True:
            self._pump()
            self._strike()
            wake = self.core.wake_at(self.clock.now())
            following = self._moments.next_at()
            if following is None and wake is None:
                return
            if following is None or (wake is not None and wake < following):
                assert wake is not None
                spins = spins + 1 if wake <= self.clock.now() else 0
                if spins > _SPINS:
                    raise Violation("wedged: the core wants to be asked again and again and does nothing")
                self._forward(wake)
                continue
            spins = 0
            when, action = self._moments.pop()
            self._forward(when)
            action()
            self._strike()

    def _forward(self, when: float) -> None:
        self.clock.advance(max(0.0, when - self.clock.now()))
        if self.clock.now() > self.workload.horizon:
            raise Violation(f"wedged: after {self.workload.horizon:g} s these are not done: {', '.join(self._busy)}")
        bound = self.workload.expect.longest_turn
        if bound is not None:
            for handle in self._branches:
                if handle.running and self.clock.now() - handle.started_at > bound:
                    raise Violation(f"starved: a turn of branch {handle.number} runs for more than {bound:g} s")

    # ---- the engine -----------------------------------------------------------------------------------------------
    def _boot(self) -> None:
        config = self.workload.engine.config()
        self.core: Any = Core(config) if self._ranks == 1 else PlacedCores(config, self._ranks)
        self._driven = self.core if self._recorded is None else self._recorded(self.core)
        pages, slots = config.pages * self._ranks, config.host_slots * self._ranks
        self._device = Device(pages, slots, config.page_tokens, VOCABULARY, self._within)
        self._device_free_at = self._copier_free_at = self.clock.now()
        self._progress = -math.inf

    def _call(self, call: str, what: str, action: Callable[[], Out], branch: int = 0) -> None:
        """One call of the core, looked at from both sides."""
        before = self._glance()
        out = action()
        said = tuple(message for to, message in out if to not in self._gone)
        event = Event(self.clock.now(), call, what, branch, before, self._glance(), said)
        self._events += 1
        self._record(event)
        for message in said:
            self._hear(message)
        if isinstance(self.core, PlacedCores):
            self.core.check()
        else:
            self.checkers.after(self.core, event)

    def _glance(self) -> Glance:
        return self.core.glance() if isinstance(self.core, PlacedCores) else Glance.at(self.core)

    def _record(self, event: Event) -> None:
        line = str(event)
        self._trace.update(line.encode())
        self._marks.update(marks_of(event))
        if event.call != "plan" or not line.endswith("plan"):  # one that found nothing to do says nothing
            self._last.append(line)

    def _pump(self) -> None:
        """Plans as long as there is something to plan, as the engine's loop does after every event."""
        while (plan := self._plan()) is not None:
            self._launch(plan)
        for copy in self._driven.host_copies():
            self._copy(copy)

    def _plan(self) -> StepPlan | None:
        found: list[StepPlan | None] = []

        def plan() -> Out:
            found.append(self._driven.plan(self.clock.now()))
            return self._driven.events()

        self._call("plan", "", plan)
        return found[0]

    def _launch(self, plan: StepPlan) -> None:
        """Steps begin when they are planned and end one after the other."""
        self._steps += 1
        pace = self.workload.device.step
        now = self.clock.now()
        self._device_free_at = ends = max(now, self._device_free_at) + self._pace.uniform(pace.low, pace.high)
        dies = self.faults.strikes("rank_dies") is not None
        step = self._device.begin(plan, [self._branches.rows_of(row) for row in plan.rows], now, ends)
        self._in_this_life(ends, lambda: self._reopen("a rank died in a step") if dies else self._done(step))

    def _done(self, step: Step) -> None:
        self._device.carry_out(self.clock.now())
        result = self._device.result(step)
        if result.drawn and self.faults.strikes("turn_refused") is not None:
            token = result.drawn[0]
            refusal = (token.branch, token.epoch, "its grammar admits no token")
            result = replace(result, drawn=result.drawn[1:], refused=(refusal,))
        if result.drawn and self.faults.strikes("turn_spoilt") is not None:
            token = result.drawn[0]
            refusal = (token.branch, token.epoch, "its logits are no finite numbers")
            spoilt = frozenset({(token.branch, token.epoch)})
            result = replace(result, drawn=result.drawn[1:], refused=(*result.refused, refusal), spoilt=spoilt)
        self._call("apply", f"step {result.seq}", lambda: self._driven.apply(result, self.clock.now()))

    def _copy(self, order: HostCopy) -> None:
        """One copy after the other, in a thread of its own; one whose time to begin has passed does not begin."""
        pace = self.workload.device.copy
        late = self.faults.strikes("copy_late") or 0.0
        ok = self.faults.strikes("copy_fails") is None
        begins = max(self.clock.now(), self._copier_free_at) + late
        takes = self._pace.uniform(pace.low, pace.high)
        self._copier_free_at = begins + takes

        def begin() -> None:
            if not order.may_begin(self.clock.now(), self._progress):
                self._copied(order, False)
            else:
                self._driven.begun(order.ticket)
                self._in_this_life(self.clock.now() + takes, lambda: carry_out(ok))

        def carry_out(ok: bool) -> None:
            self._device.copy(order, self.clock.now(), ok=ok)
            self._progress = order.progress(self.clock.now(), self._progress)
            self._copied(order, ok)

        self._in_this_life(begins, begin)

    def _copied(self, order: HostCopy, ok: bool) -> None:
        what = f"{order.direction} {'done' if ok else 'failed'}"
        self._call("copied", what, lambda: self._driven.copied(order.ticket, ok, self.clock.now()))

    def _reopen(self, why: str) -> None:
        """The engine is gone with all it held. Another one starts; fronts open their sessions again when they need
        them, with the ids they mirrored."""
        self._life += 1
        before = self._glance()
        self._boot()
        self.checkers.forget()
        self._record(Event(self.clock.now(), "reopen", why, 0, before, self._glance()))
        self._branches.forget()
        asked, self._asked = self._asked, {}
        for agent, _, _ in asked.values():
            if agent is not None:
                self._resume(agent, Died())
        for agent in self._busy.values():
            if isinstance(agent.on, Ends):
                self._resume(agent, Died())

    # ---- what the core says ---------------------------------------------------------------------------------------
    def _hear(self, message: wire.Outgoing) -> None:
        match message:
            case wire.Tokens():
                self._branches.drawn(message)
            case wire.TurnEnded():
                self._turn_ended(message)
            case wire.TurnStarted() | wire.LeaseChanged():
                pass
            case _:
                self._answered(message)

    def _turn_ended(self, message: wire.TurnEnded) -> None:
        handle = self._branches.turn_ended(message)
        self._turns += 1
        self._longest_turn = max(self._longest_turn, self.clock.now() - handle.started_at)
        for agent in self._busy.values():
            if isinstance(agent.on, Ends) and agent.on.handle is handle:
                self._resume(agent, message)

    def _answered(self, reply: wire.Outgoing) -> None:
        assert not isinstance(reply, wire.Tokens | wire.TurnStarted | wire.TurnEnded | wire.LeaseChanged)
        agent, handle, command = self._asked.pop(reply.request)
        self._branches.take_effect(handle, command, reply, self.clock.now())
        if agent is not None:
            self._resume(agent, reply)

    # ---- agents ---------------------------------------------------------------------------------------------------
    def _begin(self) -> None:
        for when, agent in cast(self.workload, self.seed):
            self._links = max(self._links, agent.link)
            self._join_in(agent, when)

    def _join_in(self, agent: Agent, when: float) -> None:
        self._agents[agent.label] = self._busy[agent.label] = agent
        self._moments.add(when, lambda: self._step(agent, agent.waits, None))

    def _resume(self, agent: Agent, answer: Answer, after: float = 0.0) -> None:
        """Its script goes on a moment later, when everything that was said with the answer has been heard."""
        agent.on = None
        waits = agent.waits
        self._moments.add(self.clock.now() + after, lambda: self._step(agent, waits, answer))

    def _step(self, agent: Agent, waits: int, answer: Answer) -> None:
        if agent.state != "running" or agent.waits != waits:
            return
        agent.waits += 1
        script = agent.script
        assert script is not None
        try:
            effect = next(script) if answer is None and agent.waits == 1 else script.send(answer)
        except StopIteration:
            self._over(agent, "finished")
            return
        except Refused as refused:
            agent.refused.append(refused.code)
            self._over(agent, "refused")
            return
        agent.on = effect
        match effect:
            case Ask():
                self._ask(agent, effect.handle, effect.command)
            case Ends(handle=handle):
                if handle.ended is not None or not handle.running:
                    self._resume(agent, handle.ended if handle.ended is not None else Died())
            case Sleep(seconds=seconds):
                self._resume(agent, None, seconds)
            case Tool(seconds=seconds):
                if self.faults.strikes("tool_never_returns") is None:
                    self._resume(agent, None, seconds)
                else:
                    self._over(agent, "stuck")
            case Start(agent=other):
                self._join_in(other, self.clock.now())
                self._resume(agent, None)
            case Join(agents=agents):
                self._joining.append((agent, agents))
                self._look_for_joins()
            case Alone():
                self._resume(agent, all(one.spec.kind == agent.spec.kind for one in self._busy.values()))

    def _over(self, agent: Agent, state: Ending) -> None:
        agent.state = state
        del self._busy[agent.label]
        self._look_for_joins()

    def _look_for_joins(self) -> None:
        """Who waited for agents that are all done goes on; who waits for one that is stuck is stuck."""
        waiting, self._joining = self._joining, []
        while waiting:
            agent, others = waiting.pop(0)
            states = {other.state for other in others}
            if agent.state != "running":
                continue
            if "running" in states:
                self._joining.append((agent, others))
            elif "stuck" in states:
                self._over(agent, "stuck")
            else:
                self._resume(agent, None)

    def _ask(self, agent: Agent | None, handle: Handle, command: wire.Command) -> None:
        if handle.number is None and not isinstance(command, wire.Open):
            assert agent is not None
            self._resume(agent, Died())
            return
        self._request += 1
        command = msgspec.structs.replace(command, request=self._request)
        self._asked[self._request] = (agent, handle, command)
        self.checkers.told(self.core, handle, command)
        self._call(
            "handle",
            type(command).__name__,
            lambda: self._driven.handle(handle.link, command, self.clock.now()),
            handle.number or 0,
        )

    # ---- faults ---------------------------------------------------------------------------------------------------
    def _strike(self) -> None:
        """The points at which something may go wrong by itself: after every event, and after every plan."""
        if self._kinds.isdisjoint(_BY_THEMSELVES):
            return
        jump = self.faults.strikes("clock_jumps")
        if jump is not None:
            self._stand_still(jump)
        running = [handle for handle in self._branches if handle.running]
        if running and self.faults.strikes("abort") is not None:
            handle = running[self.faults.one_of(len(running))]
            self._ask(None, handle, wire.Cancel(request=0, branch=handle.number or 0, cut=handle.before))
        busy = list(self._busy.values())
        if not busy:
            return
        if self.faults.strikes("client_gone") is not None:
            self._client_gone(busy[self.faults.one_of(len(busy))].link)
        if self.faults.strikes("famine") is not None:
            self._hogs += 1
            self._links += 1
            self._join_in(hog(self.workload, self._hogs, LinkId(self._links)), self.clock.now())
        if self.faults.strikes("engine_killed") is not None:
            self._reopen("the engine was killed")

    def _client_gone(self, link: LinkId) -> None:
        self._gone.add(link)
        for agent in [agent for agent in self._busy.values() if agent.link == link]:
            agent.state = "gone"
            del self._busy[agent.label]
        for number, (_, handle, _) in list(self._asked.items()):
            if handle.link == link:
                del self._asked[number]
        self._call("drop_link", f"link {link}", lambda: self._driven.drop_link(link, self.clock.now()))
        self._branches.drop(link)
        self._look_for_joins()

    def _close(self) -> None:
        """Whatever is still open closes; then nothing may be left."""
        for link in sorted({handle.link for handle in self._branches}):
            self._client_gone(link)
        self.faults.sources.clear()
        self._live()
        cores = self.core.cores if isinstance(self.core, PlacedCores) else [self.core]
        left = sum(checkers.pages_nobody_can_have(core, self.clock.now()) for core in cores)
        self.checkers.leaked_pages = left
        if left:
            raise Violation(f"leak: {left} pages cannot be had by anybody after all sessions closed")
        for core in cores:
            checkers.nothing_is_left(core, self.clock.now())

"""Random histories of every verb, acknowledgement and death, against a naive model: one list of ids per branch."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from agentspeed_engine.ids import LinkId, pages_for
from agentspeed_engine.protocol import messages as wire
from agentspeed_engine.protocol.token_ids import pack_ids, unpack_ids
from agentspeed_engine.sched.config import CoreConfig
from agentspeed_engine.sched.core import Core
from agentspeed_engine.sched.plan import HostCopy, StepResult
from agentspeed_engine.sched.state import Out
from tests.support.fake_device import FakeDevice

VOCABULARY, STOP = 7, 6
IDS = st.lists(st.integers(0, 2), max_size=9)


def small_core(
    page: int, limit: int, spare: int, chunk: int, depth: int, ahead: bool, slots: int, policy: str, places: int
) -> Core:
    """A pool in which every turn fits and little more, so that histories meet every shortage."""
    return Core(
        CoreConfig(
            pages=pages_for(limit, page) + 1 + spare,
            firm_pages=min(1, spare),
            context_limit=limit,
            vocab_size=VOCABULARY,
            page_tokens=page,
            prefill_chunk=chunk,
            extend_tokens=2,
            max_branches=6,
            max_sessions=4,
            depth=depth,
            decode_ahead=ahead and depth > 0,
            host_slots=slots,
            policy=policy,
            turns_in_place=places,
        )
    )


CORES = st.builds(
    small_core,
    page=st.sampled_from([2, 3, 4]),
    limit=st.sampled_from([12, 20]),
    spare=st.integers(0, 6),
    chunk=st.sampled_from([3, 8]),
    depth=st.integers(0, 2),
    ahead=st.booleans(),
    slots=st.sampled_from([0, 2, 5, 40]),
    policy=st.sampled_from(["next_use", "lru", "ttl", "min_waste"]),
    places=st.sampled_from([1, 2, 5, 32]),
)


class Ownership(RuleBasedStateMachine):
    """The engine's core between a user who does anything at any time and a device that checks every row."""

    @initialize(core=CORES, poison=st.sampled_from([None, 5]))
    def start(self, core: Core, poison: int | None) -> None:
        self.core = core
        self.device = FakeDevice(core.config.page_tokens, VOCABULARY, poison)
        self.logs: dict[int, list[int]] = {}
        self.running: set[int] = set()
        self.flights: list[StepResult] = []
        self.orders: list[HostCopy] = []
        self.now = 0.0
        self.request = 0
        self.asked: dict[int, wire.Command] = {}

    # ---- what the user does ---------------------------------------------------------------------------------------
    @rule(ids=IDS, private=st.booleans())
    def open(self, ids: list[int], private: bool) -> None:
        self.send(wire.Open(request=self.fresh(), ids=pack_ids(ids), private=private))

    @rule(pick=st.integers(0, 30), ids=IDS, most=st.sampled_from([None, 0, 1, 3]))
    def generate(self, pick: int, ids: list[int], most: int | None) -> None:
        self.begin(pick, ids, most)

    @rule(pick=st.integers(0, 30), ids=IDS)
    def append(self, pick: int, ids: list[int]) -> None:
        self.send(wire.Append(request=self.fresh(), branch=self.pick(pick), ids=pack_ids(ids)))

    @rule(pick=st.integers(0, 30), n=st.integers(1, 2), at=st.none() | st.integers(0, 12))
    def fork(self, pick: int, n: int, at: int | None) -> None:
        self.send(wire.Fork(request=self.fresh(), branch=self.pick(pick), n=n, at=at))

    @rule(pick=st.integers(0, 30), tokens=st.integers(0, 14))
    def rewind(self, pick: int, tokens: int) -> None:
        self.send(wire.Rewind(request=self.fresh(), branch=self.pick(pick), tokens=tokens))

    @rule(pick=st.integers(0, 30), cut=st.none() | st.integers(0, 14))
    def cancel(self, pick: int, cut: int | None) -> None:
        self.send(wire.Cancel(request=self.fresh(), branch=self.pick(pick), cut=cut))

    @rule(pick=st.integers(0, 30), child=st.integers(0, 30))
    def adopt(self, pick: int, child: int) -> None:
        self.send(wire.Adopt(request=self.fresh(), branch=self.pick(pick), child=self.pick(child)))

    @rule(pick=st.integers(0, 30), keep=st.sampled_from(["soft", "firm"]))
    def expect(self, pick: int, keep: wire.Keep) -> None:
        self.send(wire.Expect(request=self.fresh(), branch=self.pick(pick), seconds=2.0, keep=keep))

    @rule(pick=st.integers(0, 30))
    def close(self, pick: int) -> None:
        self.send(wire.Close(request=self.fresh(), branch=self.pick(pick)))

    @rule(pick=st.integers(0, 30), ids=IDS, most=st.sampled_from([1, 3]), rounds=st.integers(0, 6))
    def turn(self, pick: int, ids: list[int], most: int, rounds: int) -> None:
        """One that gets some way, or to its end."""
        self.begin(pick, ids, most)
        for _ in range(rounds):
            _ = self.advance()
            if self.flights:
                self.acknowledge()

    # ---- what the machine does ------------------------------------------------------------------------------------
    @rule(seconds=st.floats(0, 5))
    def step(self, seconds: float) -> None:
        self.now += seconds
        self.advance()

    @precondition(lambda self: bool(self.flights))
    @rule()
    def acknowledge(self) -> None:
        self.hear(self.core.apply(self.flights.pop(0), self.now))

    @precondition(lambda self: bool(self.orders))
    @rule(pick=st.integers(0, 3), ok=st.sampled_from([True, True, False]))
    def copied(self, pick: int, ok: bool) -> None:
        """Copies end in any order. One that comes after its deadline may not have begun."""
        order = self.orders.pop(pick % len(self.orders))
        if ok and self.now < order.begin_by:
            self.device.copy(order)
        self.hear(self.core.copied(order.ticket, ok and self.now < order.begin_by, self.now))

    def begin(self, pick: int, ids: list[int], most: int | None) -> None:
        branch = self.pick(pick)
        self.send(
            wire.Generate(request=self.fresh(), branch=branch, ids=pack_ids(ids), max_tokens=most, stop_ids=(STOP,))
        )

    def advance(self) -> bool:
        plan = self.core.plan(self.now)
        self.hear(self.core.events())
        self.orders += self.core.host_copies()
        if plan is None:
            return False
        self.flights.append(self.device.execute(plan, {row.branch: self.logs[row.branch] for row in plan.rows}))
        return True

    @invariant()
    def the_ledger_balances(self) -> None:
        if hasattr(self, "core"):
            self.core.check()

    def teardown(self) -> None:
        """Users fall silent: every turn ends. Fronts go: every page is free or cached."""
        if not hasattr(self, "core"):
            return
        for _ in range(2000):
            moved = self.advance()
            if self.flights:
                self.acknowledge()
            elif not moved:
                wake = self.core.wake_at(self.now)  # copies nobody carries out fail by their deadlines
                if wake is None:
                    break
                self.now = wake
        self.core.check()
        assert not self.running, f"turns of {self.running} never ended: {self.core.counts()}"
        assert self.core.drop_link(LinkId(1), self.now) == []
        counts = self.core.counts()
        assert counts["branches"] == counts["sessions"] == counts["pages_tail"] == 0
        assert counts["pages_free"] + counts["pages_nodes"] == counts["pages_total"]
        assert counts["tickets"] == 0

    # ---- the naive model ------------------------------------------------------------------------------------------
    def fresh(self) -> int:
        self.request += 1
        return self.request

    def pick(self, number: int) -> int:
        """A branch, one that nobody knows for one number in thirty. Where there is none a session is opened: of most
        histories hypothesis leaves some rules out, and one without sessions shows nothing."""
        if not self.logs:
            self.send(wire.Open(request=self.fresh()))
        branches = sorted(self.logs)
        return branches[number % len(branches)] if number < 30 else 10_000

    def send(self, command: wire.Command) -> None:
        self.asked[command.request] = command
        self.hear(self.core.handle(LinkId(1), command, self.now))

    def hear(self, out: Out) -> None:
        for _, message in out:
            match message:
                case wire.Opened(branch=branch, request=request):
                    asked = self.asked[request]
                    assert isinstance(asked, wire.Open)
                    self.logs[branch] = list(unpack_ids(asked.ids))
                case wire.Forked(branches=branches, known=known, request=request):
                    asked = self.asked[request]
                    assert isinstance(asked, wire.Fork)
                    for branch in branches:
                        self.logs[branch] = self.logs[asked.branch][:known]
                case wire.Tokens(branch=branch, ids=ids):
                    self.logs[branch] += unpack_ids(ids)
                case wire.TurnEnded(branch=branch, known=known):
                    self.running.discard(branch)
                    del self.logs[branch][known:]
                case wire.Done(request=request, known=known):
                    self.done(self.asked[request], known)
                case wire.TurnStarted(usage=usage):
                    assert usage.new >= 0 and usage.recomputed >= 0 and usage.shared <= usage.new
                case _:
                    pass

    def done(self, asked: wire.Command, known: int) -> None:
        match asked:
            case wire.Generate(branch=branch, ids=ids):
                self.logs[branch] += unpack_ids(ids)
                self.running.add(branch)
            case wire.Append(branch=branch, ids=ids):
                self.logs[branch] += unpack_ids(ids)
            case wire.Rewind(branch=branch) | wire.Cancel(branch=branch):
                del self.logs[branch][known:]
            case wire.Adopt(branch=branch, child=child):
                self.logs[branch] = self.logs.pop(child)
            case wire.Close(branch=branch):
                del self.logs[branch]
                self.running.discard(branch)
                return
            case _:
                raise AssertionError(f"Done for {asked}")
        assert len(self.logs[branch]) == known


TestOwnership = Ownership.TestCase
TestOwnership.settings = settings(
    max_examples=150, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)

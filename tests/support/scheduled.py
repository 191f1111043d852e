"""A core, a device that checks every row, and one front, driven turn by turn: what scheduler tests share."""

from __future__ import annotations

from collections.abc import Sequence

from agentspeed_engine.ids import LinkId
from agentspeed_engine.protocol import messages as wire
from agentspeed_engine.protocol.token_ids import pack_ids, unpack_ids
from agentspeed_engine.sched.config import CoreConfig
from agentspeed_engine.sched.core import Core
from agentspeed_engine.sched.plan import HostCopy
from agentspeed_engine.sched.state import Out
from tests.support.fake_device import FakeDevice

LINK = LinkId(1)
VOCABULARY = 97


class Scheduled:
    """`host` decides how each copy ends: True, False, or None for one that is never reported."""

    def __init__(self, **options: object) -> None:
        chosen: dict[str, object] = {
            "pages": 12,
            "context_limit": 32,
            "page_tokens": 4,
            "firm_pages": 0,
            "prefill_chunk": 16,
        } | options
        self.core = Core(CoreConfig(vocab_size=VOCABULARY, **chosen))  # type: ignore[arg-type]
        self.device = FakeDevice(self.core.config.page_tokens, VOCABULARY)
        self.logs: dict[int, list[int]] = {}
        self.now = 0.0
        self.copies: list[HostCopy] = []
        self.host: bool | None = True
        self.heard: list[wire.Outgoing] = []

    def send(self, command: wire.Command) -> wire.Outgoing:
        """The reply; later messages are in `heard`."""
        out = self.core.handle(LINK, command, self.now)
        self.hear(out)
        return out[0][1]

    def open(self, ids: Sequence[int] = (), **options: object) -> int:
        opened = self.send(wire.Open(request=1, ids=pack_ids(list(ids)), **options))  # type: ignore[arg-type]
        assert isinstance(opened, wire.Opened), opened
        self.logs[opened.branch] = list(ids)
        return opened.branch

    def start(self, branch: int, ids: Sequence[int] = (), most: int | None = 1) -> wire.Outgoing:
        reply = self.send(wire.Generate(request=1, branch=branch, ids=pack_ids(list(ids)), max_tokens=most))
        if isinstance(reply, wire.Done):
            self.logs[branch] += ids
        return reply

    def turn(self, branch: int, ids: Sequence[int] = (), most: int | None = 1) -> wire.TurnUsage:
        """One turn to its end: what it cost."""
        reply = self.start(branch, ids, most)
        assert isinstance(reply, wire.Done), reply
        self.heard.clear()
        self.run()
        ended = [said for said in self.heard if isinstance(said, wire.TurnEnded) and said.branch == branch]
        assert len(ended) == 1, self.heard
        return ended[0].usage

    def run(self) -> None:
        """Until nothing moves: steps, copies, and deadlines when nothing else can happen."""
        while True:
            moved = self.step()
            self.settle_copies()
            if moved or self.core.world.flights:
                continue
            if any(branch.state not in ("Held",) for session in self.core.describe() for branch in session.branches):
                wake = self.core.wake_at(self.now)
                assert wake is not None, self.core.counts()
                self.now = wake
                continue
            return

    def step(self) -> bool:
        """Plans once and computes it."""
        plan = self.core.plan(self.now)
        self.hear(self.core.events())
        self.copies += self.core.host_copies()
        self.core.check()
        if plan is None:
            return bool(self.copies) and self.host is not None
        result = self.device.execute(plan, {row.branch: self.logs[row.branch] for row in plan.rows})
        self.hear(self.core.apply(result, self.now))
        self.core.check()
        return True

    def settle_copies(self) -> None:
        orders, self.copies = self.copies, []
        for order in orders:
            if self.host is None:
                continue
            if self.host:
                self.device.copy(order)
            self.hear(self.core.copied(order.ticket, self.host, self.now))
            self.core.check()

    def hear(self, out: Out) -> None:
        for _, message in out:
            self.heard.append(message)
            if isinstance(message, wire.Tokens):
                self.logs[message.branch] += unpack_ids(message.ids)

    def residence(self, branch: int) -> wire.Residence:
        inspected = self.send(wire.Inspect(request=1, branch=branch))
        assert isinstance(inspected, wire.Inspected)
        return inspected.residence

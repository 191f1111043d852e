"""A scheduler driven through a tape by a small script of verbs: what recordings in tests are made of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from agentspeed_engine.ids import LinkId
from agentspeed_engine.protocol import messages as wire
from agentspeed_engine.protocol.token_ids import pack_ids
from agentspeed_engine.sched.config import CoreConfig
from agentspeed_engine.sched.core import Core
from agentspeed_engine.sched.plan import Drawn, StepPlan, StepResult
from agentspeed_engine.serve.recording import RecordingOrder, Tape

VOCABULARY = 1 << 31
LINK = LinkId(1)
FIRST, DRAWN, STOP = 1_500_000_000, 1_700_000_000, 1_800_000_000
"""Ids that cannot be taken for lengths, positions or pages."""


class RecordedRun:
    """One recorded core; steps are carried out at once, each token drawn is `DRAWN` plus its position."""

    def __init__(
        self, folder: Path, *, most_bytes: int = 1 << 20, content: bool = False, every: int = 1, **config: Any
    ) -> None:
        limits: dict[str, Any] = {
            "pages": 52,
            "context_limit": 200,
            "page_tokens": 4,
            "prefill_chunk": 16,
            "extend_tokens": 4,
        } | config
        self.inner = Core(CoreConfig(vocab_size=VOCABULARY, firm_pages=0, model="scripted", **limits))
        order = RecordingOrder(folder=folder, most_bytes=most_bytes, content=content, every=every)
        self.said: list[str] = []
        self.tape = Tape(self.inner, order, began=100.0, say=self.said.append)
        self.core = self.tape.core
        self.now = 100.0
        self.request = 0
        self.stop_at = -1
        """The position whose token is `STOP`."""

    @property
    def path(self) -> Path:
        return self.tape.path

    def send(self, kind: Callable[..., wire.Command], **fields: Any) -> wire.Outgoing:
        self.request += 1
        command = kind(request=self.request, **fields)
        out = self.core.handle(LINK, command, self.now)
        self.tape.flush()
        return out[-1][1]

    def open(self, count: int, first: int = FIRST, **fields: Any) -> int:
        opened = self.send(wire.Open, ids=pack_ids(list(range(first, first + count))), **fields)
        assert isinstance(opened, wire.Opened), opened
        return opened.branch

    def generate(self, branch: int, most: int = 4, **fields: Any) -> None:
        done = self.send(wire.Generate, branch=branch, max_tokens=most, **fields)
        assert isinstance(done, wire.Done), done
        self.steps()

    def steps(self, most: int = 10_000) -> None:
        """Until nothing is left to compute."""
        for _ in range(most):
            plan = self.core.plan(self.now)
            for order in self.core.host_copies():
                self.core.begun(order.ticket)
                _ = self.core.copied(order.ticket, True, self.now)
            if plan is None:
                return
            self.now += 0.01
            _ = self.core.apply(self.result(plan), self.now)
            self.tape.flush()

    def result(self, plan: StepPlan) -> StepResult:
        ends = [row.end for row in plan.rows if row.sample is not None]
        rows = [row for row in plan.rows if row.sample is not None]
        return StepResult(
            plan.seq,
            tuple(
                Drawn(row.branch, row.epoch, STOP if end == self.stop_at else DRAWN + end)
                for row, end in zip(rows, ends, strict=True)
            ),
        )

    def life(self, rounds: int = 3, **fields: Any) -> None:
        """Sessions that share a prefix, forks, a rewind, a lease, an adoption; most of them stay open."""
        for number in range(rounds):
            trunk = self.open(30 + number, FIRST + 1000 * (number // 2), **fields)
            self.generate(trunk)
            forked = self.send(wire.Fork, branch=trunk, n=2)
            assert isinstance(forked, wire.Forked)
            first, second = forked.branches
            self.generate(first, 3)
            _ = self.send(wire.Rewind, branch=second, tokens=17)
            self.generate(second, 2, ids=pack_ids([FIRST + 99, FIRST + number]))
            _ = self.send(wire.Expect, branch=second, seconds=30.0, tool="searching-the-web")
            _ = self.send(wire.Adopt, branch=trunk, child=first)
            _ = self.send(wire.Close, branch=trunk)
            self.now += 1.0

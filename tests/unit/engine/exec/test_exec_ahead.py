"""Steps that are launched before an earlier one is collected give the tokens that steps one after the other give."""

from __future__ import annotations

import json
import socket
import threading
from collections import deque
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from llguidance import LLMatcher

from agentspeed_engine.exec.cpu import CpuExecutor
from agentspeed_engine.exec.worker import Launched, Worker
from agentspeed_engine.ids import LinkId
from agentspeed_engine.protocol import messages as wire
from agentspeed_engine.protocol.token_ids import pack_ids, unpack_ids
from agentspeed_engine.sched.core import Core
from agentspeed_engine.sched.state import Out
from agentspeed_engine.serve.loop import EngineLoop
from agentspeed_engine.serve.options import Built, EngineOptions, build
from tests.support.engine_client import Front
from tests.support.random_checkpoint import make_checkpoint

LINK = LinkId(1)
DIGITS = wire.Grammar(source=LLMatcher.grammar_from_regex("[0-9]{6}"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = json.loads((Path(__file__).parents[4] / "bench/models/tiny.json").read_text())
    return make_checkpoint(config, tmp_path_factory.mktemp("model"))


def built(folder: Path, depth: int) -> Built:
    """A pool that is short, so that turns are preempted too."""
    made = build(EngineOptions(model=str(folder), dtype="float64", pages=12, page_tokens=8, context_limit=72,
                               firm_pages=0, prefill_chunk=24))  # fmt: skip
    return replace(made, core=replace(made.core, depth=depth, decode_ahead=depth > 0))


@dataclass
class Run:
    """One engine driven by hand: every plan is launched as soon as it is made."""

    core: Core
    worker: Worker
    drawn: dict[int, list[int]] = field(default_factory=dict)
    ends: dict[int, list[tuple[str, int]]] = field(default_factory=dict)
    ahead: int = 0
    replies: list[wire.Outgoing] = field(default_factory=list)
    flights: deque[Launched] = field(default_factory=deque)

    def send(self, command: wire.Command) -> wire.Outgoing:
        self.hear(self.core.handle(LINK, command, 0.0))
        return self.replies[-1]

    def hear(self, out: Out) -> None:
        for _, message in out:
            match message:
                case wire.Tokens():
                    self.drawn.setdefault(message.branch, []).extend(unpack_ids(message.ids))
                case wire.TurnEnded():
                    self.ends.setdefault(message.branch, []).append((message.reason, message.known))
                case wire.TurnStarted() | wire.LeaseChanged():
                    pass
                case _:
                    self.replies.append(message)

    def steps(self, most: int = 10_000) -> None:
        for _ in range(most):
            while (plan := self.core.plan(0.0)) is not None:
                self.ahead += sum(row.token_of is not None for row in plan.rows)
                self.flights.append(self.worker.launch(plan))
                self.core.check()
            self.hear(self.core.events())
            if not self.flights:
                return
            self.hear(self.core.apply(self.worker.collect(self.flights.popleft()), 0.0))
            self.core.check()


def run(folder: Path, depth: int) -> Run:
    """Sessions with turns of every kind at once: free, constrained, with stop strings and ids, forked while running."""
    made = built(folder, depth)
    one = Run(Core(made.core), Worker(CpuExecutor(made.model, made.vocabulary, depth=depth)))
    branches: list[int] = []
    for number in range(5):
        opened = one.send(wire.Open(request=1, ids=pack_ids(list(range(3, 20 + number))), seed=number))
        assert isinstance(opened, wire.Opened)
        branches.append(opened.branch)
    kinds: list[dict[str, object]] = [
        {"sampling": wire.Sampling(temperature=0.0)}, {"sampling": wire.Sampling(temperature=1.0), "grammar": DIGITS},
        {"sampling": wire.Sampling(temperature=1.0), "stop_ids": tuple(range(0, 400, 9))},
        {"stop_strings": (b"a", b"e")}, {"sampling": wire.Sampling(temperature=0.7, logprobs=2)},
    ]  # fmt: skip
    for branch, kind in zip(branches, kinds, strict=True):
        reply = one.send(wire.Generate(request=2, branch=branch, ids=pack_ids([branch]), max_tokens=24, **kind))  # type: ignore[arg-type]
        assert isinstance(reply, wire.Done)
    one.steps()
    _ = one.send(wire.Generate(request=3, branch=branches[0], ids=pack_ids([7]), max_tokens=20))
    one.steps(6)
    _ = one.core.handle(LINK, wire.Fork(request=4, branch=branches[0], n=1), 0.0)
    one.steps()
    return one


def test_depth_one_draws_the_tokens_of_depth_zero(folder: Path) -> None:
    alone, ahead = run(folder, 0), run(folder, 1)
    assert ahead.drawn == alone.drawn and ahead.ends == alone.ends
    assert alone.ahead == 0 and ahead.ahead > 30
    reasons = {reason for ends in alone.ends.values() for reason, _ in ends}
    assert {"max_tokens", "grammar_end", "stop_id"} <= reasons, reasons


def test_the_loop_serves_turns_that_run_ahead() -> None:
    made = build(EngineOptions(model="noop:512:0.2", pages=40, page_tokens=16, context_limit=256))
    loop = EngineLoop(replace(made, core=replace(made.core, depth=1, decode_ahead=True)), check=True)
    thread = threading.Thread(target=loop.run)
    ours, theirs = socket.socketpair()
    loop.connect(theirs)
    thread.start()
    try:
        with ours:
            front = Front(ours)
            first, second = front.open([1, 2]), front.open([100])
            turns = [front.start(branch, max_tokens=60) for branch in (first, second)]
            while not all(turn.ended for turn in turns):
                front.step()
            assert [turn.ids for turn in turns] == [list(range(3, 63)), list(range(101, 161))]
            stopped = front.generate(first, [5], max_tokens=60, stop_ids=(20,))
            assert stopped.ids == list(range(6, 21))
            assert front.generate(first, max_tokens=3).ids == [21, 22, 23], "the row after the last token is nobody's"
    finally:
        loop.stop()
        thread.join(10)

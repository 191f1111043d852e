"""64 agents that pause for tools, on the engine on a GPU: with sessions, and with sessions switched off.

The agents are those of `pauses_workload`: model calls and pauses after the published laws of coding agents, the same
for both, decided before anything runs. All tokens and all pauses are divided by one factor (SCALE), so that what fills
half a minute is a quarter of an hour of such agents; what a step costs is not scaled. Pressure 2: live sessions hold
twice what the pool holds. Nobody gives hints.

Sessions switched off is the same engine as a plain server of completions: every model call sends its whole context to a
branch of its own that is closed afterwards; rows of closed branches stay as a prefix cache, the least recently used go
first, and there is no host tier. Times are taken by the client of the socket.
"""

from __future__ import annotations

import heapq
import os
import random
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np
from gpu_timing import Report

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
os.environ.setdefault("TRITON_INTERPRET", "0")

from agentspeed_engine.ids import pages_for
from bench.pauses_workload import CONTEXT_LIMIT, TRACE, Agent, Trace, Turn, live_tokens, read_trace, shape_of
from tests.support.engine_client import EngineProcess, Front, TurnRecord

MODEL = f"random:{ROOT / 'bench/models/v2-lite.json'}"
AGENTS, PRESSURE, SCALE, PAGE = 64, 2.0, 32, 64
SLOTS_PER_PAGE = 2
WARM, MEASURED = 9.0, 18.0
"""Seconds: first prompts are computed and the pool fills; what is counted."""
LEAST_GAIN, MOST_WAIT = 1.5, 0.4
"""Of tokens/s and of the p99 of resumes, with sessions against without."""
GPU: dict[str, Any] = {"device": "cuda", "dtype": "bfloat16", "depth": 1, "prefill_chunk": 2048, "extend_tokens": 1024}


@final
@dataclass(slots=True)
class Counted:
    """After the warm-up."""

    seconds: float = 0.0
    drawn: int = 0
    turns: int = 0
    needed: int = 0
    """Tokens that the turns that ended added."""
    computed: int = 0
    """Tokens computed before the first draw of each of them."""
    waits: list[float] = field(default_factory=list[float])
    """Seconds from a tool's return to the first token of the turn after it."""

    def wait(self, share: float) -> float:
        ordered = sorted(self.waits) or [float("inf")]
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


@final
@dataclass(slots=True)
class _Working:
    agent: Agent
    turn: Turn
    draw: random.Random
    branch: int | None = None
    log: list[int] = field(default_factory=list[int])
    """All ids of the session, where it is not the engine that keeps them."""
    record: TurnRecord | None = None
    due: float = 0.0
    """When its tool returns."""
    sent: tuple[int, ...] = ()
    first: float | None = None
    """When the first token of the turn came."""


@final
class Agents:
    """All agents on one link, in real time. `sessions`: whether a branch lives from turn to turn."""

    def __init__(self, front: Front, trace: Trace, *, sessions: bool, agents: int, scale: int, vocabulary: int) -> None:
        self._front, self._sessions, self._vocabulary = front, sessions, vocabulary
        shared = random.Random(0)
        self._shared = self._ids(shared, trace.shared_tokens // scale)
        self._all = [
            _Working(agent := Agent(trace, scale, 1, number), agent.turn(), random.Random(number))
            for number in range(agents)
        ]
        self._running: set[int] = set()
        self._scale = scale
        self.counted = Counted()
        self.steps = self.rows = 0
        """Of the engine, while the agents ran."""

    def run(self, warm: float, measured: float) -> Counted:
        """Blocks for as many seconds."""
        front, before = self._front, self._front.counts()
        began = time.perf_counter()
        for number, one in enumerate(self._all):
            one.due = began + 0.02 * number
        returns = [(one.due, number) for number, one in enumerate(self._all)]
        counts_from, end = began + warm, began + warm + measured
        while (now := time.perf_counter()) < end:
            while returns and returns[0][0] <= now:
                self._begin(heapq.heappop(returns)[1])
            next_return = returns[0][0] if returns else end
            front.socket.settimeout(max(0.0005, min(next_return, end) - time.perf_counter()))
            try:
                front.step()
            except TimeoutError:
                continue
            now = time.perf_counter()
            for number in self._heard(now, now >= counts_from):
                heapq.heappush(returns, (self._all[number].due, number))
        self.counted.seconds = measured
        front.socket.settimeout(60.0)
        after = front.counts()
        self.steps = after["steps"] - before["steps"]
        self.rows = after["rows_computed"] - before["rows_computed"]
        return self.counted

    def _begin(self, number: int) -> None:
        """An agent's tool returned: its next model call."""
        one, front = self._all[number], self._front
        front.socket.settimeout(60.0)
        new = self._ids(one.draw, one.turn.append)
        if one.turn.fresh:
            new = self._shared + new
            one.log = []
            if one.branch is not None:
                front.end(one.branch)
                one.branch = None
        if one.branch is None:
            one.branch = front.open()
        one.sent = tuple(new if self._sessions else [*one.log, *new])
        one.log += new
        one.first = None
        one.record = front.start(one.branch, one.sent, max_tokens=one.turn.output)
        self._running.add(number)

    def _heard(self, now: float, counts: bool) -> list[int]:
        """After a frame: who has ended."""
        ended = []
        for number in self._running:
            one = self._all[number]
            assert one.record is not None
            if one.first is None and one.record.ids:
                one.first = now
                if counts and not one.turn.fresh:
                    self.counted.waits.append(now - one.due)
            if one.record.ended is not None:
                ended.append(number)
        for number in ended:
            self._end(number, now, counts)
        return ended

    def _end(self, number: int, now: float, counts: bool) -> None:
        one, counted = self._all[number], self.counted
        self._running.discard(number)
        assert one.record is not None and one.record.ended is not None and one.branch is not None
        if len(one.record.ids) != one.turn.output:
            raise RuntimeError(f"a turn of {one.turn.output} tokens ended after {len(one.record.ids)}")
        if counts:
            usage = one.record.ended.usage
            counted.turns += 1
            counted.drawn += usage.drawn
            counted.computed += usage.new - usage.shared + usage.recomputed
            counted.needed += one.turn.append + (not one.turn.fresh)
        one.log += one.record.ids
        self._front.turns[one.branch].clear()
        if not self._sessions:
            self._front.socket.settimeout(60.0)
            self._front.end(one.branch)
            one.branch = None
        one.due = now + one.turn.pause / self._scale
        one.turn = one.agent.turn()

    def _ids(self, draw: random.Random, count: int) -> list[int]:
        taken = np.frombuffer(draw.randbytes(4 * count), np.uint32)
        return (taken % (self._vocabulary - 8) + 3).tolist()


def section_agents(
    report: Report, *, model: str = MODEL, vocabulary: int = 99_000, agents: int = AGENTS, scale: int = SCALE,
    warm: float = WARM, measured: float = MEASURED, options: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """With sessions, then with sessions off, each in an engine process of its own; the other one idles."""
    trace = shape_of(read_trace(TRACE))
    pages = pages_for(round(live_tokens(trace, agents, scale) / PRESSURE), PAGE)
    common: dict[str, Any] = {
        "model": model, "pages": pages, "page_tokens": PAGE, "context_limit": CONTEXT_LIMIT // scale + 64,
        "firm_pages": 0, "record": "off", **(GPU if options is None else options),
    }  # fmt: skip
    systems: dict[str, dict[str, Any]] = {
        "sessions": {"host_slots": SLOTS_PER_PAGE * pages},
        "sessions off": {"policy": "lru"},
    }
    found: dict[str, Counted] = {}
    with ExitStack() as stack:
        started = time.perf_counter()
        running = _started(stack, {name: common | own for name, own in systems.items()})
        print(f"          both engines were ready after {time.perf_counter() - started:.0f} s", flush=True)
        for line in running["sessions"].progress:
            print(f"          {line}")
        for name, process in running.items():
            front = process.connect()
            front.socket.settimeout(120.0)
            _prime(front, vocabulary, CONTEXT_LIMIT // scale)
            kept = name == "sessions"
            working = Agents(front, trace, sessions=kept, agents=agents, scale=scale, vocabulary=vocabulary)
            found[name] = one = working.run(warm, measured)
            counts = front.counts()
            front.close()  # whose sessions end with it: nothing runs beside the other one
            report.add(
                "agents", f"{agents} agents, pressure {PRESSURE:g}, {name}", tokens_s=one.drawn / one.seconds,
                turns_s=one.turns / one.seconds, resume_p50_ms=1e3 * one.wait(0.5), resume_p99_ms=1e3 * one.wait(0.99),
                amplification=one.computed / max(one.needed, 1), resumes=len(one.waits),
                preemptions=counts.get("preemptions", 0), pages_loaded=counts.get("pages_loaded", 0), pages=pages,
                steps_s=working.steps / (warm + measured), rows_a_step=working.rows / max(working.steps, 1),
            )  # fmt: skip
    ours, off = found["sessions"], found["sessions off"]
    gain = (ours.drawn / ours.seconds) / max(off.drawn / off.seconds, 1e-9)
    waits = ours.wait(0.99) / off.wait(0.99)
    report.add("agents", "tokens/s, sessions ÷ off", times=gain, must=LEAST_GAIN, met=gain >= LEAST_GAIN)
    report.add("agents", "p99 of resume, sessions ÷ off", times=waits, must=MOST_WAIT, met=waits <= MOST_WAIT)


def _started(stack: ExitStack, options: dict[str, dict[str, Any]]) -> dict[str, EngineProcess]:
    """All at once: each idles while the others are measured."""

    def begun(given: dict[str, Any]) -> EngineProcess:
        return EngineProcess(Path(stack.enter_context(tempfile.TemporaryDirectory())), **given)

    with ThreadPoolExecutor(len(options)) as pool:
        starting = {name: pool.submit(begun, given) for name, given in options.items()}
    running: dict[str, EngineProcess] = {}
    for name, one in starting.items():
        running[name] = one.result()
        stack.callback(running[name].close)
    return running


def _prime(front: Front, vocabulary: int, longest: int) -> None:
    """Kernels of prompts, of resumes and of both in one step are compiled before the clock runs."""
    draw = random.Random(7)

    def ids(count: int) -> list[int]:
        return [draw.randrange(3, vocabulary - 8) for _ in range(count)]

    branches = [front.open(private=True) for _ in range(8)]
    lengths = [longest * (number + 1) // 10 for number in range(8)]
    for _ in range(3):
        turns = [
            front.start(branch, ids(length), max_tokens=8) for branch, length in zip(branches, lengths, strict=True)
        ]
        front.finish(*turns)
        lengths = [9 + 5 * number for number in range(8)]
    for branch in branches:
        front.end(branch)

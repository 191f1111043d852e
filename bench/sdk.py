"""What the SDK costs a program beside the model: CPU time per token of 64 streams, and how long commands wait.

    python bench/sdk.py [--loop asyncio|uvloop|trio]

The engine is a real process over its real socket with the no-op model (a step of 2 ms). `client_us_per_token` is this
process's own CPU time, all threads, over the tokens delivered as typed events. While the sessions stream, one more
session at rest sends commands; `steps_waited_by_commands` is the 99th percentile of their round trips in steps of the engine.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "engine"), str(ROOT / "kernels")]

import anyio  # noqa: E402

from agentspeed import Engine, Session  # noqa: E402
from agentspeed.backends.process import EngineSlot  # noqa: E402
from agentspeed.events import TextDelta  # noqa: E402
from tools.random_checkpoint import make_checkpoint  # noqa: E402

BEFORE_THE_STOP_ID = 500
"""The no-op model counts up from the prompt's last id and meets the end id of the tiny vocabulary after that many."""


@dataclass(slots=True)
class Measured:
    """Filled in by the tasks of one run."""

    tokens: int = 0
    deltas: int = 0
    cpu_seconds: float = 0.0
    seconds: float = 0.0
    steps: int = 0
    waits: list[float] = field(default_factory=list)


def main() -> None:
    options = parse_arguments()
    with tempfile.TemporaryDirectory() as scratch:
        config = json.loads((ROOT / "bench/models/tiny.json").read_text())
        folder = make_checkpoint(config, Path(scratch) / "model")
        slot = EngineSlot({"model": f"noop:{config['vocab_size']}:{options.step_ms}", "pages": 4096, "depth": 0})
        engine = Engine.over(slot, folder)
        backend = "trio" if options.loop == "trio" else "asyncio"
        settings = {"use_uvloop": True} if options.loop == "uvloop" else {}
        measured = anyio.run(run, engine, options.sessions, options.tokens, backend=backend, backend_options=settings)
    report(measured, options.loop)


async def run(engine: Engine, sessions: int, tokens: int) -> Measured:
    measured = Measured()
    async with engine, engine.session() as idle:
        await talk(engine, 8, Measured())  # imports, thread pools and caches are not the price of a token
        opened = [engine.session() for _ in range(sessions)]
        before = await engine.stats()
        cpu, started = time.process_time(), time.perf_counter()
        async with anyio.create_task_group() as group:
            done = anyio.Event()
            group.start_soon(command, idle, done, measured)
            async with anyio.create_task_group() as streams:
                for session in opened:
                    streams.start_soon(stream, session, tokens, measured)
            measured.cpu_seconds = time.process_time() - cpu
            measured.seconds = time.perf_counter() - started
            done.set()
        after = await engine.stats()
        measured.steps = after.counts["steps"] - before.counts["steps"]
    return measured


async def talk(engine: Engine, tokens: int, measured: Measured) -> None:
    await stream(engine.session(), tokens, measured)


async def stream(session: Session, tokens: int, measured: Measured) -> None:
    """One session: opened, one turn read event by event, closed."""
    async with session, session.stream("Count.", max_tokens=tokens) as turn:
        async for event in turn:
            if isinstance(event, TextDelta):
                measured.deltas += 1
        measured.tokens += turn.usage.drawn


async def command(session: Session, done: anyio.Event, measured: Measured) -> None:
    """Commands one after the other, a few per step, until the streams have ended."""
    while not done.is_set():
        sent = time.perf_counter()
        _ = await session.expect(1.0)
        measured.waits.append(time.perf_counter() - sent)
        await anyio.sleep(0.005)


def report(measured: Measured, loop: str) -> None:
    step = measured.seconds / measured.steps
    per_token = 1e6 * measured.cpu_seconds / measured.tokens
    worst = quantiles(measured.waits, n=100)[98] / step
    print(f"{loop}: {measured.tokens} tokens in {measured.seconds:.2f} s, {measured.steps} steps of "
          f"{1e3 * step:.2f} ms, {measured.deltas} text deltas")
    print(f"client CPU {per_token:.1f} us/token; {len(measured.waits)} commands waited "
          f"{median(measured.waits) / step:.2f} steps (median), {worst:.2f} (p99)")
    print(json.dumps({
        "client_us_per_token": round(per_token, 1), "steps_waited_by_commands": round(worst, 2),
        "steps_waited_median": round(median(measured.waits) / step, 2), "step_ms": round(1e3 * step, 2), "loop": loop,
    }))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=400, help=f"per session, at most {BEFORE_THE_STOP_ID}")
    parser.add_argument("--step-ms", type=float, default=2.0)
    parser.add_argument("--loop", choices=("asyncio", "uvloop", "trio"), default="asyncio")
    options = parser.parse_args()
    if not 1 <= options.tokens <= BEFORE_THE_STOP_ID:
        parser.error(f"--tokens is {options.tokens}; it must be 1 to {BEFORE_THE_STOP_ID}")
    return options


if __name__ == "__main__":
    main()

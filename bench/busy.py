"""What another busy process on the machine does to an engine's tokens, with its spin count and with OpenMP's own.

    python bench/busy.py [--model FOLDER] [--rounds 5] [--tokens 100]

OpenMP's threads spin where they wait for each other, and while they spin the awaited one may be the one without a core.
So an engine is started with a short spin. Each round starts four engines in turn, with either spin, alone and beside
one process that computes without end; a figure is the median of the rounds, in milliseconds a token of one session.

    quiet_ms, busy_ms                       with the engine's own spin count
    default_quiet_ms, default_busy_ms       with OpenMP's
    busy_gain                               default_busy_ms / busy_ms: must be at least 1
    quiet_cost                              quiet_ms / default_quiet_ms: what it costs where nothing else runs

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "engine"), str(ROOT / "kernels")]

import anyio

from agentspeed import Engine

SPIN = "GOMP_SPINCOUNT"
OPENMP = "300000"
"""What OpenMP's runtime takes when nobody says otherwise."""
BUSY = "while True: pass"


async def token_ms(model: Path | None, tokens: int) -> float:
    async with Engine(model) as engine, engine.session() as s:
        _ = await s.generate("Hello!", max_tokens=8)
        drawn, seconds = 0, 0.0
        while drawn < tokens:
            usage = (await s.generate("Hello!", max_tokens=tokens)).usage
            drawn, seconds = drawn + usage.drawn, seconds + usage.decode_seconds
        return 1000 * seconds / drawn


@contextmanager
def beside(busy: bool) -> Iterator[None]:
    if not busy:
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", BUSY])
    try:
        yield
    finally:
        process.kill()
        _ = process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _ = parser.add_argument("--model", type=Path, default=None, help="nothing: the shipped model")
    _ = parser.add_argument("--rounds", type=int, default=5)
    _ = parser.add_argument("--tokens", type=int, default=100)
    options = parser.parse_args()
    samples: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        for busy in (False, True):
            for prefix, spin in (("", None), ("default_", OPENMP)):
                _ = os.environ.pop(SPIN, None)
                if spin is not None:
                    os.environ[SPIN] = spin
                with beside(busy):
                    taken = anyio.run(token_ms, options.model, options.tokens)
                samples.setdefault(f"{prefix}{'busy' if busy else 'quiet'}_ms", []).append(taken)
    figures = {name: round(statistics.median(taken), 2) for name, taken in samples.items()}
    spread = {f"{name}_range": [round(min(taken), 2), round(max(taken), 2)] for name, taken in samples.items()}
    figures["busy_gain"] = round(figures["default_busy_ms"] / figures["busy_ms"], 2)
    figures["quiet_cost"] = round(figures["quiet_ms"] / figures["default_quiet_ms"], 2)
    for name, value in figures.items():
        print(f"{name:18} {value:>8}")
    met = figures["busy_gain"] >= 1
    print(f"busy_gain: target >= 1   {'met' if met else 'MISSED'}")
    print(json.dumps({"bench": "busy", **figures, **spread, "rounds": options.rounds, "met": met}))


if __name__ == "__main__":
    main()

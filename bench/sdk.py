"""What the SDK itself costs: 64 sessions stream from an engine whose model does nothing for 2 ms a step.

Run: `python bench/sdk.py [--sessions 64] [--turns 3]`. `client_us_per_token` is the CPU time of this process (all its
threads) per drawn token: frames, mirror, detokeniser, parser, events. `steps_waited_by_commands` is how many steps the
engine began between one command's handling and the next one's, sent as soon as the first was answered; median.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "engine"), str(ROOT / "kernels"), str(ROOT / "tools")]

import anyio
from random_checkpoint import make_checkpoint

from agentspeed import Session


async def client(folder: Path, turns: int, tokens: list[int]) -> None:
    async with Session(folder) as session:
        for _ in range(turns):
            async with session.stream("go", max_tokens=400) as turn:
                async for _event in turn:
                    pass
            tokens.append(turn.usage.drawn)


async def commands(folder: Path, waited: list[int], over: anyio.Event) -> None:
    async with Session(folder) as session:
        while not over.is_set():
            first = (await session.engine.stats()).counts["steps"]
            waited.append((await session.engine.stats()).counts["steps"] - first)
            await anyio.sleep(0.01)


async def measure(folder: Path, sessions: int, turns: int) -> dict[str, float]:
    async with Session(folder):  # the engine is up, tokenizers are loaded
        pass
    tokens: list[int] = []
    waited: list[int] = []
    over = anyio.Event()
    cpu, wall = time.process_time(), time.perf_counter()
    async with anyio.create_task_group() as everyone:
        everyone.start_soon(commands, folder, waited, over)
        async with anyio.create_task_group() as group:
            for _ in range(sessions):
                group.start_soon(client, folder, turns, tokens)
        over.set()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {
        "client_us_per_token": round(cpu / sum(tokens) * 1e6, 1),
        "steps_waited_by_commands": statistics.median(waited), "steps_waited_max": max(waited),
        "tokens": sum(tokens), "tokens_per_second": round(sum(tokens) / wall), "commands": 2 * len(waited),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, default=64)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--backend", default="asyncio", choices=("asyncio", "trio"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_checkpoint(json.loads((ROOT / "bench/models/tiny.json").read_text()), Path(scratch) / "tiny")
        socket = Path(scratch) / "engine.sock"
        engine = subprocess.Popen(
            [sys.executable, "-m", "agentspeed_engine.run", "--socket", str(socket),
             "--options", json.dumps({"model": "noop:512:2", "pages": 4096, "context_limit": 4096})],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": f"{ROOT / 'engine'}:{ROOT / 'kernels'}"})
        try:
            assert engine.stdout is not None
            while "ready" not in (line := engine.stdout.readline()):
                assert line, "the engine did not start"
            os.environ["AGENTSPEED_ENGINE"] = str(socket)
            figures = anyio.run(measure, folder, options.sessions, options.turns, backend=options.backend)
        finally:
            assert engine.stdin is not None
            engine.stdin.close()
            _ = engine.wait(10)
    for name, most in {"client_us_per_token": 50, "steps_waited_by_commands": 1}.items():
        print(f"{name:26} {figures[name]:>8}   target <= {most}   {'met' if figures[name] <= most else 'MISSED'}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()

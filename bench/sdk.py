"""What the SDK itself costs: 64 sessions stream from an engine whose model does nothing for 2 ms a step.

Run: `python bench/sdk.py [--sessions 64] [--turns 3]`. `client_us_per_token` is the CPU time of this process (all its
threads) per drawn token: frames, mirror, detokeniser, parser, events. `steps_waited_by_commands` is how many steps the
engine began between one command's handling and the next one's, sent as soon as the first was answered; median.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "engine"), str(ROOT / "kernels")]

import anyio

from agentspeed import Session
from agentspeed_engine.protocol import messages as wire
from agentspeed_engine.protocol.frames import encode_command, outbox_reader
from tests.support.engine_client import engine
from tests.support.random_checkpoint import make_checkpoint


async def client(folder: Path, turns: int, tokens: list[int]) -> None:
    async with Session(folder) as session:
        for _ in range(turns):
            async with session.stream("go", max_tokens=400) as turn:
                async for _event in turn:
                    pass
            tokens.append(turn.usage.drawn)


def probe(path: str) -> None:
    """A front of its own process that only sends commands, one as soon as the last was answered, until stdin ends."""
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    peer.connect(path)
    reader = outbox_reader()

    def ask(command: wire.Command) -> wire.Outgoing:
        peer.sendall(encode_command(command))
        while (frame := reader.next()) is None:
            reader.feed(peer.recv(1 << 16))
        return frame[0]

    def steps() -> int:
        reply = ask(wire.GetStats(request=1))
        assert isinstance(reply, wire.Stats)
        return reply.counts["steps"]

    _ = ask(wire.Hello(request=1))
    print("ready", flush=True)
    waited: list[int] = []
    while not select.select([sys.stdin], [], [], 0.01)[0]:
        first = steps()
        waited.append(steps() - first)
    print(json.dumps(waited))


def started_probe(path: Path) -> subprocess.Popen[str]:
    probing = subprocess.Popen(
        [sys.executable, __file__, "--probe", str(path)], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert probing.stdout is not None
    _ = probing.stdout.readline()  # it has greeted the engine
    return probing


async def measure(folder: Path, sessions: int, turns: int, path: Path) -> dict[str, float]:
    async with Session(folder):  # the engine is up, tokenizers are loaded
        pass
    tokens: list[int] = []
    commands = started_probe(path)
    cpu, wall = time.process_time(), time.perf_counter()
    async with anyio.create_task_group() as group:
        for _ in range(sessions):
            group.start_soon(client, folder, turns, tokens)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    waited: list[int] = json.loads(commands.communicate("over\n", timeout=10)[0])
    return {
        "client_us_per_token": round(cpu / sum(tokens) * 1e6, 1),
        "steps_waited_by_commands": statistics.median(waited),
        "steps_waited_max": max(waited),
        "tokens": sum(tokens),
        "tokens_per_second": round(sum(tokens) / wall),
        "commands": 2 * len(waited),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, default=64)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--backend", default="asyncio", choices=("asyncio", "uvloop", "trio"))
    parser.add_argument("--probe", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.probe:
        probe(options.probe)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_checkpoint(json.loads((ROOT / "bench/models/tiny.json").read_text()), Path(scratch) / "tiny")
        with engine(Path(scratch), model="noop:512:2", pages=4096, context_limit=4096) as process:
            os.environ["AGENTSPEED_ENGINE"] = str(process.path)
            figures = anyio.run(
                measure,
                folder,
                options.sessions,
                options.turns,
                process.path,
                backend="trio" if options.backend == "trio" else "asyncio",
                backend_options={"use_uvloop": True} if options.backend == "uvloop" else {},
            )
    for name, most in {"client_us_per_token": 50, "steps_waited_by_commands": 1}.items():
        print(f"{name:26} {figures[name]:>8}   target <= {most}   {'met' if figures[name] <= most else 'MISSED'}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()

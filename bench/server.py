"""What HTTP costs over the SDK: 64 streams on an engine whose model does nothing for 2 ms a step, stateless loops.

Run: `python bench/server.py [--streams 64] [--tokens 256]`. The load comes from a process of its own and is bounded.

- `cpu_us_per_token`: CPU time of the server process (not the engine) per drawn token, streams of chat completions;
- `ttfb_overhead_ms`: time to the first event of one stream over the same turn's in process, medians of pairs;
- `throughput_ratio`: tokens per second over HTTP by those of the SDK in process, same engine, same streams;
- `kb_per_idle_session`: resident memory of the server per conversation that waits, beside its ids;
- `history_us`: to find the session of a list of 200 messages and 50 k tokens among 1000 conversations;
- `reused_share`: tokens resumed by tokens sent in a stateless loop of 20 turns, by the SDK's own for the same turns.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "engine"), str(ROOT / "kernels")]

import anyio
import httpx

from agentspeed import Session
from agentspeed.history import Conversation, keys, root_key
from agentspeed.messages import Assistant, Message, User
from tests.support.engine_client import engine
from tests.support.random_checkpoint import make_checkpoint

_MUST = {
    "cpu_us_per_token": ("<=", 40),
    "ttfb_overhead_ms": ("<=", 5),
    "throughput_ratio": (">=", 0.9),
    "kb_per_idle_session": ("<=", 64),
    "history_us": ("<=", 2000),
    "reused_share": (">=", 0.95),
}


def body(text: str, tokens: int, *, stream: bool = True) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": tokens, "stream": stream, "temperature": 0}


# ---- the client, in a process of its own ------------------------------------------------------------------------
async def load(url: str, streams: int, tokens: int) -> None:
    """Prints tokens and seconds of `streams` requests at once, after one that warms everything up."""
    limits = httpx.Limits(max_connections=streams + 1)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:

        async def one(number: int, begun: list[float] | None = None) -> int:
            drawn = 0
            async with client.stream(
                "POST",
                "/v1/chat/completions",
                json={**body(f"go {number}", tokens), "stream_options": {"include_usage": True}},
            ) as response:
                async for line in response.aiter_lines():
                    if begun is not None and not begun and line:
                        begun.append(time.perf_counter())
                    if line.startswith("data: {") and '"completion_tokens"' in line:
                        drawn = json.loads(line[6:])["usage"]["completion_tokens"]
            return drawn

        _ = await one(-1)
        firsts = []
        for number in range(20):
            at: list[float] = []
            start = time.perf_counter()
            _ = await one(1000 + number, at)
            firsts.append(at[0] - start)
        print(json.dumps({"first": statistics.median(firsts)}), flush=True)
        _ = sys.stdin.readline()
        total = 0
        start = time.perf_counter()

        async def counted(number: int) -> None:
            nonlocal total
            drawn = await one(number)
            total += drawn

        async with anyio.create_task_group() as group:
            for number in range(streams):
                group.start_soon(counted, number)
        print(json.dumps({"tokens": total, "seconds": time.perf_counter() - start}), flush=True)


# ---- the same in process ----------------------------------------------------------------------------------------
async def in_process(folder: Path, streams: int, tokens: int) -> tuple[float, float]:
    """Seconds to the first event of one turn, and tokens per second of `streams` sessions at once."""
    async with Session(folder) as session:
        _ = await session.generate("go", max_tokens=4)
        firsts = []
        for number in range(20):
            async with Session(folder) as one:
                start = time.perf_counter()
                async with one.stream(f"go {1000 + number}", max_tokens=tokens) as turn:
                    _ = await anext(aiter(turn))
                    firsts.append(time.perf_counter() - start)
        drawn = 0

        async def one_stream(number: int) -> None:
            nonlocal drawn
            async with Session(folder) as own, own.stream(f"go {number}", max_tokens=tokens) as turn:
                async for _event in turn:
                    pass
            drawn += turn.usage.drawn

        start = time.perf_counter()
        async with anyio.create_task_group() as group:
            for number in range(streams):
                group.start_soon(one_stream, number)
        return statistics.median(firsts), drawn / (time.perf_counter() - start)


# ---- the server's own figures -----------------------------------------------------------------------------------
def cpu_of(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


def idle_memory(url: str, pid: int, sessions: int) -> float:
    """Kilobytes of the server per waiting conversation; of its ids, 13 bytes a token are taken off."""
    with httpx.Client(base_url=url, timeout=60) as client:
        for number in range(32):
            _ = client.post("/v1/chat/completions", json=body(f"warm {number}", 8, stream=False))
        before, known = memory_of(pid), 0
        for number in range(sessions):
            answer = client.post("/v1/chat/completions", json=body(f"idle {number} " * 8, 8, stream=False)).json()
            known += answer["usage"]["total_tokens"]
        return (memory_of(pid) - before - 13 * known) / sessions / 1024


def history_us() -> float:
    """The work of `History.take` before it awaits anything: hashing the list, and walking back to the longest match."""
    words = "word " * 250
    messages: list[Message] = []
    for number in range(100):
        messages += [User(f"{number} {words}"), Assistant(f"{number} {words}")]
    index: dict[bytes, int] = {}
    for other in range(1000):
        for key in keys(root_key(Conversation(messages=(), system=f"{other}")), messages[:4]):
            index[key] = other
    for key in keys(root_key(Conversation(messages=())), messages[:-1]):
        index[key] = -1
    taken = []
    for _ in range(30):
        start = time.perf_counter()
        chain = keys(root_key(Conversation(messages=())), messages)
        found = next(shared for shared in range(len(chain) - 1, 0, -1) if chain[shared] in index)
        taken.append((time.perf_counter() - start) * 1e6)
        assert found == len(messages) - 1
    return statistics.median(taken)


async def reused_share(url: str, folder: Path, turns: int) -> tuple[float, float]:
    """Resumed by sent, over HTTP without state and in one session."""
    messages: list[dict[str, str]] = []
    cached = prompt = 0
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        for number in range(turns):
            messages.append({"role": "user", "content": f"question {number}"})
            answer = (
                await client.post(
                    "/v1/chat/completions", json={"messages": messages, "max_tokens": 24, "temperature": 0}
                )
            ).json()
            messages.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"]})
            cached += answer["usage"]["prompt_tokens_details"]["cached_tokens"]
            prompt += answer["usage"]["prompt_tokens"]
    kept = known = 0
    async with Session(folder) as session:
        for number in range(turns):
            usage = (await session.generate(f"question {number}", max_tokens=24)).usage
            kept += usage.prefill_saved
            known += usage.new + usage.resumed + usage.recomputed
    return cached / prompt, kept / known


# ---- one run ----------------------------------------------------------------------------------------------------
def measured(folder: Path, streams: int, tokens: int, sessions: int) -> dict[str, float]:
    serve = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from agentspeed.cli import main; main()",
            "serve",
            str(folder),
            "--port",
            "0",
            "--idle-sessions",
            str(sessions + streams + 100),
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert serve.stderr is not None
        url = ""
        while not url:
            line = serve.stderr.readline()
            assert line, "the server did not start"
            if line.startswith("agentspeed serves"):
                url = line.split()[-1]
        client = subprocess.Popen(
            [sys.executable, __file__, "--url", url, "--streams", str(streams), "--tokens", str(tokens)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert client.stdin is not None and client.stdout is not None
        first = json.loads(client.stdout.readline())["first"]
        cpu = cpu_of(serve.pid)
        _ = client.stdin.write("go\n")
        client.stdin.flush()
        done = json.loads(client.stdout.readline())
        cpu = cpu_of(serve.pid) - cpu
        _ = client.wait(30)
        own_first, own_rate = anyio.run(in_process, folder, streams, tokens)
        kilobytes = idle_memory(url, serve.pid, sessions)
        over_http, in_session = anyio.run(reused_share, url, folder, 20)
    finally:
        serve.terminate()
        _ = serve.wait(60)
    return {
        "cpu_us_per_token": round(cpu / done["tokens"] * 1e6, 1),
        "ttfb_overhead_ms": round((first - own_first) * 1e3, 2),
        "throughput_ratio": round(done["tokens"] / done["seconds"] / own_rate, 3),
        "kb_per_idle_session": round(kilobytes, 1),
        "history_us": round(history_us(), 1),
        "reused_share": round(over_http / in_session, 4),
        "tokens_per_second": round(done["tokens"] / done["seconds"]),
        "reused_http": round(over_http, 4),
        "reused_session": round(in_session, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--idle", type=int, default=300, help="conversations for kb_per_idle_session")
    parser.add_argument("--url", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.url:
        anyio.run(load, options.url, options.streams, options.tokens)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_checkpoint(json.loads((ROOT / "bench/models/tiny.json").read_text()), Path(scratch) / "tiny")
        with engine(Path(scratch), model="noop:512:2", pages=8192, context_limit=4096) as process:
            os.environ["AGENTSPEED_ENGINE"] = str(process.path)
            figures = measured(folder, options.streams, options.tokens, options.idle)
    for name, (sign, bound) in _MUST.items():
        met = figures[name] <= bound if sign == "<=" else figures[name] >= bound
        print(f"{name:22} {figures[name]:>9}   must {sign} {bound}   {'met' if met else 'MISSED'}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()

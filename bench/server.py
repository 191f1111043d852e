"""What HTTP costs over the SDK: 64 streams on an engine whose model does nothing for 2 ms a step, stateless loops.

Run: `python bench/server.py [--streams 64] [--tokens 256] [--rounds 5] [--api chat]`. The load comes from a process of
its own that reads bytes and parses none, and is bounded. The bounds are those of `--api chat`.

- `cpu_us_per_token`: CPU time of the server process (not the engine) per drawn token, streams of `--api`, what opening
  their sessions costs included; median of the rounds;
- `ttfb_overhead_ms`: from a whole request to its first token, less the same from asking an open session in process;
- `throughput_ratio`: tokens per second over HTTP by those of the SDK in process, same engine, same streams, in turn;
  median of the rounds;
- `kb_per_idle_session`: resident memory of a fresh server per conversation that waits, beside its ids, once a quarter
  as many were there, garbage collected and free pages handed back at both ends;
- `history_us`: to find the session of a list of 200 messages and 50 k tokens among 1000 conversations;
- `reused_share`: tokens resumed by tokens sent in a stateless loop of 20 turns, by the SDK's own for the same turns.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import selectors
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "engine"), str(ROOT / "kernels")]

import anyio
import httpx

from agentspeed import Session
from agentspeed.events import TextDelta
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


@dataclass(frozen=True)
class Api:
    """How a protocol asks for a stream, and the bytes by which its client knows the first token and the count."""

    path: str
    prompt: str
    most: str
    first: bytes
    counted: bytes
    more: dict[str, Any] = field(default_factory=dict)

    def body(self, text: str, tokens: int) -> dict[str, Any]:
        asked: Any = [{"role": "user", "content": text}]
        return {self.prompt: asked, self.most: tokens, "stream": True, "temperature": 0, **self.more}


APIS = {
    "chat": Api(
        "/v1/chat/completions",
        "messages",
        "max_tokens",
        b'"delta":{"content":"',
        b"completion_tokens",
        {"stream_options": {"include_usage": True}},
    ),
    "responses": Api("/v1/responses", "input", "max_output_tokens", b"output_text.delta", b"output_tokens"),
    "messages": Api("/v1/messages", "messages", "max_tokens", b"text_delta", b"output_tokens"),
}


# ---- the client, in a process of its own: sockets and bytes, so that it takes little of the machine -----------------
class Stream:
    """One request on one connection. Nothing is parsed but its end."""

    def __init__(self, api: Api, address: tuple[str, int], number: int, tokens: int) -> None:
        self.api = api
        self.peer = socket.create_connection(address)
        self.peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        data = json.dumps(api.body(f"go {number}", tokens)).encode()
        head = f"POST {api.path} HTTP/1.1\r\nhost: {address[0]}\r\ncontent-type: application/json\r\n"
        self.request = f"{head}content-length: {len(data)}\r\nconnection: close\r\n\r\n".encode() + data
        self.tail = b""
        self.chunks = 0

    def read(self) -> bool:
        """What is there; False once the answer has ended."""
        data = self.peer.recv(1 << 18)
        self.chunks += data.count(b"data: {")
        self.tail = (self.tail + data)[-2048:]
        return bool(data)

    def drawn(self) -> int:
        """Tokens, as the last chunk counts them."""
        found = re.findall(rb'"%b":(\d+)' % self.api.counted, self.tail)
        assert found, self.tail
        return int(found[-1])


def load(api: Api, url: str, streams: int, tokens: int) -> None:
    """Prints the time to the first token, then at each line of input a round of `streams` requests at once."""
    host, _, port = url.removeprefix("http://").partition(":")
    address = (host, int(port))
    firsts = []
    for number in range(21):
        one = Stream(api, address, 1000 + number, 16)
        start = time.perf_counter()
        one.peer.sendall(one.request)
        while api.first not in one.tail:
            assert one.read()
        firsts.append(time.perf_counter() - start)
        while one.read():
            pass
        one.peer.close()
    print(json.dumps({"first": statistics.median(firsts[1:])}), flush=True)
    for line in sys.stdin:
        selector = selectors.DefaultSelector()
        opened = [Stream(api, address, int(line) * streams + number, tokens) for number in range(streams)]
        start = time.perf_counter()
        for one in opened:
            one.peer.sendall(one.request)
            _ = selector.register(one.peer, selectors.EVENT_READ, one)
        while selector.get_map():
            for key, _ in selector.select():
                if not key.data.read():
                    _ = selector.unregister(key.fileobj)
                    key.data.peer.close()
            time.sleep(0.004)  # a client that is woken for every chunk would cost as much as what is measured
        seconds = time.perf_counter() - start
        told = {
            "tokens": sum(one.drawn() for one in opened),
            "seconds": seconds,
            "chunks": sum(one.chunks for one in opened),
        }
        print(json.dumps(told), flush=True)


# ---- the same in process -------------------------------------------------------------------------------------------
async def first_token(folder: Path) -> float:
    """Seconds from asking a session that is open to its first piece of text."""
    firsts = []
    for number in range(21):
        async with Session(folder) as one:
            start = time.perf_counter()
            async with one.stream(f"go {1000 + number}", max_tokens=16) as turn:
                async for event in turn:
                    if isinstance(event, TextDelta):
                        break
                firsts.append(time.perf_counter() - start)
    return statistics.median(firsts[1:])


async def in_process(folder: Path, streams: int, tokens: int) -> float:
    """Tokens per second of `streams` sessions at once."""
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
    return drawn / (time.perf_counter() - start)


# ---- the server's own figures -----------------------------------------------------------------------------------
def cpu_of(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_of(pid: int) -> int:
    """Resident bytes, after the server has collected its garbage and handed free pages back (see `_SERVE`)."""
    os.kill(pid, signal.SIGUSR1)
    time.sleep(1.0)
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


def idle_memory(url: str, pid: int, sessions: int) -> float:
    """Kilobytes of the server per waiting conversation; of its ids, 13 bytes a token are taken off."""
    with httpx.Client(base_url=url, timeout=60) as client:

        def converse(name: str, count: int) -> int:
            known = 0
            for number in range(count):
                answer = client.post("/v1/chat/completions", json=body(f"{name} {number} " * 8, 8, stream=False))
                known += answer.json()["usage"]["total_tokens"]
            return known

        _ = converse("warm", sessions // 4)  # what grows once and stays has grown by then
        before = memory_of(pid)
        known = converse("idle", sessions)
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
_SERVE = """
import ctypes, gc, signal
signal.signal(signal.SIGUSR1, lambda *_: (gc.collect(), ctypes.CDLL(None).malloc_trim(0)))
from agentspeed.cli import main
main()
"""


def started(folder: Path, idle: int) -> tuple[subprocess.Popen[str], str]:
    """A server process and its URL."""
    serve = subprocess.Popen(
        [sys.executable, "-c", _SERVE, "serve", str(folder), "--port", "0", "--idle-sessions", str(idle)],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert serve.stderr is not None
    while True:
        line = serve.stderr.readline()
        assert line, "the server did not start"
        if line.startswith("agentspeed serves"):
            threading.Thread(target=serve.stderr.read, daemon=True).start()  # its log is read, and dropped
            return serve, line.split()[-1]


def measured(api: str, folder: Path, streams: int, tokens: int, sessions: int, rounds: int) -> dict[str, Any]:
    serve, url = started(folder, 4096)
    try:
        client = subprocess.Popen(
            [sys.executable, __file__, "--api", api, "--url", url, "--streams", str(streams), "--tokens", str(tokens)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert client.stdin is not None and client.stdout is not None
        first = json.loads(client.stdout.readline())["first"]
        own_first = anyio.run(first_token, folder)
        costs, ratios, rates, chunks = [], [], [], []
        for number in range(rounds):
            own_rate = anyio.run(in_process, folder, streams, tokens)
            cpu = cpu_of(serve.pid)
            _ = client.stdin.write(f"{number}\n")
            client.stdin.flush()
            done = json.loads(client.stdout.readline())
            costs.append((cpu_of(serve.pid) - cpu) / done["tokens"] * 1e6)
            rates.append(done["tokens"] / done["seconds"])
            ratios.append(rates[-1] / own_rate)
            chunks.append(done["tokens"] / done["chunks"])
        client.stdin.close()
        _ = client.wait(30)
        over_http, in_session = anyio.run(reused_share, url, folder, 20)
    finally:
        serve.terminate()
        _ = serve.wait(60)
    serve, url = started(folder, 2 * sessions)
    try:
        kilobytes = idle_memory(url, serve.pid, sessions)
    finally:
        serve.terminate()
        _ = serve.wait(60)
    return {
        "cpu_us_per_token": round(statistics.median(costs), 1),
        "ttfb_overhead_ms": round((first - own_first) * 1e3, 2),
        "throughput_ratio": round(statistics.median(ratios), 3),
        "kb_per_idle_session": round(kilobytes, 1),
        "history_us": round(history_us(), 1),
        "reused_share": round(over_http / in_session, 4),
        "tokens_per_second": round(statistics.median(rates)),
        "tokens_per_chunk": round(statistics.median(chunks), 2),
        "rounds": [[round(cost, 1), round(ratio, 3)] for cost, ratio in zip(costs, ratios, strict=True)],
        "first_token_ms": round(first * 1e3, 2),
        "first_token_session_ms": round(own_first * 1e3, 2),
        "reused_http": round(over_http, 4),
        "reused_session": round(in_session, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--idle", type=int, default=2000, help="conversations for kb_per_idle_session")
    parser.add_argument("--rounds", type=int, default=5, help="of 64 streams over HTTP and in process, in turn")
    parser.add_argument("--api", choices=sorted(APIS), default="chat", help="the protocol of the streams")
    parser.add_argument("--url", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.url:
        load(APIS[options.api], options.url, options.streams, options.tokens)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_checkpoint(json.loads((ROOT / "bench/models/tiny.json").read_text()), Path(scratch) / "tiny")
        with engine(Path(scratch), model="noop:512:2", pages=8192, context_limit=4096, max_sessions=8192) as process:
            os.environ["AGENTSPEED_ENGINE"] = str(process.path)
            figures = measured(options.api, folder, options.streams, options.tokens, options.idle, options.rounds)
    for name, (sign, bound) in _MUST.items():
        met = figures[name] <= bound if sign == "<=" else figures[name] >= bound
        print(f"{name:22} {figures[name]:>9}   must {sign} {bound}   {'met' if met else 'MISSED'}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()

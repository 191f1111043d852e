"""Engines in environments and processes of their own that serve completions: how each is started, asked and ended."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, final

import httpx

from bench.peers_loop import going_on
from bench.peers_turns import Played, Step, Timing, talk
from bench.peers_workload import Case

START_SECONDS = 400
"""For a server to load its model, and to compile it."""
MOST_TOGETHER = 16
SLOTS_IN_SMALL = 1
"""Of llama.cpp in a small cache, which ends with an error where its slots together want more: what surely fits, for a
long conversation takes more than half of it."""
ROOM_TOKENS = 90_112
"""Of a cache that is not to be small: more than any case holds at once."""


class Absent(Exception):
    """A peer that is not here, or cannot play a case; the message says what it needs."""


class TooSlow(Exception):
    """A case took longer than it may."""


@final
@dataclass(frozen=True, slots=True)
class Drawn:
    ids: list[int]
    """What goes on in the context."""
    count: int
    first: float
    """When the first token came."""


class Dialect(Protocol):
    """How a server is asked for tokens, and what its events say."""

    path: str

    def body(self, ids: list[int], out: int) -> dict[str, Any]: ...
    def ids_of(self, event: Mapping[str, Any]) -> list[int]: ...


@final
class Completions:
    """OpenAI's completions, with vLLM's additions: ids come back, and the end token ends nothing."""

    path = "/v1/completions"

    def body(self, ids: list[int], out: int) -> dict[str, Any]:
        return {"model": "model", "prompt": ids, "max_tokens": out, "return_token_ids": True}

    def ids_of(self, event: Mapping[str, Any]) -> list[int]:
        # A server without the addition says text alone: its bytes stand for ids, which it then computes anew.
        return [
            token
            for choice in event.get("choices", ())
            for token in choice.get("token_ids") or list((choice.get("text") or "").encode())
        ]


@final
class LlamaCompletion:
    """llama.cpp's own: its version of OpenAI's says no ids."""

    path = "/completion"

    def body(self, ids: list[int], out: int) -> dict[str, Any]:
        return {"prompt": ids, "n_predict": out, "return_tokens": True, "cache_prompt": True}

    def ids_of(self, event: Mapping[str, Any]) -> list[int]:
        return list(event.get("tokens") or ())


@final
@dataclass(frozen=True, slots=True)
class Program:
    """A server that is installed here."""

    dialect: Dialect
    command: Callable[[int, int | None], Sequence[str]]
    """By port and, where the cache is to be small, its tokens."""
    environment: Mapping[str, str] = field(default_factory=dict)


def vllm(home: Path, model: Path, threads: int, *, eager: bool) -> Program:
    """Raises `Absent`."""
    python = home / "bin" / "python"
    _needed(python, "make peer-vllm")
    # Its `vllm serve` asks for the version of a package called vllm, which the one for CPUs is not.
    start = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    start += ["--dtype", "bfloat16", "--served-model-name", "model"]
    start += ["--max-num-seqs", str(MOST_TOGETHER), *(["--enforce-eager"] if eager else [])]

    of_token = token_bytes(json.loads((model / "config.json").read_text()))

    def command(port: int, pool_tokens: int | None) -> Sequence[str]:
        # It wants room for the longest context that it takes.
        small = ["--max-model-len", str(pool_tokens // 128 * 128 - 128)] if pool_tokens else []
        room = (pool_tokens or ROOM_TOKENS) * of_token
        return [*start, "--kv-cache-memory-bytes", str(room), "--port", str(port), *small]

    cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0))[:threads])
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    return Program(Completions(), command, {"VLLM_CPU_OMP_THREADS_BIND": cores, **quiet})


def token_bytes(config: Mapping[str, Any]) -> int:
    """Of the cache, for a token, in 16 bits."""
    if "kv_lora_rank" in config:
        of_layer = config["kv_lora_rank"] + config["qk_rope_head_dim"]
    else:
        of_layer = 2 * config["num_key_value_heads"] * config["head_dim"]
    return 2 * int(of_layer) * int(config["num_hidden_layers"])


def llama(home: Path, model: Path, threads: int) -> Program:
    """Raises `Absent`."""
    binary, weights = home / "build" / "bin" / "llama-server", model / "model.gguf"
    _needed(binary, "make peer-llama")
    _needed(weights, f"python bench/peers_gguf.py {model} {weights}")
    start = [str(binary), "--model", str(weights), "--threads", str(threads), "--kv-unified"]

    def command(port: int, pool_tokens: int | None) -> Sequence[str]:
        # The slots share one cache. A small one has no copy beside it in the same memory.
        small = ["--cache-ram", "0"] if pool_tokens else []
        slots = SLOTS_IN_SMALL if pool_tokens else MOST_TOGETHER
        room = str(pool_tokens or ROOM_TOKENS)
        return [*start, "--parallel", str(slots), "--ctx-size", room, "--port", str(port), *small]

    return Program(LlamaCompletion(), command)


def _needed(path: Path, remedy: str) -> None:
    if not path.exists():
        raise Absent(f"{path} does not exist: {remedy}")


@final
class Served:
    """A server that runs already, asked with ids."""

    def __init__(self, url: str, dialect: Dialect) -> None:
        # A connection for each request: a server may close one that is kept at any moment.
        self._client = httpx.AsyncClient(timeout=None, limits=httpx.Limits(max_keepalive_connections=0))
        self._url, self._dialect = url.rstrip("/"), dialect

    async def play(self, case: Case, limit: float) -> Played:
        """Raises `Absent` and `TooSlow`."""
        try:
            async with asyncio.timeout(limit):
                start = list(case.prefix.encode())
                if case.warm:
                    await self.complete([*start, ord("W")], 1)
                if case.loop is not None:
                    return await going_on(case.loop, lambda: contextlib.nullcontext(_Talk(self, list(start))))
                barrier = asyncio.Barrier(len(case.scripts)) if case.together else None
                talks = (talk(_Talk(self, list(start)), script, barrier) for script in case.scripts)
                return list(await asyncio.gather(*talks))
        except TimeoutError as error:
            raise TooSlow from error

    async def complete(self, ids: list[int], out: int) -> Drawn:
        """Raises `Absent`. Events are read when all have come: what a client does with them is not timed."""
        body = {**self._dialect.body(ids, out), "temperature": 0, "ignore_eos": True, "stream": True}
        first, parts = 0.0, list[bytes]()
        try:
            async with self._client.stream("POST", self._url + self._dialect.path, json=body) as answer:
                if answer.is_error:
                    raise Absent(f"{self._url} refused: {(await answer.aread()).decode(errors='replace')[:300]}")
                async for part in answer.aiter_raw():
                    first = first or time.perf_counter()
                    parts.append(part)
        except httpx.HTTPError as error:
            raise Absent(f"{self._url} did not answer to the end: {error}") from error
        drawn: list[int] = []
        for line in b"".join(parts).splitlines():
            if line.startswith(b"data: {"):
                event = json.loads(line.removeprefix(b"data: "))
                if "error" in event:
                    raise Absent(f"{self._url} ended with {event['error']}")
                drawn += self._dialect.ids_of(event)
            elif line.startswith(b"error: "):
                raise Absent(f"{self._url} ended with {line.decode(errors='replace')}")
        return Drawn(drawn, len(drawn), first)

    async def start(self, pool_tokens: int | None) -> None:
        """Its cache is what it was started with. Raises `Absent`."""
        del pool_tokens
        if not await self.ready():
            raise Absent(f"nothing answers at {self._url}")

    async def ready(self) -> bool:
        try:
            answer = await self._client.get(f"{self._url}/health", timeout=5)
        except httpx.HTTPError:
            return False  # it does not listen yet
        return answer.is_success

    async def close(self) -> None:
        await self._client.aclose()


@final
class _Talk:
    """A conversation whose whole context goes with each request."""

    def __init__(self, server: Served, known: list[int]) -> None:
        self._server, self._known = server, known

    async def step(self, step: Step) -> Timing:
        self._known += step.add.encode()
        begun = time.perf_counter()
        drawn = await self._server.complete(self._known, step.out)
        whole = time.perf_counter() - begun
        self._known += drawn.ids
        return Timing(begun, drawn.first - begun, whole, drawn.count)


@final
class Launched:
    """A program as one server for each size of cache, started when it is first needed and ended in `close`."""

    def __init__(self, name: str, program: Program) -> None:
        self._name, self._program = name, program
        self._stack = contextlib.AsyncExitStack()
        self._servers: dict[int | None, Served] = {}

    async def play(self, case: Case, limit: float) -> Played:
        """Raises `Absent` and `TooSlow`."""
        await self.start(case.pool_tokens)
        return await self._servers[case.pool_tokens].play(case, limit)

    async def start(self, pool_tokens: int | None) -> None:
        """Raises `Absent` with the end of what the server said."""
        if pool_tokens in self._servers:
            return
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            port = int(taken.getsockname()[1])
        log = Path(tempfile.mkdtemp()) / f"{self._name.replace(' ', '-')}.log"
        with log.open("wb") as said:
            process = await asyncio.create_subprocess_exec(
                *self._program.command(port, pool_tokens),
                env={**os.environ, **self._program.environment},
                stdout=said,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
            )
        self._stack.push_async_callback(_end, process)
        server = Served(f"http://127.0.0.1:{port}", self._program.dialect)
        self._stack.push_async_callback(server.close)
        until = time.monotonic() + START_SECONDS
        while not await server.ready():
            if process.returncode is not None or time.monotonic() > until:
                raise Absent(f"{self._name} did not start: {log.read_text(errors='replace')[-600:]}")
            await asyncio.sleep(0.5)
        await server.complete(list(b"WARM"), 8)
        self._servers[pool_tokens] = server

    async def close(self) -> None:
        await self._stack.aclose()


async def _end(process: asyncio.subprocess.Process) -> None:
    """Of the server and of what it started."""
    for asked in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, asked)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), 20)

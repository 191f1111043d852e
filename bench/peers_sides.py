"""The engines that `bench/peers_cpu.py` compares: ours through the SDK, transformers, and what serves completions."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import httpx

from agentspeed import Engine, Session
from agentspeed_engine.ids import pages_for
from bench.peers_workload import Case, Played, Step, Timing

PAGE = 64


class Absent(Exception):
    """A peer that is not here; the message says what it needs."""


class Side(Protocol):
    """One engine with a model loaded."""

    async def play(self, case: Case) -> Played: ...
    async def close(self) -> None: ...


class Ours:
    """What a user writes, an engine process and its socket included."""

    def __init__(self, model: Path, threads: int, **options: Any) -> None:
        self._model, self._options = model, {"threads": threads, "record": "off", **options}
        self._stack = contextlib.AsyncExitStack()
        self._engines: dict[int | None, Engine] = {}

    async def play(self, case: Case) -> Played:
        engine = await self._engine(case.pool_tokens)
        if not case.warm:
            return list(await asyncio.gather(*(self._alone(engine, case, script) for script in case.scripts)))
        async with engine.session(system=case.prefix) as trunk:
            await trunk.generate("W", max_tokens=1)
            async with trunk.fork(len(case.scripts)) as branches:
                pairs = zip(branches, case.scripts, strict=True)
                return list(await asyncio.gather(*(self._talk(branch, script) for branch, script in pairs)))

    async def _engine(self, pool_tokens: int | None) -> Engine:
        if pool_tokens not in self._engines:
            pages: dict[str, Any] = {}
            if pool_tokens is not None:
                pages = {"pages": pages_for(pool_tokens, PAGE), "firm_pages": 0}
            engine = await self._stack.enter_async_context(Engine(self._model, **self._options, **pages))
            async with engine.session() as warm:
                await warm.generate("WARM", max_tokens=8)
            self._engines[pool_tokens] = engine
        return self._engines[pool_tokens]

    async def _alone(self, engine: Engine, case: Case, script: Sequence[Step]) -> list[Timing]:
        async with engine.session(system=case.prefix or None) as session:
            return await self._talk(session, script)

    async def _talk(self, session: Session, script: Sequence[Step]) -> list[Timing]:
        timings: list[Timing] = []
        for step in script:
            await asyncio.sleep(step.pause)
            begun = time.perf_counter()
            reply = await session.generate(step.add, max_tokens=step.out)
            whole = time.perf_counter() - begun
            timings.append(Timing(begun, whole - reply.usage.decode_seconds, whole, len(reply.ids)))
        return timings

    async def close(self) -> None:
        await self._stack.aclose()


class Transformers:
    """With a cache that is kept from step to step; conversations of equal length are one batch, others take turns."""

    def __init__(self, model: Path, threads: int, dtype: str) -> None:
        try:
            import torch
            import transformers
        except ModuleNotFoundError as error:
            raise Absent(f"{error.name} is not installed: pip install transformers") from error
        torch.set_num_threads(threads)
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        self._torch, self._cache = torch, transformers.DynamicCache
        self._model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
        self._lock = asyncio.Lock()

    async def play(self, case: Case) -> Played:
        return await asyncio.to_thread(self._batch, case) if _is_batch(case) else await self._in_turns(case)

    async def _in_turns(self, case: Case) -> Played:
        trunk = await asyncio.to_thread(self._feed, None, _ids(case.prefix)) if case.warm else None
        return list(await asyncio.gather(*(self._talk(case, script, trunk) for script in case.scripts)))

    async def _talk(self, case: Case, script: Sequence[Step], trunk: Any) -> list[Timing]:
        cache = copy.deepcopy(trunk[0]) if trunk is not None else None
        pending = [] if case.warm else _ids(case.prefix)
        timings: list[Timing] = []
        for step in script:
            await asyncio.sleep(step.pause)
            begun = time.perf_counter()
            async with self._lock:
                cache, last, first = await asyncio.to_thread(self._draw, cache, [*pending, *_ids(step.add)], step.out)
            timings.append(Timing(begun, first - begun, time.perf_counter() - begun, step.out))
            pending = [last]
        return timings

    def _draw(self, cache: Any, ids: list[int], out: int) -> tuple[Any, int, float]:
        """(cache, the last token, which it lacks, when the first one came)"""
        cache, token = self._feed(cache, ids)
        first = time.perf_counter()
        for _ in range(out - 1):
            cache, token = self._feed(cache, [token])
        return cache, token, first

    def _feed(self, cache: Any, ids: list[int]) -> tuple[Any, int]:
        cache, tokens = self._step(cache, [ids])
        return cache, tokens[0]

    def _step(self, cache: Any, rows: list[list[int]]) -> tuple[Any, list[int]]:
        with self._torch.inference_mode():
            said = self._model(self._torch.tensor(rows), past_key_values=cache, use_cache=True, logits_to_keep=1)
        return said.past_key_values, said.logits[:, -1].argmax(-1).tolist()

    def _batch(self, case: Case) -> Played:
        rows = [_ids(script[0].add) for script in case.scripts]
        cache = None
        if case.warm:
            cache, _ = self._feed(None, _ids(case.prefix))
            cache.batch_repeat_interleave(len(rows))
        begun = time.perf_counter()
        cache, tokens = self._step(cache, rows)
        first, out = time.perf_counter(), case.scripts[0][0].out
        for _ in range(out - 1):
            cache, tokens = self._step(cache, [[token] for token in tokens])
        timing = Timing(begun, first - begun, time.perf_counter() - begun, out)
        return [[timing] for _ in rows]

    async def close(self) -> None:
        del self._model


class Served:
    """A server of OpenAI's completions that takes token ids, in an environment and a process of its own."""

    def __init__(self, url: str, model: str) -> None:
        self._client, self._url, self._name = httpx.AsyncClient(timeout=None), url.rstrip("/"), model
        try:
            httpx.get(f"{self._url}/v1/models", timeout=5)
        except httpx.HTTPError as error:
            raise Absent(f"nothing answers at {url}: {error}") from error

    async def play(self, case: Case) -> Played:
        start = _ids(case.prefix)
        if case.warm:
            await self._complete([*start, ord("W")], 1)
        return list(await asyncio.gather(*(self._talk(list(start), script) for script in case.scripts)))

    async def _talk(self, known: list[int], script: Sequence[Step]) -> list[Timing]:
        timings: list[Timing] = []
        for step in script:
            await asyncio.sleep(step.pause)
            known += _ids(step.add)
            begun = time.perf_counter()
            first, drawn, count = await self._complete(known, step.out)
            timings.append(Timing(begun, first - begun, time.perf_counter() - begun, count))
            known += drawn
        return timings

    async def _complete(self, ids: list[int], out: int) -> tuple[float, list[int], int]:
        """(when the first token came, what goes on in the context, how many tokens were drawn)"""
        body = {
            "model": self._name,
            "prompt": ids,
            "max_tokens": out,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        first, drawn, text, count = 0.0, list[int](), "", out
        async with self._client.stream("POST", f"{self._url}/v1/completions", json=body) as answer:
            if answer.is_error:
                raise Absent(f"{self._url} refused: {(await answer.aread()).decode(errors='replace')[:300]}")
            async for line in answer.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line.removeprefix("data: "))
                first = first or time.perf_counter()
                count = (event.get("usage") or {}).get("completion_tokens", count)
                for choice in event.get("choices", ()):
                    drawn += choice.get("token_ids") or []
                    text += choice.get("text") or ""
        # Without ids the next call says the text in bytes: a server that drew other ids computes them anew.
        return first or time.perf_counter(), drawn or list(text.encode()), count

    async def close(self) -> None:
        await self._client.aclose()


def _ids(text: str) -> list[int]:
    return list(text.encode())


def _is_batch(case: Case) -> bool:
    """Conversations of one step and of equal length, which a plain batch can hold."""
    alike = len({(len(script[0].add), script[0].out) for script in case.scripts}) == 1
    single = all(len(script) == 1 for script in case.scripts)
    return len(case.scripts) > 1 and alike and single and (case.warm or not case.prefix)

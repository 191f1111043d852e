"""The engines that `bench/peers_cpu.py` runs in its own environment: ours through the SDK, and transformers."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Protocol, final

from agentspeed import Engine, Session
from agentspeed_engine.ids import pages_for
from bench.peers_loop import going_on
from bench.peers_served import Absent, TooSlow
from bench.peers_turns import Played, Step, Timing, talk
from bench.peers_workload import Case

PAGE = 64


class Side(Protocol):
    """One engine with a model loaded."""

    async def start(self, pool_tokens: int | None) -> None:
        """Ready for a case with so much room, so that `play` has nothing to load. Raises `Absent`."""

    async def play(self, case: Case, limit: float) -> Played:
        """Within `limit` seconds. Raises `Absent` and `TooSlow`."""
        ...

    async def close(self) -> None: ...


class Ours:
    """What a user writes, an engine process and its socket included."""

    def __init__(self, model: Path, threads: int, **options: Any) -> None:
        self._model, self._options = model, {"threads": threads, "record": "off", **options}
        self._stack = contextlib.AsyncExitStack()
        self._engines: dict[int | None, Engine] = {}

    async def start(self, pool_tokens: int | None) -> None:
        if pool_tokens in self._engines:
            return
        pages: dict[str, Any] = {}
        if pool_tokens is not None:
            pages = {"pages": pages_for(pool_tokens, PAGE), "firm_pages": 0}
        engine = await self._stack.enter_async_context(Engine(self._model, **self._options, **pages))
        async with engine.session() as warm:
            await warm.generate("WARM", max_tokens=8)
        self._engines[pool_tokens] = engine

    async def play(self, case: Case, limit: float) -> Played:
        await self.start(case.pool_tokens)
        try:
            async with asyncio.timeout(limit):
                return await self._play(self._engines[case.pool_tokens], case)
        except TimeoutError as error:
            raise TooSlow from error

    async def _play(self, engine: Engine, case: Case) -> Played:
        if case.loop is not None:
            return await going_on(case.loop, lambda: _opened(engine, case))
        barrier = asyncio.Barrier(len(case.scripts)) if case.together else None
        if not case.warm:
            return list(await asyncio.gather(*(self._alone(engine, case, script, barrier) for script in case.scripts)))
        async with engine.session(system=case.prefix) as trunk:
            await trunk.generate("W", max_tokens=1)
            async with trunk.fork(len(case.scripts)) as branches:
                pairs = zip(branches, case.scripts, strict=True)
                return list(await asyncio.gather(*(talk(_Talk(branch), script, barrier) for branch, script in pairs)))

    async def _alone(
        self, engine: Engine, case: Case, script: Sequence[Step], barrier: asyncio.Barrier | None
    ) -> list[Timing]:
        async with _opened(engine, case) as conversation:
            return await talk(conversation, script, barrier)

    async def close(self) -> None:
        await self._stack.aclose()


@contextlib.asynccontextmanager
async def _opened(engine: Engine, case: Case) -> AsyncIterator[_Talk]:
    async with engine.session(system=case.prefix or None) as session:
        yield _Talk(session)


@final
class _Talk:
    def __init__(self, session: Session) -> None:
        self._session = session

    async def step(self, step: Step) -> Timing:
        begun = time.perf_counter()
        reply = await self._session.generate(step.add, max_tokens=step.out)
        whole = time.perf_counter() - begun
        return Timing(begun, whole - reply.usage.decode_seconds, whole, len(reply.ids))


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
        self._until = 0.0

    async def start(self, pool_tokens: int | None) -> None:
        del pool_tokens  # its cache is what it needs

    async def play(self, case: Case, limit: float) -> Played:
        # A thread cannot be cancelled: each step of it looks at the clock.
        self._until = time.perf_counter() + limit
        return await asyncio.to_thread(self._batch, case) if _is_batch(case) else await self._in_turns(case)

    async def _in_turns(self, case: Case) -> Played:
        if case.loop is not None:
            try:
                return await going_on(case.loop, lambda: contextlib.nullcontext(_Row(self, None, _ids(case.prefix))))
            finally:
                self._until = 0.0  # a turn that was left goes on in its thread until it looks
        trunk = await asyncio.to_thread(self._feed, None, _ids(case.prefix)) if case.warm else None
        pending = [] if case.warm else _ids(case.prefix)
        rows = [_Row(self, copy.deepcopy(trunk[0]) if trunk else None, pending) for _ in case.scripts]
        pairs = zip(rows, case.scripts, strict=True)
        return list(await asyncio.gather(*(talk(row, script, None) for row, script in pairs)))

    async def draw(self, cache: Any, ids: list[int], out: int) -> tuple[Any, int, float]:
        """(cache, the last token, which it lacks, when the first one came), in turns"""
        async with self._lock:
            return await asyncio.to_thread(self._draw, cache, ids, out)

    def _draw(self, cache: Any, ids: list[int], out: int) -> tuple[Any, int, float]:
        cache, token = self._feed(cache, ids)
        first = time.perf_counter()
        for _ in range(out - 1):
            cache, token = self._feed(cache, [token])
        return cache, token, first

    def _feed(self, cache: Any, ids: list[int]) -> tuple[Any, int]:
        cache, tokens = self._step(cache, [ids])
        return cache, tokens[0]

    def _step(self, cache: Any, rows: list[list[int]]) -> tuple[Any, list[int]]:
        if time.perf_counter() > self._until:
            raise TooSlow
        with self._torch.inference_mode():
            said = self._model(self._torch.tensor(rows), past_key_values=cache, use_cache=True, logits_to_keep=1)
        return said.past_key_values, said.logits[:, -1].argmax(-1).tolist()

    def _batch(self, case: Case) -> Played:
        cache: Any = None
        if case.warm:
            cache, _ = self._feed(None, _ids(case.prefix))
            cache.batch_repeat_interleave(len(case.scripts))
        pending: list[list[int]] = [[] for _ in case.scripts]
        timings: list[Timing] = []
        for steps in zip(*case.scripts, strict=True):
            begun = time.perf_counter()
            rows = [[*late, *_ids(step.add)] for late, step in zip(pending, steps, strict=True)]
            cache, tokens = self._step(cache, rows)
            first = time.perf_counter()
            for _ in range(steps[0].out - 1):
                cache, tokens = self._step(cache, [[token] for token in tokens])
            timings.append(Timing(begun, first - begun, time.perf_counter() - begun, steps[0].out))
            pending = [[token] for token in tokens]
        return [timings for _ in case.scripts]

    async def close(self) -> None:
        del self._model


@final
class _Row:
    """A conversation with a cache of its own."""

    def __init__(self, side: Transformers, cache: Any, pending: list[int]) -> None:
        self._side, self._cache, self._pending = side, cache, pending

    async def step(self, step: Step) -> Timing:
        begun = time.perf_counter()
        self._cache, last, first = await self._side.draw(self._cache, [*self._pending, *_ids(step.add)], step.out)
        self._pending = [last]
        return Timing(begun, first - begun, time.perf_counter() - begun, step.out)


def _ids(text: str) -> list[int]:
    return list(text.encode())


def _is_batch(case: Case) -> bool:
    """Conversations of equal lengths and without pauses, which a plain batch can hold."""
    alike = len({tuple((len(step.add), step.out, step.pause) for step in script) for script in case.scripts}) == 1
    return len(case.scripts) > 1 and alike and (case.warm or not case.prefix)

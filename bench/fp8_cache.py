"""How far a KV cache in fp8 moves a model: logits against float64 on random shapes and on nano, and nano's tasks.

    python bench/fp8_cache.py
    python bench/fp8_cache.py --tasks 0     # logits alone

Logits: the distance to float64 with a cache in float64, norm over norm, median over positions, and how often the
likeliest token is float64's: in bfloat16 with a cache in bfloat16, the same with a cache in fp8, and in float32 with a
cache in fp8, where the cache alone is rounded. Of random shapes over bytes of English prose; of nano over held-out
requests of `bench/nano.py` with the replies that it gives them in float64. Each is fed as a prompt and then token by
token, so that both kinds of attention are in it.
Other rows (`--rows`): the same distance in float64, with rows rounded in other ways once they are written, token by
token: what the format is compared with. A token reads its own row before it is rounded, in all of them alike.
Tasks: held-out requests that must call tools and answer, through the public SDK. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "engine"), str(ROOT / "kernels")]

import anyio
import torch

from agentspeed import Engine
from agentspeed.engine import NANO
from agentspeed_engine.models.catalog import describe, load
from agentspeed_engine.models.kv_layout import KvPool
from agentspeed_engine.models.loaded import LoadedModel
from bench.int8 import SHAPES, checkpoint, moved
from bench.nano import AT_ONCE, UNSEEN, asked, each, held_out, offered, system_of, tool_shares
from tests.support.paged import Trail, batch

PAGE, DECODED = 64, 24
PROSE = ("architecture", "equality", "kv-ownership", "scheduling")
PROSE_TOKENS, ROWS_TOKENS = 320, 160


class Way(NamedTuple):
    dtype: Any
    cache: Any


class Rounds(NamedTuple):
    """How numbers of a row are rounded."""

    to: Callable[[torch.Tensor], torch.Tensor]
    most: float
    scaled: bool = True
    whole_rows: bool = False
    """One scale for all heads."""
    turned_too: bool = False


E4M3 = Rounds(lambda x: x.float().to(torch.float8_e4m3fn), 448.0)
ROWS = {
    "e4m3, a scale for each head": E4M3,
    "e5m2": E4M3._replace(to=lambda x: x.float().to(torch.float8_e5m2), most=57344.0),
    "int8": E4M3._replace(to=torch.round, most=127.0),
    "e4m3, one scale for all heads": E4M3._replace(whole_rows=True),
    "e4m3, turned coordinates too": E4M3._replace(turned_too=True),
    "e4m3 without a scale": E4M3._replace(scaled=False),
}
EXACT = Way("float64", None)
WAYS = (Way("bfloat16", None), Way("bfloat16", "fp8"), Way("float32", "fp8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=60)
    parser.add_argument("--prompts", type=int, default=40, help="held-out requests whose logits are compared on nano")
    parser.add_argument("--rows", action="store_true", help="other ways to round rows, instead of all else")
    parser.add_argument("--only", default="", help="models whose name contains this")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    figures: dict[str, Any] = {"logits": {}, "tasks": {}}
    for name in (name for name in (*SHAPES, "nano") if options.only in name):
        folder = NANO if name == "nano" else checkpoint(name)
        texts = anyio.run(conversations, options.prompts) if name == "nano" else prose()
        if options.rows:
            figures["logits"][name] = other_rows(folder, [ids[:ROWS_TOKENS] for ids in texts])
            print(name, figures["logits"][name], flush=True)
            continue
        figures["logits"][name] = found = logits(folder, texts)
        found["bytes of a token"] = {
            cache or "bfloat16": describe(folder, dtype="bfloat16", cache=cache).kv.bytes_per_token
            for cache in (None, "fp8")
        }
        print(name, found, flush=True)
    for way in WAYS[:2] if options.tasks and not options.rows and options.only in "nano" else ():
        figures["tasks"][said(way)] = done = anyio.run(tasks, way, options.tasks)
        print("nano", said(way), done, flush=True)
    print(json.dumps({"bench": "fp8_cache", "tasks_each": options.tasks, **figures}))


def said(way: Way) -> str:
    return f"{way.dtype}, cache in {way.cache or way.dtype}"


def prose() -> list[list[int]]:
    """Bytes, which are ids of every vocabulary here."""
    return [
        list((ROOT / f"docs/explanation/{name}.md").read_text().encode()[200 : 200 + PROSE_TOKENS]) for name in PROSE
    ]


async def conversations(count: int) -> list[list[int]]:
    """Ids of requests and what nano says to them in float64."""

    async with Engine(NANO, dtype="float64", device="cpu") as engine:

        async def one(task: Any) -> list[int]:
            async with engine.session(system=system_of(task), tools=offered(task)) as s:
                _ = await s.generate(asked(task), max_tokens=128)
                return list(s.ids)

        return [ids for ids in await each(held_out("tool", count, UNSEEN), one, AT_ONCE) if len(ids) > DECODED]


def logits(folder: Path, texts: Sequence[list[int]]) -> dict[str, Any]:
    exact = run(folder, EXACT, texts)
    return {said(way): moved(run(folder, way, texts), exact) for way in WAYS}


def run(folder: Path, way: Way, texts: Sequence[list[int]]) -> torch.Tensor:
    pages = max(-(-len(ids) // PAGE) for ids in texts)
    model = load(folder, dtype=way.dtype, pages=pages, page_tokens=PAGE, cache=way.cache)
    return torch.cat([of_text(model, ids, pages) for ids in texts])


def other_rows(folder: Path, texts: Sequence[list[int]]) -> dict[str, Any]:
    exact = decoded(folder, texts, None)
    return {name: moved(decoded(folder, texts, way), exact) for name, way in ROWS.items()}


def decoded(folder: Path, texts: Sequence[list[int]], way: Rounds | None) -> torch.Tensor:
    """Token by token, every row rounded by `way` once it is written."""
    pages = max(-(-len(ids) // PAGE) for ids in texts)
    model, parts = load(folder, dtype="float64", pages=pages, page_tokens=PAGE), list[torch.Tensor]()
    for ids in texts:
        trail = Trail(PAGE, list(range(pages)))
        for position, token in enumerate(ids):
            parts.append(model.forward(batch(PAGE, [(trail, [token])])).clone())
            for pool, held in zip(model.info.kv.pools, model.pools.tensors, strict=True):
                rows = held.flatten(1, 2)
                if way is not None:
                    rows[:, position] = rounded(rows[:, position], pool, way)
    return torch.cat(parts)


def rounded(rows: torch.Tensor, pool: KvPool, way: Rounds) -> torch.Tensor:
    """Rows [layers, numbers] of a pool."""
    plain = 0 if way.turned_too else pool.plain
    numbers, kept = rows[:, : pool.width - plain], rows[:, pool.width - plain :]
    heads = numbers.unflatten(1, (1 if way.whole_rows else pool.heads, -1))
    scale = heads.abs().amax(-1, keepdim=True) / way.most if way.scaled else torch.ones(())
    stand_for = way.to((heads / scale).clamp(-way.most, way.most)).double() * scale
    return torch.cat([stand_for.flatten(1), kept.bfloat16().double()], 1)


def of_text(model: LoadedModel, ids: list[int], pages: int) -> torch.Tensor:
    trail = Trail(PAGE, list(range(pages)))
    parts = [model.forward(batch(PAGE, [(trail, ids[:-DECODED])])).clone()]
    parts += [model.forward(batch(PAGE, [(trail, [token])])).clone() for token in ids[-DECODED:]]
    return torch.cat(parts).double()


async def tasks(way: Way, count: int) -> dict[str, float]:
    async with Engine(NANO, dtype=way.dtype, kv_cache_dtype=way.cache or "dtype", device="cpu") as engine:
        return await tool_shares(engine, count)


if __name__ == "__main__":
    main()

"""The whole engine on a GPU, in a process of its own: models of DeepSeek-V2-Lite's and of Qwen3-8B's shapes, with
weights by chance."""

from __future__ import annotations

import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpu_timing import READ_BYTES, Report

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
os.environ.setdefault("TRITON_INTERPRET", "0")

from agentspeed_engine.models.catalog import describe, read_source
from tests.support.engine_client import Front, engine

LATENT, GROUPED = (f"random:{ROOT / f'bench/models/{name}.json'}" for name in ("v2-lite", "qwen3-8b"))
SECTIONS = {LATENT: "engine", GROUPED: "engine-gqa"}
CONTEXT, DRAWN = 4096, 128
LONG, MORE = 32_768, 512
MUST = {"batch 1": 0.42, "batch 32": 0.45}
RESUME_MUST = 8.0


def section_engine(report: Report, model: str = LATENT, *, depth: int = 1) -> None:
    """Tokens/s at batch 1 and 32, and what a resume saves; figures are those of a client of the engine's socket."""
    draw, section = random.Random(0), SECTIONS[model]
    with _started(model, depth=depth) as front:
        for batch in (1, 32):
            share, figures = _decoded(front, draw, batch, model)
            report.add(section, f"decode, batch {batch} at {CONTEXT}", **figures, share=share,
                       must=MUST[f"batch {batch}"], met=share >= MUST[f"batch {batch}"])  # fmt: skip
        resumed, whole = resume(front, draw)
        report.add(section, f"+{MORE} on {LONG} against all anew", resumed_ms=1e3 * resumed, anew_ms=1e3 * whole,
                   times=whole / resumed, must=RESUME_MUST, met=whole / resumed >= RESUME_MUST)  # fmt: skip


def section_engine_fp8(report: Report) -> None:
    """Tokens/s with weights in fp8, of which the limit counts the bytes that are kept."""
    draw = random.Random(0)
    with _started(LATENT, weights="fp8") as front:
        for batch in (1, 32):
            share, figures = _decoded(front, draw, batch, LATENT, "fp8")
            report.add("engine", f"fp8, decode, batch {batch} at {CONTEXT}", **figures, share=share)


def section_engine_fp8_cache(report: Report) -> None:
    """Tokens/s with a KV cache in fp8, beside one in bfloat16 in the same run."""
    taken: dict[str, list[float]] = {}
    for kept in ("dtype", "fp8"):
        draw = random.Random(0)
        with _started(LATENT, kv_cache_dtype=kept) as front:
            for batch in (1, 32):
                seconds, steps = decode(front, draw, batch)
                taken.setdefault(f"batch {batch}", []).append(seconds)
                report.add("engine", f"cache in {kept}, decode, batch {batch} at {CONTEXT}", steps=steps,
                           **{"tokens/s": batch * DRAWN / seconds, "ms a step": 1e3 * seconds / DRAWN})  # fmt: skip
    for name, (wide, narrow) in taken.items():
        report.add("engine", f"cache in fp8, {name} at {CONTEXT}", times=wide / narrow, must=0.95,
                   met=wide / narrow >= 0.95)  # fmt: skip


@contextmanager
def _started(model: str, **options: Any) -> Iterator[Front]:
    with tempfile.TemporaryDirectory() as folder, engine(
        Path(folder), model=model, device="cuda", dtype="bfloat16", pages=6000, context_limit=36_864,
        prefill_chunk=2048, extend_tokens=1024, record="off", **options,
    ) as process:  # fmt: skip
        for line in process.progress:
            print(f"          {line}")
        front = process.connect()
        front.socket.settimeout(30.0)
        yield front


def _decoded(
    front: Front, draw: random.Random, batch: int, model: str, kept: str = "dtype"
) -> tuple[float, dict[str, Any]]:
    """(Share of the limit, figures to print.)"""
    seconds, steps = decode(front, draw, batch)
    figures = {"tokens/s": batch * DRAWN / seconds, "ms a step": 1e3 * seconds / DRAWN, "steps": steps}
    return limit_seconds(batch, model, kept) * DRAWN / seconds, figures


def decode(front: Front, draw: random.Random, batch: int) -> tuple[float, int]:
    """(Seconds for DRAWN tokens of each branch, steps of the engine meanwhile); the second of two rounds."""
    branches = [front.open(private=True) for _ in range(batch)]
    front.finish(*[front.start(branch, ids(draw, CONTEXT), max_tokens=2) for branch in branches])
    seconds = []
    for _ in range(2):
        before = front.stats().counts["steps"]
        started = time.perf_counter()
        turns = [front.start(branch, ids(draw, 1), max_tokens=DRAWN) for branch in branches]
        front.finish(*turns)
        seconds.append(time.perf_counter() - started)
        assert all(len(turn.ids) == DRAWN for turn in turns), "a turn ended by itself"
        steps = front.stats().counts["steps"] - before
    for branch in branches:
        front.end(branch)
    return seconds[-1], steps


def resume(front: Front, draw: random.Random) -> tuple[float, float]:
    """Medians of three: MORE tokens more in a session of LONG, and a new session that is given all of them."""
    trunk = front.open(private=True)
    held = ids(draw, LONG)
    front.generate(trunk, held, max_tokens=1)
    resumed, whole = [], []
    for _ in range(3):
        (child,) = front.fork(trunk)
        more = ids(draw, MORE)
        started = time.perf_counter()
        front.generate(child, more, max_tokens=1)
        resumed.append(time.perf_counter() - started)
        front.end(child)
        other = front.open(private=True)
        started = time.perf_counter()
        front.generate(other, [*held, *more], max_tokens=1)
        whole.append(time.perf_counter() - started)
        front.end(other)
    front.end(trunk)
    return statistics.median(resumed), statistics.median(whole)


def limit_seconds(batch: int, model: str = LATENT, kept: str = "dtype", ranks: int = 1) -> float:
    """Of one step: what must be read of the weights (each expert that any token visits once) and of the cache. On
    several GPUs each reads its part of the weights and, of latents, all of the cache."""
    config = read_source(model).config
    info = describe(model, dtype="bfloat16", weights="fp8" if kept == "fp8" else None)
    read: float = info.weight_bytes - 2 * config.vocab_size * config.hidden
    if config.moe is not None:
        moe = config.moe
        expert = 3 * moe.inner * config.hidden * (1 if kept == "fp8" else 2)
        hit = moe.experts * (1 - (1 - moe.top / moe.experts) ** batch)
        read -= (config.layers - 1) * (moe.experts - hit) * expert
    return float((read / ranks + batch * CONTEXT * info.kv.bytes_per_token) / READ_BYTES)


def ids(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(3, 99_000) for _ in range(count)]

"""What a decoded token costs outside the kernels and in each, on a model of 50 M: the runner alone, without an engine
around it.

    python bench/step.py
    python bench/step.py --dtype float32 --threads 2
    python bench/step.py --model qwen3-50m --branches 8 --context 8192
    python bench/step.py --model qwen3-50m --sessions 16
    python bench/step.py --model qwen3-50m --context 16384 --caches
    python bench/step.py --model qwen3-50m --branches 5 --ops
    python bench/step.py --context 2048 --chunk 512 --ops

One session at a context of 4096 tokens, branches of it, or sessions with such a context each decode with recorded steps
and with their modules called in every step, in turns.
Times are processor time of the thread that drives the model, so other processes count little; with one thread nothing
waits for a team. Sampling, scheduler and transport are not in it. With `--caches` steps over a KV cache in fp8 take
turns with steps over one in the model's format, all of them recorded. With `--ops` recorded steps are also run call by
call, and a line is printed for each op beside what the machine reads and computes; with `--chunk` so many tokens of a
prompt are computed behind the context instead. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "engine"), str(ROOT / "kernels")]

import numpy as np

from agentspeed_engine.ids import pages_for
from agentspeed_engine.models.catalog import load
from agentspeed_engine.models.inputs import FlatBatch, Run
from agentspeed_engine.models.loaded import LoadedModel
from agentspeed_kernels.cpu import native
from agentspeed_kernels.cpu.recording import kernel_clock
from agentspeed_kernels.signature import CacheFormat
from bench.step_ops import Batches, by_op
from tests.support.random_checkpoint import make_checkpoint

PAGE, CHUNK, WARM = 64, 512, 8
MUST = 0.2
"""Of a step, outside kernels, recorded."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="v3-50m", help="a configuration in bench/models")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--branches", type=int, default=1, help="that share the context")
    parser.add_argument("--sessions", type=int, default=1, help="that share nothing; their contexts are one's rows")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--caches", action="store_true")
    parser.add_argument("--ops", action="store_true")
    parser.add_argument("--chunk", type=int, default=0, help="tokens of a prompt, with --ops")
    arguments = parser.parse_args()
    if isinstance(native.library(), native.Unavailable):
        raise SystemExit(f"there is nothing to measure without native kernels: {native.library()}")
    folder = ROOT / ".checkpoints" / f"{arguments.model}-{arguments.dtype}"
    if not (folder / "model.safetensors").exists():
        config = json.loads((ROOT / f"bench/models/{arguments.model}.json").read_text())
        make_checkpoint(config, folder, dtype=arguments.dtype)
    context, count = arguments.context, max(arguments.branches, arguments.sessions)
    shared = context if arguments.branches > 1 else 0
    steps = WARM + 2 * arguments.rounds * arguments.tokens
    if arguments.chunk and (count > 1 or not arguments.ops):
        parser.error("--chunk is of one session, and goes with --ops")
    rows = Rows(count, context, shared, own=pages_for(context - shared + max(steps, arguments.chunk), PAGE))
    model = filled(folder, arguments, rows)
    position = context + WARM
    run = {
        "bench": "step", "load": os.getloadavg()[0],
        **{name: getattr(arguments, name) for name in ("model", "context", "branches", "sessions", "dtype", "threads")},
    }  # fmt: skip
    if arguments.caches:
        coded = filled(folder, arguments, rows, "fp8")
        print(json.dumps(run | compared(model, coded, rows, position, arguments)))
        return
    if arguments.ops:
        figures_of_ops = by_op(model, batches_of(model, rows, position, arguments), arguments.dtype)
        print(json.dumps(run | {"chunk": arguments.chunk} | figures_of_ops))
        return
    taken: dict[str, list[tuple[float, float]]] = {"recorded": [], "modules": []}
    for _ in range(arguments.rounds):
        for manner, into in taken.items():
            model.repeats = manner == "recorded"
            into.append(measured(model, rows, position, arguments.tokens))
            position += arguments.tokens
    figures: dict[str, Any] = {}
    for manner, pairs in taken.items():
        whole, outside = (median(values) for values in zip(*pairs, strict=True))
        share = median(outside / whole for whole, outside in pairs)
        verdict = "" if manner != "recorded" else f"  must {MUST}: {'reached' if share <= MUST else 'MISSED'}"
        print(f"{manner:9} {whole:7.2f} ms a step, {outside:6.2f} ms outside kernels, share {share:.2f}{verdict}")
        figures[manner] = {"step_ms": round(whole, 2), "outside_ms": round(outside, 2), "share": round(share, 3)}
    print(json.dumps(run | figures))


def filled(folder: Path, arguments: argparse.Namespace, rows: Rows, cache: CacheFormat | None = None) -> LoadedModel:
    """The model with its context in the cache, and `WARM` steps behind it."""
    model = load(
        folder, dtype=arguments.dtype, pages=rows.pages, page_tokens=PAGE, threads=arguments.threads, cache=cache
    )
    ids = np.random.default_rng(0).integers(0, model.info.vocab_size, rows.context)
    for at in range(0, rows.context, CHUNK):
        model.forward(prompt(at, ids[at : at + CHUNK]))
    for at in range(WARM):
        model.forward(rows.step(rows.context + at))
    return model


def batches_of(model: LoadedModel, rows: Rows, position: int, arguments: argparse.Namespace) -> Batches:
    if arguments.chunk:
        ids = np.random.default_rng(1).integers(0, model.info.vocab_size, arguments.chunk)
        chunk = prompt(rows.context, ids)
        model.forward(chunk)
        for _ in range(arguments.rounds):
            yield (chunk,), (chunk,)
        return
    for _ in range(arguments.rounds):
        steps = [rows.step(position + at) for at in range(2 * arguments.tokens)]
        position += 2 * arguments.tokens
        yield steps[: arguments.tokens], steps[arguments.tokens :]


def compared(
    own: LoadedModel, coded: LoadedModel, rows: Rows, position: int, arguments: argparse.Namespace
) -> dict[str, float]:
    """Milliseconds of a step over each cache, and how much faster one over fp8 is."""
    pairs = []
    for _ in range(arguments.rounds):
        pairs.append(tuple(measured(model, rows, position, arguments.tokens)[0] for model in (own, coded)))
        position += arguments.tokens
    own_ms, coded_ms = (median(taken) for taken in zip(*pairs, strict=True))
    faster = median(one / other for one, other in pairs)
    print(f"cache in {arguments.dtype} {own_ms:.2f} ms a step, in fp8 {coded_ms:.2f} ms: {faster:.2f} times as fast")
    return {"own_ms": round(own_ms, 2), "fp8_ms": round(coded_ms, 2), "times": round(faster, 3)}


def prompt(position: int, ids: np.ndarray) -> FlatBatch:
    """`ids` of the first session, from `position` on."""
    at = np.arange(position, position + len(ids), dtype=np.int64)
    end = position + len(ids)
    queries = np.arange(len(ids), dtype=np.int32)
    tail = Run(pages=np.arange(-(-end // PAGE), dtype=np.int32), start=0, tokens=end, queries=queries, causal=True)
    return FlatBatch(ids=ids.astype(np.int64), positions=at, slots=at, runs=(tail,), select=np.array([len(ids) - 1]))


@dataclass(frozen=True, slots=True)
class Rows:
    """`count` rows at one position, below `shared` tokens (whole pages), with `own` pages each behind them."""

    count: int
    context: int
    shared: int
    own: int

    @property
    def pages(self) -> int:
        return self.shared // PAGE + self.count * self.own

    def step(self, position: int) -> FlatBatch:
        rows, trunk = np.arange(self.count, dtype=np.int32), self.shared // PAGE
        pages = [np.arange(self.own, dtype=np.int32) + trunk + row * self.own for row in range(self.count)]
        behind = position - self.shared
        runs = [
            Run(pages=pages[row][: behind // PAGE + 1], start=self.shared, tokens=behind + 1,
                queries=rows[row : row + 1], causal=True)
            for row in range(self.count)
        ]  # fmt: skip
        if trunk:
            path = np.arange(trunk, dtype=np.int32)
            runs.insert(0, Run(pages=path, start=0, tokens=self.shared, queries=rows, causal=False))
        slots = np.array([int(held[behind // PAGE]) * PAGE + behind % PAGE for held in pages])
        positions = np.full(self.count, position, dtype=np.int64)
        return FlatBatch(
            ids=positions % 97 + rows, positions=positions, slots=slots, runs=tuple(runs), select=rows.astype(np.int64)
        )


def measured(model: LoadedModel, rows: Rows, position: int, steps: int) -> tuple[float, float]:
    """(milliseconds a step, those outside kernels)"""
    batches = [rows.step(position + at) for at in range(steps)]
    with kernel_clock() as inside:
        started = time.thread_time_ns()
        for batch in batches:
            model.forward(batch)
        whole = time.thread_time_ns() - started
    return whole / steps / 1e6, (whole - inside()) / steps / 1e6


if __name__ == "__main__":
    main()

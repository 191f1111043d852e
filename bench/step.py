"""What a decoded token costs outside the kernels, on the 50 M model: the runner alone, without an engine around it.

    python bench/step.py
    python bench/step.py --dtype float32 --threads 2

One session at a context of 4096 tokens decodes with recorded steps and with its modules called in every step, in turns.
Times are processor time of the thread that drives the model, so other processes count little; with one thread nothing
waits for a team. Sampling, scheduler and transport are not in it. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "engine"), str(ROOT / "kernels")]

import numpy as np

from agentspeed_engine.models.catalog import load
from agentspeed_engine.models.inputs import FlatBatch, Run
from agentspeed_engine.models.loaded import LoadedModel
from agentspeed_kernels.cpu import native
from agentspeed_kernels.cpu.recording import kernel_clock
from tests.support.random_checkpoint import make_checkpoint

CONFIG = ROOT / "bench/models/v3-50m.json"
CONTEXT, PAGE, CHUNK = 4096, 64, 512
MUST = 0.2
"""Of a token, outside kernels, recorded."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=20)
    arguments = parser.parse_args()
    if isinstance(native.library(), native.Unavailable):
        raise SystemExit(f"there is nothing to measure without native kernels: {native.library()}")
    folder = ROOT / ".checkpoints" / f"v3-50m-{arguments.dtype}"
    if not (folder / "model.safetensors").exists():
        make_checkpoint(json.loads(CONFIG.read_text()), folder, dtype=arguments.dtype)
    pages = 2 * CONTEXT // PAGE
    model = load(folder, dtype=arguments.dtype, pages=pages, page_tokens=PAGE, threads=arguments.threads)
    ids = np.random.default_rng(0).integers(0, model.info.vocab_size, CONTEXT)
    for at in range(0, CONTEXT, CHUNK):
        model.forward(step(at, ids[at : at + CHUNK]))
    position = CONTEXT
    for _ in range(8):
        model.forward(step(position, ids[:1]))
        position += 1
    taken: dict[str, list[tuple[float, float]]] = {"recorded": [], "modules": []}
    for _ in range(arguments.rounds):
        for manner, into in taken.items():
            model.repeats = manner == "recorded"
            into.append(measured(model, position, arguments.tokens))
            position += arguments.tokens
    figures = {}
    for manner, pairs in taken.items():
        whole, outside = (median(values) for values in zip(*pairs, strict=True))
        share = median(outside / whole for whole, outside in pairs)
        verdict = "" if manner != "recorded" else f"  must {MUST}: {'reached' if share <= MUST else 'MISSED'}"
        print(f"{manner:9} {whole:7.2f} ms a token, {outside:6.2f} ms outside kernels, share {share:.2f}{verdict}")
        figures[manner] = {"token_ms": round(whole, 2), "outside_ms": round(outside, 2), "share": round(share, 3)}
    run = {"bench": "step", "dtype": arguments.dtype, "threads": arguments.threads, "load": os.getloadavg()[0]}
    print(json.dumps(run | figures))


def step(position: int, ids: np.ndarray) -> FlatBatch:
    """`ids` of the one session, from `position` on."""
    at = np.arange(position, position + len(ids), dtype=np.int64)
    end = position + len(ids)
    tail = Run(
        pages=np.arange(-(-end // PAGE), dtype=np.int32),
        start=0,
        tokens=end,
        queries=np.arange(len(ids), dtype=np.int32),
        causal=True,
    )
    return FlatBatch(ids=ids.astype(np.int64), positions=at, slots=at, runs=(tail,), select=np.array([len(ids) - 1]))


def measured(model: LoadedModel, position: int, tokens: int) -> tuple[float, float]:
    """(milliseconds a token, those outside kernels)"""
    with kernel_clock() as inside:
        started = time.thread_time_ns()
        for at in range(tokens):
            model.forward(step(position + at, np.array([at])))
        whole = time.thread_time_ns() - started
    return whole / tokens / 1e6, (whole - inside()) / tokens / 1e6


if __name__ == "__main__":
    main()

"""How near copies between a pool and its host slots come to one plain copy, and what a step beside them pays.

    python bench/host_copies.py

On a GPU: pages as a 61-layer model with a latent of 576 in bfloat16 has them (4.5 MB each), in any order. The limit is
one copy of as many bytes between contiguous device memory and pinned memory, measured in turns with ours. A step is
products over 4.3 GB of weights; it runs alone, beside copies in streams of their own (ours), and with 16 pages copied
in its own stream first. Without a GPU only the count of wrong pages means something. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "engine"), str(ROOT / "kernels")]

import torch

from agentspeed_engine.exec.arena import HostArena

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
LAYERS, WIDTH, DTYPE = (61, 576, torch.bfloat16) if ON_GPU else (8, 320, torch.float32)
PAGE_TOKENS, PAGES, BATCH = 64, 1024 if ON_GPU else 128, 256 if ON_GPU else 32
PAGE_BYTES = LAYERS * PAGE_TOKENS * WIDTH * DTYPE.itemsize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    torch.manual_seed(0)
    pool = torch.empty((LAYERS, PAGES, PAGE_TOKENS, WIDTH), dtype=DTYPE, device=DEVICE).normal_()
    started = time.perf_counter()
    arena = HostArena([pool], BATCH)
    made = time.perf_counter() - started
    figures: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if ON_GPU else "CPU",
        "page_bytes": PAGE_BYTES,
        "pages": BATCH,
        "arena_seconds": round(made, 2),
        "wrong_pages": wrong_pages(pool, arena, repeats),
        **throughput(arena, repeats),
    }
    if ON_GPU:
        figures |= {**milliseconds_beside_a_long_step(arena), **slowdown(pool, arena, repeats)}
    print(json.dumps({"bench": "host_copies", **figures}))


def some_pages(count: int, of: int) -> list[int]:
    return torch.randperm(of)[:count].tolist()


def wrong_pages(pool: torch.Tensor, arena: HostArena, repeats: int) -> int:
    """Pages that are not bit for bit what was saved, after a way through other slots into other pages."""
    wrong = 0
    for _ in range(repeats):
        order = some_pages(2 * BATCH, PAGES)
        source, target, slots = order[:BATCH], order[BATCH:], some_pages(BATCH, BATCH)
        pool[:, source] = torch.randn_like(pool[:, source])
        expected = pool[:, source].clone()
        arena.save(source, slots)
        pool[:, source] = 0
        arena.load(slots, target)
        wrong += int((pool[:, target] != expected).transpose(0, 1).flatten(1).any(1).sum())
    return wrong


def throughput(arena: HostArena, repeats: int) -> dict[str, Any]:
    """Ours and the limit in turns, both ways."""
    plain_device = torch.empty((BATCH, PAGE_BYTES), dtype=torch.uint8, device=DEVICE)
    plain_host = torch.zeros((BATCH, PAGE_BYTES), dtype=torch.uint8, pin_memory=ON_GPU)
    calls: dict[str, Callable[[list[int], list[int]], Any]] = {
        "save": lambda pages, slots: arena.save(pages, slots),
        "load": lambda pages, slots: arena.load(slots, pages),
        "plain_save": lambda pages, slots: plain_host.copy_(plain_device),
        "plain_load": lambda pages, slots: plain_device.copy_(plain_host),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 2):
        pages, slots = some_pages(BATCH, PAGES), some_pages(BATCH, BATCH)
        for name, call in calls.items():
            wait()
            started = time.perf_counter()
            call(pages, slots)
            wait()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - started)
    rates = {name: BATCH * PAGE_BYTES / median(taken) / 1e9 for name, taken in seconds.items()}
    spread = {name: (max(taken) - min(taken)) / median(taken) for name, taken in seconds.items()}
    return {
        "save_of_limit": round(rates["save"] / rates["plain_save"], 3),
        "load_of_limit": round(rates["load"] / rates["plain_load"], 3),
        **{f"{name}_gb_s": round(rate, 1) for name, rate in rates.items()},
        "spread": {name: round(share, 3) for name, share in spread.items()},
    }


def milliseconds_beside_a_long_step(arena: HostArena) -> dict[str, float]:
    """How long a save of eight pages takes that is ordered while a step runs, and how long that step still ran."""
    pages = list(range(8))
    arena.save(pages, pages)
    wait()
    started = time.perf_counter()
    torch.cuda._sleep(100_000_000)
    thread = threading.Thread(target=arena.save, args=(pages, pages))
    thread.start()
    thread.join()
    copied = time.perf_counter() - started
    wait()
    return {
        "copy_ms_in_a_long_step": round(copied * 1e3, 2),
        "long_step_ms": round((time.perf_counter() - started) * 1e3, 1),
    }


def slowdown(pool: torch.Tensor, arena: HostArena, repeats: int) -> dict[str, Any]:
    """Median time of a step beside copies by that of one alone, in blocks that take turns."""
    weights = [torch.randn((8192, 16384), device=DEVICE, dtype=DTYPE) for _ in range(16)]
    rows = torch.randn((64, 8192), device=DEVICE, dtype=DTYPE)
    kept = torch.empty((BATCH, *pool[:, 0].shape), dtype=DTYPE, pin_memory=True)

    def same_stream() -> None:
        for at in range(8):
            kept[at].copy_(pool[:, at], non_blocking=True)
            pool[:, 8 + at].copy_(kept[at], non_blocking=True)

    def steps(before: Callable[[], object] = lambda: None) -> list[float]:
        taken = []
        for _ in range(20):
            started = time.perf_counter()
            before()
            for weight in weights:
                rows @ weight
            wait_for_step()
            taken.append(time.perf_counter() - started)
        return taken

    def wait_for_step() -> None:
        torch.cuda.default_stream().synchronize()

    seconds: dict[str, list[float]] = {"alone": [], "own": [], "same": []}
    copied = 0
    copying = 0.0
    steps()
    for _ in range(repeats):
        seconds["alone"] += steps()
        with copies(arena) as counted:
            began = time.perf_counter()
            seconds["own"] += steps()
            copying += time.perf_counter() - began
        copied += counted[0]
        seconds["same"] += steps(same_stream)
        wait()
    alone = median(seconds["alone"])
    return {
        "step_ms": round(alone * 1e3, 3),
        "step_slowdown": round(median(seconds["own"]) / alone, 3),
        "beside_gb_s": round(copied * PAGE_BYTES / copying / 1e9, 1),
        "step_slowdown_same_stream": round(median(seconds["same"]) / alone, 3),
        "same_stream_pages_a_step": 16,
    }


@contextmanager
def copies(arena: HostArena) -> Iterator[list[int]]:
    """Saves and loads in a thread of their own, eight pages at a time as the scheduler orders them, until left."""
    counted, over = [0], threading.Event()

    def work() -> None:
        slots = list(range(8))
        while not over.is_set():
            arena.save(slots, slots)
            arena.load(slots, [page + 8 for page in slots])
            counted[0] += 16

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield counted
    finally:
        over.set()
        thread.join()


def wait() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()

"""Timing on a GPU: calls in one CUDA graph, each with other data than the caches hold; medians with their spread."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch

READ_BYTES, FLOPS = 4.63e12, 786e12
"""Ceilings of an H200 in short bursts, measured by the `ceilings` section; shares are against these two."""
DEVICE = torch.device("cuda")
Call = Callable[[int], Any]


@final
@dataclass(slots=True)
class Report:
    """Prints one line a figure, and the same as JSON lines to a file."""

    path: str | None
    started: float = field(default_factory=time.time)
    lines: list[dict[str, Any]] = field(default_factory=list)

    def add(self, section: str, case: str, **figures: Any) -> None:
        self.lines.append({"section": section, "case": case, **figures})
        shown = "  ".join(f"{name} {_short(value)}" for name, value in figures.items())
        print(f"{section:9} {case:42} {shown}", flush=True)
        if self.path is not None:
            with open(self.path, "a") as file:
                file.write(json.dumps(self.lines[-1]) + "\n")

    def missed(self) -> list[str]:
        return [f"{line['section']} {line['case']}" for line in self.lines if line.get("met") is False]


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def graph_time(calls: Sequence[Callable[[], Any]], repeats: int = 9) -> float:
    """Microseconds a call takes in a graph of all calls: the median over replays, the better of two rounds."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    best = min(_replays(graph, len(calls), repeats) for _ in range(2))
    del graph
    return best


def _replays(graph: torch.cuda.CUDAGraph, count: int, repeats: int) -> float:
    graph.replay()
    torch.cuda.synchronize()
    taken = []
    for _ in range(repeats):
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        graph.replay()
        after.record()
        after.synchronize()
        taken.append(before.elapsed_time(after) * 1e3 / count)
    return statistics.median(taken)


def rotated(call: Call, rotations: int, expected_us: float, budget_us: float = 2500) -> float:
    """`call(r)` uses data set r of `rotations`; enough calls for about `budget_us` in one graph."""
    count = max(rotations, min(40, max(3, int(budget_us / max(expected_us, 1)))))

    def bound(rotation: int) -> Callable[[], Any]:
        return lambda: call(rotation)

    return graph_time([bound(i % rotations) for i in range(count)])


def limit_us(bytes_moved: float, flops: float) -> float:
    return max(bytes_moved / READ_BYTES, flops / FLOPS) * 1e6


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """|d| / |wanted| in the Frobenius norm; infinite for anything not finite."""
    if not bool(torch.isfinite(got).all()):
        return float("inf")
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def fail(message: str) -> None:
    print(f"FAILED: {message}", file=sys.stderr, flush=True)

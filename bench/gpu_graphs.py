"""What CUDA graphs save: decode steps of branches with and without a shared trunk, and steps that extend some branches
while others decode, captured and kernel by kernel."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final

import numpy as np
import torch
from gpu_timing import READ_BYTES, Report, relative

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from agentspeed_engine.models.catalog import load
from agentspeed_engine.models.inputs import FlatBatch, Run
from agentspeed_engine.models.loaded import LoadedModel

PAGE, OWN_PAGES = 64, 4
DEVICE: Literal["cpu", "cuda"] = "cuda"
SETTLE, STEPS = 4, 24
"""Steps before the clock runs (a shape is captured the third time that it is met), and while it does."""


@final
@dataclass(frozen=True, slots=True)
class Branches:
    """`count` branches below `shared` tokens that all of them read, or that each has for itself."""

    count: int
    shared: int
    forked: bool = True

    @property
    def pages(self) -> int:
        own = OWN_PAGES + (0 if self.forked else self.shared // PAGE)
        return self.count * own + (self.shared // PAGE if self.forked else 0)

    def step(self, at: int) -> FlatBatch:
        """Each branch's token `at` after the shared ones."""
        rows = np.arange(self.count, dtype=np.int32)
        trunk = np.arange(self.shared // PAGE, dtype=np.int32)
        first = trunk.size if self.forked else 0
        runs: list[Run] = []
        if self.forked and trunk.size:
            runs.append(Run(pages=trunk, start=0, tokens=self.shared, queries=rows, causal=False))
        slots = []
        for row in range(self.count):
            before = 0 if self.forked else self.shared
            count = OWN_PAGES + before // PAGE
            pages = (first + row * count + np.arange(count)).astype(np.int32)
            tokens = before + at + 1
            slots.append(int(pages[(tokens - 1) // PAGE]) * PAGE + (tokens - 1) % PAGE)
            held = pages[: -(-tokens // PAGE)]
            start = self.shared - before
            runs.append(Run(pages=held, start=start, tokens=tokens, queries=rows[row : row + 1], causal=True))
        ids = (np.arange(self.count, dtype=np.int64) * 31 + 7 * at) % 99_000 + 3
        positions = np.full(self.count, self.shared + at, np.int64)
        select = np.arange(self.count)
        return FlatBatch(ids=ids, positions=positions, slots=np.array(slots), runs=tuple(runs), select=select)


LATENT: dict[str, Branches] = {
    "1 branch at 4 k": Branches(1, 4096, forked=False),
    "8 branches at 4 k": Branches(8, 4096, forked=False),
    "8 forks at 4 k": Branches(8, 4096),
    "8 forks at 32 k": Branches(8, 32_768),
    "32 forks at 8 k": Branches(32, 8192),
}
GROUPED: dict[str, Branches] = {
    "1 branch at 4 k": Branches(1, 4096, forked=False),
    "8 branches at 4 k": Branches(8, 4096, forked=False),
    "8 forks at 4 k": Branches(8, 4096),
    "8 forks at 32 k": Branches(8, 32_768),
    "32 branches at 4 k": Branches(32, 4096, forked=False),
}


@final
@dataclass(frozen=True, slots=True)
class Mixed:
    """`decoding` branches of `context` tokens that are fed one more, and one of `context` for each number of
    `extends`, which is fed so many."""

    decoding: int
    context: int
    extends: tuple[int, ...]

    @property
    def pages(self) -> int:
        return sum(self._pages(new) for new in self._new)

    @property
    def _new(self) -> tuple[int, ...]:
        return (*[1] * self.decoding, *self.extends)

    def _pages(self, new: int) -> int:
        return -(-(self.context + new) // PAGE)

    def step(self, at: int) -> FlatBatch:
        """The same rows each time, with other ids."""
        runs, slots, positions, page, rows = [], [], [], 0, 0
        for new in self._new:
            held = np.arange(page, page + self._pages(new), dtype=np.int32)
            mine = self.context + np.arange(new)
            queries = np.arange(rows, rows + new, dtype=np.int32)
            runs.append(Run(pages=held, start=0, tokens=self.context + new, queries=queries, causal=True))
            slots.append(held[mine // PAGE].astype(np.int64) * PAGE + mine % PAGE)
            positions.append(mine)
            page, rows = page + held.size, rows + new
        ids = (np.arange(rows, dtype=np.int64) * 31 + 7 * at) % 99_000 + 3
        select = np.cumsum(self._new) - 1
        return FlatBatch(ids=ids, positions=np.concatenate(positions), slots=np.concatenate(slots), runs=tuple(runs),
                         select=select)  # fmt: skip


MIXED: dict[str, Mixed] = {
    "32 decode, 40 more at 3 k": Mixed(32, 3072, (40,)),
    "32 decode, 4 extends of 27 at 3 k": Mixed(32, 3072, (27,) * 4),
    "40 decode, 27 and 180 more at 3 k": Mixed(40, 3072, (27, 180)),
    "40 decode, 80 and 390 more at 3 k": Mixed(40, 3072, (80, 390)),
    "40 decode, 1000 more at 3 k": Mixed(40, 3072, (1000,)),
    "2048 of a prompt": Mixed(0, 0, (2048,)),
}
"""As agents with tools have them (`bench/gpu_agents.py`); the last two have no graph."""
MOST_HOST_MS = 8.0


def section_graphs(report: Report, config: str = "v2-lite", cases: dict[str, Branches] = LATENT) -> None:
    """Of a model with weights by chance: milliseconds of a step, launches by the host included, and how far logits of a
    captured step lie from those of the same step kernel by kernel: joined kernels round elsewhere, and a near tie of
    the router may fall otherwise."""
    compare(report, ROOT / f"bench/models/{config}.json", cases)
    torch.cuda.empty_cache()


def compare(report: Report, config: Path, cases: dict[str, Branches]) -> None:
    pages = max(case.pages for case in cases.values())
    model = load(f"random:{config}", dtype="bfloat16", pages=pages, page_tokens=PAGE, device=DEVICE)
    _fill(model)
    for label, case in cases.items():
        before = model.graphs
        apart = _paired(model, case)
        captured = model.graphs - before
        graph = _step_ms(model, case)
        model.repeats = False
        eager = _step_ms(model, case)
        model.repeats = True
        tokens = case.count * OWN_PAGES * PAGE / 2 + case.shared * (1 if case.forked else case.count)
        cache = tokens * model.info.kv.bytes_per_token / READ_BYTES * 1e3
        weights = _read_ms(model)
        share = {} if weights is None else {"weights_ms": weights, "share": (weights + cache) / graph}
        report.add("graphs", f"{config.stem}, {label}", ms=graph, kernel_by_kernel_ms=eager, times=eager / graph,
                   cache_ms=cache, **share, apart=apart, captured=captured, met=apart < 0.1)  # fmt: skip


def _read_ms(model: LoadedModel) -> float | None:
    """Of all weights but the embedding; None where a step reads some experts of many."""
    info = model.info
    if {"num_experts", "n_routed_experts"} & set(info.config):
        return None
    return 2e3 * (info.parameters - info.vocab_size * int(info.config["hidden_size"])) / READ_BYTES


def _fill(model: LoadedModel) -> None:
    """Finite numbers of about the size of latents in every page: what attention reads of it costs as much."""
    noise = torch.Generator(model.device).manual_seed(1)
    for pool in model.pools.tensors:
        pool.normal_(generator=noise)


def _paired(model: LoadedModel, case: Branches | Mixed) -> float:
    """How far the logits of a step that is repeated lie from those of the same step kernel by kernel."""
    for at in range(SETTLE):
        _ = model.forward(case.step(at))
    graph = model.forward(case.step(SETTLE)).clone()
    model.repeats = False
    eager = model.forward(case.step(SETTLE)).clone()
    model.repeats = True
    return relative(graph, eager)


def _step_ms(model: LoadedModel, case: Branches | Mixed) -> float:
    for at in range(SETTLE):
        _ = model.forward(case.step(at))
    torch.cuda.synchronize()
    started = time.perf_counter()
    for at in range(SETTLE, SETTLE + STEPS):
        _ = model.forward(case.step(at))
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started) / STEPS


def section_mixed(report: Report) -> None:
    """Steps of V2-Lite's shapes that extend branches beside others that decode: milliseconds of a step as it runs and
    kernel by kernel, what the host takes to launch it kernel by kernel, and how far the logits of both lie apart."""
    config = ROOT / "bench/models/v2-lite.json"
    pages = max(case.pages for case in MIXED.values())
    model = load(f"random:{config}", dtype="bfloat16", pages=pages, page_tokens=PAGE, device=DEVICE)
    _fill(model)
    for label, case in MIXED.items():
        before = model.graphs
        apart = _paired(model, case)
        captured = model.graphs - before
        ms = _step_ms(model, case)
        model.repeats = False
        eager, host = _step_ms(model, case), _host_ms(model, case)
        model.repeats = True
        report.add("mixed", label, rows=len(case.step(0).ids), ms=ms, kernel_by_kernel_ms=eager, host_ms=host,
                   apart=apart, captured=captured, must=MOST_HOST_MS,
                   met=host <= MOST_HOST_MS and apart < 0.1)  # fmt: skip


def _host_ms(model: LoadedModel, case: Mixed) -> float:
    """Of one step, nothing before which the device still has to do."""
    taken = []
    for at in range(SETTLE):
        torch.cuda.synchronize()
        started = time.perf_counter()
        _ = model.forward(case.step(at))
        taken.append(time.perf_counter() - started)
    torch.cuda.synchronize()
    return 1e3 * min(taken)

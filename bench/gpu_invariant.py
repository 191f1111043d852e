"""What batch invariance costs on a GPU, and that it is kept: decode and prefill with and without, and bits of rows."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from gpu_graphs import DEVICE, OWN_PAGES, PAGE, SETTLE, STEPS, Branches
from gpu_timing import Report

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from agentspeed_engine.models.catalog import load
from agentspeed_engine.models.inputs import FlatBatch, Run
from agentspeed_engine.models.loaded import LoadedModel

CONTEXT, CHUNK = 4096, 2048
DECODES = {"decode, batch 1 at 4 k": Branches(1, CONTEXT, forked=False),
           "decode, batch 32 at 4 k": Branches(32, CONTEXT, forked=False)}  # fmt: skip
PREFILL = "prefill of 4 k in chunks of 2048"
FORKS = Branches(8, CONTEXT)
PAGES = max(case.pages for case in DECODES.values()) + 2 * CONTEXT // PAGE
MODEL = f"random:{ROOT / 'bench/models/v2-lite.json'}"


def section_invariant(report: Report) -> None:
    """Milliseconds of the host's clock, launches included, for a model of V2-Lite's shapes with weights by chance."""
    taken: list[dict[str, float]] = []
    for invariant in (False, True):
        model = load(MODEL, dtype="bfloat16", pages=PAGES, page_tokens=PAGE, device=DEVICE, batch_invariant=invariant)
        noise = torch.Generator(model.device).manual_seed(1)
        for pool in model.pools.tensors:
            pool.normal_(generator=noise)
        taken.append({label: _decode_ms(model, case) for label, case in DECODES.items()})
        taken[-1][PREFILL] = _prefill_ms(model)
        if invariant:
            check_bits(report, model)
        del model
        torch.cuda.empty_cache()
    for label, with_it in taken[1].items():
        report.add("invariant", label, ms=with_it, without_ms=taken[0][label], times=with_it / taken[0][label])


def check_bits(report: Report, model: LoadedModel) -> None:
    """Of steps as they come against rows alone, kernel by kernel."""
    together = DECODES["decode, batch 32 at 4 k"].step(SETTLE)
    checks: dict[str, Callable[[], bool]] = {
        "32 together, as a graph": lambda: _alone_alike(model, together, [0, 7, 31]),
        "8 forks of a trunk, as a graph": lambda: _alone_alike(model, FORKS.step(SETTLE), [0, 3, 7]),
        f"a prompt of {CHUNK} in chunks of 64 and 700": lambda: _chunks_alike(model, [CHUNK, 64, 700]),
    }
    for label, check in checks.items():
        alike = check()
        report.add("invariant", f"bits of {label}", alike=alike, met=alike)


def _alone_alike(model: LoadedModel, step: FlatBatch, rows: Sequence[int]) -> bool:
    whole = [model.forward(step).clone() for _ in range(SETTLE)]
    model.repeats = False
    alone = [model.forward(alone_of(step, row)).clone() for row in rows]
    model.repeats = True
    return all(torch.equal(logits[row], one[0]) for logits in whole for row, one in zip(rows, alone, strict=True))


def alone_of(step: FlatBatch, row: int) -> FlatBatch:
    """One row of a step of decode rows by itself, its context as one piece."""
    mine = sorted((run for run in step.runs if row in run.queries), key=lambda run: run.start)
    pages, tokens = np.concatenate([run.pages for run in mine]), sum(run.tokens for run in mine)
    only = np.zeros(1, np.int32)
    at = slice(row, row + 1)
    return FlatBatch(ids=step.ids[at], positions=step.positions[at], slots=step.slots[at], select=only.astype(np.int64),
                     runs=(Run(pages=pages, start=0, tokens=tokens, queries=only, causal=True),))  # fmt: skip


def _chunks_alike(model: LoadedModel, chunks: Sequence[int]) -> bool:
    """The last row's logits, and what is cached of the prompt."""
    logits, rows = [], []
    for chunk in chunks:
        logits.append(prefill(model, CHUNK, chunk).clone())
        rows.append([pool[:, : CHUNK // PAGE].clone() for pool in model.pools.tensors])
    same_rows = all(torch.equal(a, b) for other in rows[1:] for a, b in zip(rows[0], other, strict=True))
    return same_rows and all(torch.equal(logits[0], other) for other in logits[1:])


def prefill(model: LoadedModel, tokens: int, chunk: int) -> torch.Tensor:
    """Logits [1, ids] of the last token of a prompt in the first pages of the pool."""
    found: torch.Tensor | None = None
    pages = np.arange(tokens // PAGE, dtype=np.int32)
    for at in range(0, tokens, chunk):
        end = min(at + chunk, tokens)
        positions = np.arange(at, end, dtype=np.int64)
        count = end - at
        run = Run(pages=pages[: -(-end // PAGE)], start=0, tokens=end, queries=np.arange(count, dtype=np.int32),
                  causal=True)  # fmt: skip
        found = model.forward(FlatBatch(ids=positions * 31 % 99_000 + 3, positions=positions, slots=positions,
                                        runs=(run,), select=np.array([count - 1])))  # fmt: skip
    assert found is not None
    return found


def _decode_ms(model: LoadedModel, case: Branches) -> float:
    for at in range(SETTLE):
        _ = model.forward(case.step(at))
    return _ms(lambda: [model.forward(case.step(at)) for at in range(SETTLE, SETTLE + STEPS)]) / STEPS


def _prefill_ms(model: LoadedModel) -> float:
    _ = prefill(model, CONTEXT, CHUNK)
    return min(_ms(lambda: prefill(model, CONTEXT, CHUNK)) for _ in range(3))


def _ms(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    _ = call()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started)


assert SETTLE + STEPS < OWN_PAGES * PAGE

"""Turns a step plan into the arrays a forward pass takes: shared nodes become one run with many queries."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from agentspeed_engine.kv.runs import NodeRun
from agentspeed_engine.models.inputs import FlatBatch, Run
from agentspeed_engine.sched.plan import StepPlan

_PAGES: WeakKeyDictionary[NodeRun, NDArray[np.int32]] = WeakKeyDictionary()
"""Page arrays by node and residence: a run object never changes, so neither does what is derived from it."""


def flatten(plan: StepPlan, page_tokens: int) -> FlatBatch:
    """One token axis over all rows of the plan, in the plan's order."""
    ids: list[NDArray[np.int64]] = []
    positions: list[NDArray[np.int64]] = []
    slots: list[NDArray[np.int64]] = []
    shared: dict[NodeRun, list[NDArray[np.int32]]] = {}
    tails: list[Run] = []
    select: list[int] = []
    start = 0
    for row in plan.rows:
        count = len(row.ids)
        at = np.arange(row.position, row.position + count, dtype=np.int64)
        queries = np.arange(start, start + count, dtype=np.int32)
        tail = np.asarray(row.tail_pages, dtype=np.int32)
        offset = at - row.tail_start
        ids.append(np.asarray(row.ids, dtype=np.int64))
        positions.append(at)
        slots.append(tail[offset // page_tokens].astype(np.int64) * page_tokens + offset % page_tokens)
        for run in row.path:
            shared.setdefault(run, []).append(queries)
        tokens = row.position + count - row.tail_start
        used = -(-tokens // page_tokens)
        tails.append(Run(pages=tail[:used], start=row.tail_start, tokens=tokens, queries=queries, causal=True))
        start += count
        if row.sample is not None:
            select.append(start - 1)
    nodes = [
        Run(pages=_pages(run), start=run.start, tokens=run.tokens,
            queries=queries[0] if len(queries) == 1 else np.concatenate(queries), causal=False)
        for run, queries in shared.items()
    ]
    return FlatBatch(
        ids=np.concatenate(ids), positions=np.concatenate(positions), slots=np.concatenate(slots),
        runs=(*nodes, *tails), select=np.asarray(select, dtype=np.int64),
    )


def _pages(run: NodeRun) -> NDArray[np.int32]:
    pages = _PAGES.get(run)
    if pages is None:
        pages = _PAGES[run] = np.asarray(run.pages, dtype=np.int32)
    return pages

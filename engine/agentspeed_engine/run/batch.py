"""Turns a step plan into the arrays a forward pass takes: shared nodes become one run with many queries."""

from __future__ import annotations

from typing import final
from weakref import WeakKeyDictionary

import numpy as np

from agentspeed_engine.ids import pages_for
from agentspeed_engine.kv.runs import NodeRun
from agentspeed_engine.models.inputs import FlatBatch, Int32s, Int64s, Run
from agentspeed_engine.sched.plan import Row, StepPlan


@final
class Batcher:
    """Keeps the page array of each node run as long as the run lives: a run never changes, a decode step repeats it."""

    def __init__(self, page_tokens: int) -> None:
        self._page_tokens = page_tokens
        self._pages: WeakKeyDictionary[NodeRun, Int32s] = WeakKeyDictionary()

    def flatten(self, plan: StepPlan) -> FlatBatch:
        """One token axis over all rows of the plan, in the plan's order."""
        ids: list[Int64s] = []
        positions: list[Int64s] = []
        slots: list[Int64s] = []
        readers: dict[NodeRun, list[Int32s]] = {}
        tails: list[Run] = []
        select: list[int] = []
        start = 0
        for row in plan.rows:
            count = len(row.ids)
            at = np.arange(row.position, row.position + count, dtype=np.int64)
            queries = np.arange(start, start + count, dtype=np.int32)
            ids.append(np.asarray(row.ids, dtype=np.int64))
            positions.append(at)
            tail, rows_at = self._tail(row, at, queries)
            tails.append(tail)
            slots.append(rows_at)
            for run in row.path:
                readers.setdefault(run, []).append(queries)
            start += count
            if row.sample is not None:
                select.append(start - 1)
        nodes = (
            Run(pages=self._pages_of(run), start=run.start, tokens=run.tokens, queries=_joined(queries), causal=False)
            for run, queries in readers.items()
        )
        return FlatBatch(
            ids=np.concatenate(ids), positions=np.concatenate(positions), slots=np.concatenate(slots),
            runs=(*nodes, *tails), select=np.asarray(select, dtype=np.int64),
        )

    def _tail(self, row: Row, at: Int64s, queries: Int32s) -> tuple[Run, Int64s]:
        """The branch's own rows, the new ones among them, and where the new ones are written."""
        size = self._page_tokens
        pages = np.asarray(row.tail_pages, dtype=np.int32)
        offset = at - row.tail_start
        slots = pages[offset // size].astype(np.int64) * size + offset % size
        tokens = row.position + len(at) - row.tail_start
        run = Run(pages=pages[: pages_for(tokens, size)], start=row.tail_start, tokens=tokens, queries=queries,
                  causal=True)
        return run, slots

    def _pages_of(self, run: NodeRun) -> Int32s:
        pages = self._pages.get(run)
        if pages is None:
            pages = self._pages[run] = np.asarray(run.pages, dtype=np.int32)
        return pages


def _joined(parts: list[Int32s]) -> Int32s:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)

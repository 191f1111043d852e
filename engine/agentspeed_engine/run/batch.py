"""Turns a step plan into the arrays a forward pass takes: shared nodes become one run with many queries."""

from __future__ import annotations

from typing import final
from weakref import WeakKeyDictionary

import numpy as np

from agentspeed_engine.ids import pages_for
from agentspeed_engine.kv.runs import NodeRun
from agentspeed_engine.models.inputs import FlatBatch, Int32s, Run
from agentspeed_engine.sched.plan import Row, StepPlan


@final
class Batcher:
    """Keeps the page array of each node run as long as the run lives: a run never changes, a decode step repeats it."""

    def __init__(self, page_tokens: int) -> None:
        self._page_tokens = page_tokens
        self._pages: WeakKeyDictionary[NodeRun, Int32s] = WeakKeyDictionary()

    def flatten(self, plan: StepPlan) -> FlatBatch:
        """One token axis over all rows of the plan, in the plan's order."""
        axis = np.arange(sum(len(row.ids) for row in plan.rows), dtype=np.int32)
        # Plain lists until the end: most rows of a step are one token, and an array costs more than it holds.
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        select: list[int] = []
        readers: dict[NodeRun, list[Int32s]] = {}
        tails: list[Run] = []
        for row in plan.rows:
            start = len(ids)
            ids.extend(row.ids)
            positions.extend(range(row.position, row.position + len(row.ids)))
            self._write(slots, row)
            queries = axis[start : len(ids)]
            tails.append(self._tail(row, queries))
            for run in row.path:
                readers.setdefault(run, []).append(queries)
            if row.sample is not None:
                select.append(len(ids) - 1)
        nodes = (
            Run(pages=self._pages_of(run), start=run.start, tokens=run.tokens, queries=_joined(queries), causal=False)
            for run, queries in readers.items()
        )
        return FlatBatch(
            ids=np.array(ids, dtype=np.int64), positions=np.array(positions, dtype=np.int64),
            slots=np.array(slots, dtype=np.int64), runs=(*nodes, *tails), select=np.array(select, dtype=np.int64),
        )

    def _write(self, slots: list[int], row: Row) -> None:
        """Adds the pool rows the new tokens are written to."""
        size, pages = self._page_tokens, row.tail_pages
        first = row.position - row.tail_start
        for offset in range(first, first + len(row.ids)):
            slots.append(pages[offset // size] * size + offset % size)

    def _tail(self, row: Row, queries: Int32s) -> Run:
        """The branch's own rows, the new ones among them."""
        tokens = row.position + len(row.ids) - row.tail_start
        pages = np.array(row.tail_pages[: pages_for(tokens, self._page_tokens)], dtype=np.int32)
        return Run(pages=pages, start=row.tail_start, tokens=tokens, queries=queries, causal=True)

    def _pages_of(self, run: NodeRun) -> Int32s:
        pages = self._pages.get(run)
        if pages is None:
            pages = self._pages[run] = np.asarray(run.pages, dtype=np.int32)
        return pages


def _joined(parts: list[Int32s]) -> Int32s:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)

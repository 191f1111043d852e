"""Turns a step plan into a step input: the rows of all branches on one token axis, shared nodes as one run each."""

from __future__ import annotations

from array import array
from itertools import accumulate, chain
from typing import final
from weakref import WeakKeyDictionary

import numpy as np

from agentspeed_engine.exec.hidden_rows import HiddenRows
from agentspeed_engine.exec.step_input import Sample, StepInput, Unknown
from agentspeed_engine.ids import pages_for
from agentspeed_engine.kv.views import NodeRun
from agentspeed_engine.models.inputs import FlatBatch, Int32s, Int64s, Run
from agentspeed_engine.sched.plan import Row, StepPlan


@final
class Batcher:
    """Keeps the page array of each node run as long as the run lives: a run never changes, a decode step repeats it."""

    def __init__(self, page_tokens: int) -> None:
        self._page_tokens = page_tokens
        self._pages: WeakKeyDictionary[NodeRun, Int32s] = WeakKeyDictionary()
        self._hidden = HiddenRows(page_tokens)

    def step_input(self, plan: StepPlan) -> StepInput:
        """What an executor needs of the plan. Work per row is done in Python, work per token in NumPy."""
        rows = plan.rows
        samples = tuple(Sample(row.sample, row.end) for row in rows if row.sample is not None)
        ends = list(accumulate(row.tokens for row in rows))
        return StepInput(step=plan.seq, batch=self._flat(rows, ends), unknown=_unknown(rows, ends),
                         copies=plan.copies, samples=samples, ended=plan.ended)  # fmt: skip

    def _flat(self, rows: tuple[Row, ...], ends: list[int]) -> FlatBatch:
        """`ends`: of each row on the token axis."""
        size = self._page_tokens
        at = np.arange(ends[-1] if ends else 0, dtype=np.int64)
        axis = at.astype(np.int32)
        counts = np.fromiter((row.tokens for row in rows), np.int64, len(rows))
        first = np.asarray([0, *ends[:-1]] if ends else [], dtype=np.int64)
        start = np.fromiter((row.position for row in rows), np.int64, len(rows))
        tail_start = np.fromiter((row.tail_start for row in rows), np.int64, len(rows))
        pages = np.fromiter(chain.from_iterable(row.tail_pages for row in rows), np.int32)
        page_ends = list(accumulate(len(row.tail_pages) for row in rows))
        first_page = np.asarray([0, *page_ends[:-1]] if rows else [], dtype=np.int64)
        # A token is row `position` of its branch, and row `offset` of the branch's tail.
        positions = at + np.repeat(start - first, counts)
        offsets = positions - np.repeat(tail_start, counts)
        slots = pages[np.repeat(first_page, counts) + offsets // size].astype(np.int64) * size + offsets % size
        readers: dict[NodeRun, list[Int32s]] = {}
        tails: list[Run] = []
        for row, begin, end, page in zip(rows, [0, *ends], ends, [0, *page_ends], strict=False):
            queries = axis[begin:end]
            for run in row.path:
                readers.setdefault(run, []).append(queries)
            held = row.end - row.tail_start
            tails.append(Run(pages=pages[page : page + pages_for(held, size)], start=row.tail_start, tokens=held,
                             queries=queries, causal=True))  # fmt: skip
        nodes = (
            Run(pages=self._pages_of(run), start=run.start, tokens=run.tokens, queries=_joined(queries), causal=False)
            for run, queries in readers.items()
        )
        select = [end - 1 for row, end in zip(rows, ends, strict=True) if row.sample is not None]
        return FlatBatch(ids=_ids(rows), positions=positions, slots=slots, runs=(*nodes, *tails),
                         select=np.asarray(select, dtype=np.int64), hidden=self._hidden.of(rows))  # fmt: skip

    def _pages_of(self, run: NodeRun) -> Int32s:
        pages = self._pages.get(run)
        if pages is None:
            pages = self._pages[run] = np.asarray(run.pages, dtype=np.int32)
        return pages


_NOT_KNOWN = array("I", [0])


def _ids(rows: tuple[Row, ...]) -> Int64s:
    ids = array("I")
    for row in rows:  # of an array the buffer is copied, without an object for each id
        ids.extend(row.ids if row.token_of is None else _NOT_KNOWN)
    return np.asarray(ids, dtype=np.int64)


def _unknown(rows: tuple[Row, ...], ends: list[int]) -> Unknown:
    found = [(end - 1, row.token_of) for row, end in zip(rows, ends, strict=True) if row.token_of is not None]
    if not found:
        return Unknown()
    return Unknown(
        at=np.asarray([at for at, _ in found], dtype=np.int64),
        step=np.asarray([token.step for _, token in found], dtype=np.int64),
        place=np.asarray([token.place for _, token in found], dtype=np.int64),
    )


def _joined(parts: list[Int32s]) -> Int32s:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)

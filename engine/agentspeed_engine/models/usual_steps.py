"""Steps as most of an engine's will be, without any branch: graphs are captured of them before the first turn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from agentspeed_engine.ids import pages_for
from agentspeed_engine.models.inputs import FlatBatch, Int64s, Run

SHORT = 64
"""Tokens of a branch beside a long one, and of a fork below its trunk."""
LONG = (256, 512, 1024, 2048)
"""Tokens of extends that take all the forms there are of kernels for long ones."""


def usual_steps(rows: Sequence[int], most_context: int, most_tokens: int, page_tokens: int) -> Iterator[FlatBatch]:
    """For each count of rows, at contexts that double up to `most_context`: branches of one length and an extend, and
    for up to `SHORT` rows one long branch among short ones and forks of one trunk; none reads more than `most_tokens`
    of cache in all. Every page they name is page 0, and their rows are written nowhere."""
    for count in rows:
        context = SHORT
        while context + max(count, SHORT) <= min(most_context, most_tokens):
            if count * context <= most_tokens:
                yield _step([_own(row, 0, context, page_tokens) for row in range(count)], np.full(count, context - 1))
            if 1 < count <= SHORT:
                lengths = [context, *[SHORT] * (count - 1)]
                yield _step(
                    [_own(row, 0, tokens, page_tokens) for row, tokens in enumerate(lengths)], np.array(lengths) - 1
                )
                yield _forks(count, context, page_tokens)
            if count > 1:
                yield _extend(count, context, page_tokens)
            context *= 2


def long_steps(most_context: int, most_tokens: int, page_tokens: int, most_new: int) -> Iterator[FlatBatch]:
    """Extends that have kernels of their own, beside a branch that decodes, as deep in a context as they may lie: in
    the forms that extends of up to `most_new` tokens take."""
    for shorter, count in pairwise((0, *LONG)):
        context = min(most_context, most_tokens) - count - SHORT
        if context >= 0 and shorter < most_new:
            extend = _run(np.arange(count), 0, context + count, page_tokens, causal=True)
            positions = np.append(context + np.arange(count), SHORT - 1)
            yield replace(_step([extend, _own(count, 0, SHORT, page_tokens)], positions), select=np.array([count]))


def first_page(page_tokens: int, vocabulary: int) -> FlatBatch:
    """A step that fills page 0 with rows of tokens by chance: what usual steps read once they are checked."""
    positions = np.arange(page_tokens)
    run = _run(positions, 0, page_tokens, page_tokens, causal=True)
    step = _step([run], positions)
    return replace(step, ids=_ids(page_tokens, 0, vocabulary), slots=positions.astype(np.int64))


def written(step: FlatBatch, vocabulary: int, turn: int) -> FlatBatch:
    """`step` with other tokens each `turn` (from 1 on), whose rows go to the first ones of the pool; each third, as one
    that pads a step, to none."""
    slots = np.arange(len(step.ids), dtype=np.int64)
    slots[1::3] = -1
    return replace(step, ids=_ids(slots.size, turn, vocabulary), slots=slots)


def _ids(count: int, turn: int, vocabulary: int) -> Int64s:
    return (np.arange(count, dtype=np.int64) * 31 + 7919 * turn + 11) % vocabulary


def _forks(count: int, context: int, page_tokens: int) -> FlatBatch:
    trunk = _run(np.arange(count), 0, context, page_tokens, causal=False)
    tails = [_own(row, context, SHORT, page_tokens) for row in range(count)]
    return _step([trunk, *tails], np.full(count, context + SHORT - 1))


def _extend(count: int, context: int, page_tokens: int) -> FlatBatch:
    """Few of many rows draw."""
    rows = np.arange(count)
    step = _step([_run(rows, 0, context + count, page_tokens, causal=True)], context + rows)
    return replace(step, select=rows[-SHORT:])


def _own(row: int, start: int, tokens: int, page_tokens: int) -> Run:
    return _run(np.array([row]), start, tokens, page_tokens, causal=True)


def _run(queries: Int64s, start: int, tokens: int, page_tokens: int, *, causal: bool) -> Run:
    pages = np.zeros(pages_for(tokens, page_tokens), np.int32)
    return Run(pages=pages, start=start, tokens=tokens, queries=queries.astype(np.int32), causal=causal)


def _step(runs: list[Run], positions: Int64s) -> FlatBatch:
    count = positions.size
    return FlatBatch(
        ids=np.zeros(count, np.int64),
        positions=positions.astype(np.int64),
        slots=np.full(count, -1, np.int64),
        runs=tuple(runs),
        select=np.arange(count),
    )

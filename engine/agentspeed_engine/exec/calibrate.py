"""What a token costs on this machine, measured once at start: computed anew, and moved to the host or back."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from agentspeed_engine.ids import pages_for
from agentspeed_engine.models.inputs import FlatBatch, Run
from agentspeed_engine.sched.config import CoreConfig

_TOKENS = 128
"""Of the measured prefill: enough to fill the kernels, little enough that the start does not take long."""
_REPEATS = 3


class Measured(Protocol):
    """What is timed: one pass, which returns when it is through, and the copies of an executor."""

    def run(self, batch: FlatBatch) -> None: ...

    def save(self, pages: Sequence[int], slots: Sequence[int]) -> None: ...

    def load(self, slots: Sequence[int], pages: Sequence[int]) -> None: ...


def calibrated(core: CoreConfig, model: Measured) -> CoreConfig:
    """The configuration with its costs filled in. It writes to pages and slots that have no owner yet."""
    tokens = min(_TOKENS, core.context_limit)
    pages = list(range(min(pages_for(tokens, core.page_tokens), core.host_slots)))
    batch = _cold_prompt(tokens, core.page_tokens)
    recompute = _fastest(lambda: model.run(batch)) / tokens

    def there_and_back() -> None:
        model.save(pages, pages)
        model.load(pages, pages)

    copy = _fastest(there_and_back) / (2 * len(pages) * core.page_tokens)
    return replace(core, copy_seconds_per_token=copy, recompute_seconds_per_token=recompute)


def _cold_prompt(tokens: int, page_tokens: int) -> FlatBatch:
    """One prompt from position 0 on the pool's first pages."""
    at = np.arange(tokens, dtype=np.int64)
    tail = Run(
        pages=np.arange(pages_for(tokens, page_tokens), dtype=np.int32),
        start=0,
        tokens=tokens,
        queries=at.astype(np.int32),
        causal=True,
    )
    return FlatBatch(ids=np.zeros(tokens, dtype=np.int64), positions=at, slots=at, runs=(tail,), select=at[-1:])


def _fastest(work: Callable[[], object]) -> float:
    """Seconds of the best of several runs: the first one also pays for warming up."""
    seconds = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)

"""A model without weights for benchmarks and tests of everything around a model: each step takes a set time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import final

import numpy as np
from numpy.typing import NDArray

from agentspeed_engine.models.inputs import FlatBatch


@final
class NoopModel:
    """After id t comes t + 1 (mod vocabulary): a wrong row shows at once. It has no rows to copy."""

    def __init__(self, vocab_size: int, step_seconds: float, page_tokens: int, *, ids: range | None = None) -> None:
        """`ids`: those of one rank, whose logits it gives; None: all."""
        self.page_tokens = page_tokens
        self.first_id = 0 if ids is None else ids.start
        self._ids = vocab_size if ids is None else len(ids)
        self._step_seconds = step_seconds
        self._vocab_size = vocab_size

    def logits(self, batch: FlatBatch) -> NDArray[np.float64]:
        if self._step_seconds:
            time.sleep(self._step_seconds)
        logits = np.zeros((len(batch.select), self._ids))
        following = (batch.ids[batch.select] + 1) % self._vocab_size - self.first_id
        mine = np.flatnonzero((following >= 0) & (following < self._ids))
        logits[mine, following[mine]] = 10.0
        return logits

    def copy_rows(self, src_page: int, dst_page: int, rows: int) -> None:
        del src_page, dst_page, rows

    def reserve_host(self, slots: int) -> None:
        del slots

    def save(self, pages: Sequence[int], slots: Sequence[int]) -> None:
        del pages, slots

    def load(self, slots: Sequence[int], pages: Sequence[int]) -> None:
        del slots, pages

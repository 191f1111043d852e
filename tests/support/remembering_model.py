"""A model that remembers ids instead of latents: what a query sees can be compared with what it should see."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from agentspeed_engine.models.inputs import FlatBatch


class RememberingModel:
    """Its pool holds (id, position) per row; its next id is a hash of everything the query sees."""

    def __init__(self, pages: int, page_tokens: int, vocab_size: int) -> None:
        self.page_tokens = page_tokens
        self.vocab_size = vocab_size
        self.pool = np.full((pages * page_tokens, 2), -1, dtype=np.int64)
        self.host = np.zeros((0, page_tokens, 2), dtype=np.int64)
        self.seen: list[list[int]] = []
        """Ids each token of the last step saw, itself included."""

    def logits(self, batch: FlatBatch) -> NDArray[np.float64]:
        assert len(set(batch.slots.tolist())) == len(batch.slots), "two tokens of a step are written to one row"
        self.pool[batch.slots] = np.stack([batch.ids, batch.positions], axis=1)
        self.seen = self._seen(batch)
        logits = np.zeros((len(batch.select), self.vocab_size))
        for index, query in enumerate(batch.select):
            logits[index, next_id(self.seen[query], self.vocab_size)] = 10.0
        return logits

    def _seen(self, batch: FlatBatch) -> list[list[int]]:
        """Raises when a query sees a position twice, misses one, or sees a row of another position."""
        size = self.page_tokens
        visible: list[dict[int, int]] = [{} for _ in batch.ids]
        for run in batch.runs:
            assert len(run.pages) == -(-run.tokens // size), "as many pages as the tokens need"
            at = np.arange(run.tokens)
            rows = self.pool[run.pages[at // size].astype(np.int64) * size + at % size]
            assert (rows[:, 1] == run.start + at).all(), "a row of another position, or one that was never written"
            for query in run.queries:
                last = int(batch.positions[query])
                for number, position in rows.tolist():
                    if run.causal and position > last:
                        continue
                    assert position not in visible[query], "a pair is covered twice"
                    visible[query][position] = number
        for query, ids in enumerate(visible):
            assert sorted(ids) == list(range(int(batch.positions[query]) + 1)), "a pair is missing or too much"
        return [[ids[position] for position in sorted(ids)] for ids in visible]

    def copy_rows(self, src_page: int, dst_page: int, rows: int) -> None:
        size = self.page_tokens
        self.pool[dst_page * size : dst_page * size + rows] = self.pool[src_page * size : src_page * size + rows]

    def reserve_host(self, slots: int) -> None:
        self.host = np.zeros((slots, self.page_tokens, 2), dtype=np.int64)

    def save(self, pages: Sequence[int], slots: Sequence[int]) -> None:
        self.host[list(slots)] = self._pages()[list(pages)]

    def load(self, slots: Sequence[int], pages: Sequence[int]) -> None:
        self._pages()[list(pages)] = self.host[list(slots)]

    def _pages(self) -> NDArray[np.int64]:
        return self.pool.reshape(-1, self.page_tokens, 2)


def next_id(ids: Sequence[int], vocab_size: int) -> int:
    """What the model draws after `ids`."""
    value = 17
    for number in ids:
        value = (value * 1_000_003 + number + 1) % (2**61 - 1)
    return value % vocab_size


def continuation(ids: Sequence[int], tokens: int, vocab_size: int) -> list[int]:
    """The greedy continuation an undisturbed session draws."""
    known = list(ids)
    for _ in range(tokens):
        known.append(next_id(known, vocab_size))
    return known[len(ids) :]

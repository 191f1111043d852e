"""The memory behind a cache layout: one tensor a pool, and the copies of rows that all pools make together."""

from __future__ import annotations

from typing import Final, final

import torch
from torch import Tensor

from agentspeed_engine.models.kv_layout import KvLayout, KvPool
from agentspeed_engine.models.memory import LARGE_PAGE, zeros_on_demand
from agentspeed_kernels.fp8_cache import CacheRow

TORCH_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
}
"""By the names of `kv_layout.DTYPE_BYTES`."""
_LARGE_FROM: Final = 64 << 10
"""Bytes of one layer's page in a pool from which it lies in large pages of the kernel's: one then holds at most 32 of
its pages. The first page of a small model would take many times what it needs."""
_LEAST_STEPS: Final = 8
"""Of the kernel's large pages that a layer must fill for them: one that is partly used is at most an eighth."""


@final
class KvPools:
    """The rows of `pages` pages. The engine says whose a page is; nothing here knows."""

    __slots__ = ("_by_name", "layout")

    def __init__(self, layout: KvLayout, pages: int, page_tokens: int, device: torch.device | str = "cpu") -> None:
        """Allocates [layers, pages, page_tokens, width] of zeros for each pool, of one in fp8 uint8 [..., bytes of a
        row]: on a CPU memory is taken where it is written, elsewhere at once (kernels there read whole pages, so that
        every row must be finite: see `clear`)."""
        self.layout = layout
        self._by_name = {pool.name: _zeros(pool, pages, page_tokens, device) for pool in layout.pools}

    def __getitem__(self, name: str) -> Tensor:
        """[layers, pages, page_tokens, width or bytes of a row] of one pool."""
        return self._by_name[name]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Of all pools, in the layout's order."""
        return tuple(self._by_name.values())

    def numbers(self, slots: Tensor) -> Tensor:
        """[T, numbers of a token in all layers and pools] of rows `slots` [T]; what 8 bits stand for in bfloat16."""
        pools = zip(self._by_name.values(), self.layout.pools, strict=True)
        return torch.cat([_numbers(held, slots, pool.row) for held, pool in pools], 1)

    def clear(self, rows: Tensor) -> None:
        """Zeros in rows [n] int64 (page * page_tokens + offset), in every layer of every pool."""
        for pool in self._by_name.values():
            pool.view(pool.shape[0], -1, pool.shape[3]).index_fill_(1, rows, 0)

    def copy_rows(self, src_page: int, dst_page: int, rows: int) -> None:
        """The first `rows` rows of a page, in every layer of every pool."""
        for pool in self._by_name.values():
            pool[:, dst_page, :rows] = pool[:, src_page, :rows]


def _zeros(pool: KvPool, pages: int, page_tokens: int, device: torch.device | str) -> Tensor:
    row = pool.row
    shape = (pool.layers, pages, page_tokens, pool.width if row is None else row.nbytes)
    dtype = TORCH_DTYPES[pool.dtype] if row is None else torch.uint8
    if torch.device(device).type == "cpu":
        page = page_tokens * shape[3] * dtype.itemsize
        streamed = page >= _LARGE_FROM and pages * page >= _LEAST_STEPS * LARGE_PAGE
        return zeros_on_demand(shape, dtype, streamed=streamed)
    return torch.zeros(shape, dtype=dtype, device=device)


def _numbers(pool: Tensor, slots: Tensor, row: CacheRow | None) -> Tensor:
    held = pool.flatten(1, 2)[:, slots].transpose(0, 1)
    return (held if row is None else row.decoded(held, torch.bfloat16)).flatten(1)

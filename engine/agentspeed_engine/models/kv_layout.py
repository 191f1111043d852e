"""What a family keeps of every token, as data: the pools that are sized, allocated, copied and moved. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from agentspeed_kernels.fp8_cache import CacheRow

DTYPE_BYTES: dict[str, int] = {"float32": 4, "float64": 8, "bfloat16": 2}
"""The formats that a model computes in, with the bytes of an element."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class KvPool:
    """One kind of row: `width` numbers in `dtype` for every token in each of `layers` layers.

    In fp8 they are `heads` heads, each with a scale of its own, and `plain` numbers behind them that stay in bfloat16.
    """

    name: str
    layers: int
    width: int
    dtype: str
    """One of `DTYPE_BYTES`, or a `CacheFormat` of the kernels."""
    heads: int = 1
    plain: int = 0

    @property
    def row(self) -> CacheRow | None:
        """How a token's numbers are kept in one layer; None: one after the other in `dtype`."""
        if self.dtype != "fp8":
            return None
        return CacheRow(heads=self.heads, width=(self.width - self.plain) // self.heads, plain=self.plain)

    @property
    def bytes_per_token(self) -> int:
        """Of all layers."""
        row = self.row
        return self.layers * (self.width * DTYPE_BYTES[self.dtype] if row is None else row.nbytes)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class KvLayout:
    """All pools of a model on one rank. A page is `page_tokens` rows of every layer of every pool."""

    pools: tuple[KvPool, ...]

    @property
    def bytes_per_token(self) -> int:
        """Of all pools."""
        return sum(pool.bytes_per_token for pool in self.pools)

    def bytes_per_page(self, page_tokens: int) -> int:
        """Of all pools."""
        return self.bytes_per_token * page_tokens

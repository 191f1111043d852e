"""What a family keeps of every token, as data: the pools that are sized, allocated, copied and moved. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

DTYPE_BYTES: dict[str, int] = {"float32": 4, "float64": 8, "bfloat16": 2}
"""The formats that a model computes in, with the bytes of an element."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class KvPool:
    """One kind of row: `width` elements of `dtype` for every token in each of `layers` layers."""

    name: str
    layers: int
    width: int
    dtype: str

    @property
    def bytes_per_token(self) -> int:
        """Of all layers."""
        return self.layers * self.width * DTYPE_BYTES[self.dtype]


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

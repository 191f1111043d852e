"""The indexer of sparse attention: keys of its own in the cache, and the tokens that each row reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from agentspeed_engine.models.families.deepseek.config import IndexerConfig
from agentspeed_engine.models.rope import half_order
from agentspeed_engine.models.state import StepState
from agentspeed_kernels.fp8_blocks import Stored
from agentspeed_kernels.selection import Kernels

_NORM_EPS = 1e-6
"""Of the norm of its keys, which the published code fixes."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class IndexerWeights:
    """As the checkpoint names them."""

    q: Stored
    k: Stored
    k_gain: Tensor
    k_shift: Tensor
    shares: Tensor
    """What each head is worth for a hidden row, in float32 at least: it decides what is read."""


@final
class Chosen:
    """What the rows of a step read, from the layer that chose it to the last that shares it."""

    __slots__ = ("rows",)

    def __init__(self) -> None:
        self.rows: Tensor | None = None
        """[T, n] rows of the cache, -1 where there are fewer."""


@final
class Indexer:
    """Of one layer that chooses. Every rank of tp has it whole: all heads of attention read the same tokens."""

    __slots__ = ("_chosen", "_config", "_k", "_k_gain", "_k_shift", "_kernels", "_pool", "_q", "_shares")

    def __init__(
        self, config: IndexerConfig, turned: int, weights: IndexerWeights, pool: Tensor, chosen: Chosen,
        kernels: Kernels,
    ) -> None:  # fmt: skip
        """`turned`: coordinates that rotary embeddings turn. `pool` [pages, page_tokens, width] is the layer's own."""
        self._config, self._pool, self._chosen, self._kernels = config, pool, chosen, kernels
        order = torch.arange(config.width)
        if config.interleaved:  # pairs are always (i, i + turned / 2) at run time
            order[:turned] = torch.tensor(half_order(turned))
        rows = (torch.arange(config.heads)[:, None] * config.width + order).flatten()
        self._q, self._k = kernels.weight(weights.q[rows]), kernels.weight(weights.k[order])
        self._k_gain, self._k_shift = weights.k_gain[order].contiguous(), weights.k_shift[order].contiguous()
        self._shares = weights.shares

    def __call__(self, x: Tensor, low: Tensor, state: StepState) -> None:
        """`x` [T, D] are the hidden rows, `low` [T, rank] their queries of low rank."""
        config, rows, take, run = self._config, x.shape[0], state.workspace.take, self._kernels
        raw = take("index_raw", (rows, config.width), x.dtype)
        run["linear"].at(rows)(x, self._k, None, raw)
        run["index_append"].at(rows)(
            raw, self._k_gain, self._k_shift, _NORM_EPS, state.cos, state.sin, state.slots,
            self._pool.view(-1, config.width),
        )  # fmt: skip
        flat = take("index_q", (rows, config.heads * config.width), x.dtype)
        run["linear"].at(rows)(low, self._q, None, flat)
        q = flat.view(rows, config.heads, config.width)
        run["rope"].at(rows)(q[:, :, : 2 * state.cos.shape[-1]], state.cos, state.sin)
        select = run["index_select"].at(rows)
        self._chosen.rows = select(q, x, self._shares, self._pool, state.attention.few, config.top, state.workspace)

"""Grouped-query attention over paged keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from agentspeed_engine.models import boundaries
from agentspeed_engine.models.families.grouped.config import GroupedConfig
from agentspeed_engine.models.layers import AddNorm
from agentspeed_engine.models.state import StepState, other_sum
from agentspeed_engine.spmd.placement import Rank
from agentspeed_kernels.fp8_blocks import Stored, joined
from agentspeed_kernels.selection import Kernels


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedWeights:
    """Of one rank, as the checkpoint names them; a bias or norm that a family lacks is None."""

    q: Stored
    k: Stored
    v: Stored
    q_bias: Tensor | None
    k_bias: Tensor | None
    v_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Stored
    o_bias: Tensor | None


@final
class GroupedAttention:
    """One attention layer of one rank: heads of queries, keys and values are cut over tp together."""

    __slots__ = (
        "_bias",
        "_config",
        "_heads",
        "_joined",
        "_k_norm",
        "_kernels",
        "_keys",
        "_o",
        "_o_bias",
        "_q_norm",
        "_scale",
        "_values",
        "boundary",
    )

    def __init__(
        self,
        name: str,
        config: GroupedConfig,
        weights: GroupedWeights,
        keys: Tensor,
        values: Tensor,
        rank: Rank,
        kernels: Kernels,
    ) -> None:
        """`keys` and `values` are [pages, page_tokens, this rank's kv heads * head] and belong to this layer."""
        self._config, self._kernels, self._keys, self._values = config, kernels, keys, values
        self._heads = config.heads // rank.mesh.tp
        self._scale = float(config.head**-0.5)
        # One product reads the hidden rows once for queries, keys and values.
        self._joined = kernels.weight(joined([weights.q, weights.k, weights.v]))
        biases = (weights.q_bias, weights.k_bias, weights.v_bias)
        given = [bias for bias in biases if bias is not None]
        self._bias = torch.cat(given) if given else None
        self._q_norm, self._k_norm = weights.q_norm, weights.k_norm
        self._o = kernels.weight(weights.o)
        # Partial outputs are summed over tp, so one rank alone adds the bias.
        self._o_bias = weights.o_bias if rank.tp == 0 else None
        self.boundary = boundaries.attention(name, config.hidden)

    def __call__(self, x: Tensor, residual: Tensor | None, state: StepState) -> tuple[Tensor, Tensor | None]:
        rows, take, run = x.shape[0], state.workspace.take, self._kernels
        if not rows:  # a dp rank whose branches all rest
            return x, residual
        joined = take("qkv", (rows, self._joined.shape[0]), x.dtype)
        run["linear"].at(rows)(x, self._joined, self._bias, joined)
        return self._attend(joined, state), residual

    def after_norm(
        self, norm: AddNorm, x: Tensor, residual: Tensor | None, state: StepState
    ) -> tuple[Tensor, Tensor | None]:
        """`joined.AfterNorm`: the norm with the product of queries, keys and values."""
        rows, run = x.shape[0], self._kernels
        if not rows or residual is None or not run.has("add_norm_linear"):
            return self(*norm(x, residual, state), state)
        joined = state.workspace.take("qkv", (rows, self._joined.shape[0]), x.dtype)
        total = other_sum(residual, state)
        multiply = run["add_norm_linear"].at(rows)
        multiply(x, residual, norm.gain, norm.eps, self._joined, self._bias, joined, total)
        return self._attend(joined, state), total

    def _attend(self, joined: Tensor, state: StepState) -> Tensor:
        """`joined` [T, (H + 2 G) * head]: queries, keys and values as their product gives them."""
        rows, take, run = joined.shape[0], state.workspace.take, self._kernels
        q = self._append(joined, state)
        mixed = take("mixed", (rows, self._heads, self._config.head), joined.dtype)
        given = (q, self._keys, self._values)
        if state.attention.few is not None:
            run["gqa_rows"].at(rows)(*given, state.attention.few, self._scale, state.workspace, mixed)
        if state.attention.many is not None:
            run["gqa_extend"].at(rows)(*given, state.attention.many, self._scale, state.workspace, mixed)
        out = take("attended", (rows, self._config.hidden), joined.dtype)
        run["linear"].at(rows)(mixed.view(rows, -1), self._o, self._o_bias, out)
        return out

    def _append(self, joined: Tensor, state: StepState) -> Tensor:
        """Normed and turned queries [T, H, head]; keys and values are written to the pools on the way."""
        rows, head = joined.shape[0], self._config.head
        q = state.workspace.take("q", (rows, self._heads, head), joined.dtype)
        self._kernels["qkv_append"].at(rows)(
            joined.view(rows, -1, head),
            self._q_norm,
            self._k_norm,
            self._config.eps,
            state.cos,
            state.sin,
            state.slots,
            q,
            self._keys,
            self._values,
        )
        return q

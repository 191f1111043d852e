"""Multi-head latent attention over the paged latent pool: absorbed for few rows, decompressed for many, or sparse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from agentspeed_engine.models import boundaries
from agentspeed_engine.models.families.deepseek.config import LATENT_NORM_EPS, DeepseekConfig
from agentspeed_engine.models.families.deepseek.indexer import Chosen, Indexer
from agentspeed_engine.models.layers import AddNorm
from agentspeed_engine.models.rope import half_order, yarn_scale
from agentspeed_engine.models.state import StepState, other_sum
from agentspeed_engine.spmd.placement import Rank
from agentspeed_kernels.fp8_blocks import Stored, joined
from agentspeed_kernels.packing import Packed, Weight
from agentspeed_kernels.selection import Kernels


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class MlaWeights:
    """Of one rank, as the checkpoint names them: its heads' piece of q, kv_b and o."""

    q_a: Stored | None
    q_a_bias: Tensor | None
    q_a_norm: Tensor | None
    q: Stored
    """q_b_proj, or q_proj when queries have no low rank."""
    kv_a: Stored
    kv_a_bias: Tensor | None
    kv_a_norm: Tensor
    kv_b: Tensor
    o: Stored
    o_bias: Tensor | None


@final
class Mla:
    """One attention layer of one rank: heads are cut over tp, the latent is the same on every tp rank."""

    __slots__ = (
        "_absorb",
        "_chosen",
        "_config",
        "_down",
        "_down_bias",
        "_first",
        "_heads",
        "_indexer",
        "_kernels",
        "_kv_norm",
        "_o",
        "_o_bias",
        "_pool",
        "_q",
        "_q_norm",
        "_q_rank",
        "_scale",
        "_value_up",
        "boundary",
    )  # fmt: skip

    def __init__(
        self,
        name: str,
        config: DeepseekConfig,
        weights: MlaWeights,
        pool: Tensor,
        rank: Rank,
        kernels: Kernels,
        indexer: Indexer | None = None,
        chosen: Chosen | None = None,
    ) -> None:
        """`chosen`: what rows read, where that is not all they see; `indexer`: what fills it, where this layer does."""
        self._indexer, self._chosen = indexer, chosen
        self._config, self._pool, self._kernels = config, pool, kernels
        self._heads = config.heads // rank.mesh.tp
        self._scale = _score_scale(config)
        self._q_rank = config.q_rank or 0
        weights = _half_layout(config, self._heads, weights) if config.interleaved else weights
        down, self._down_bias = _joined_down(weights)
        self._q_norm, self._kv_norm = weights.q_a_norm, weights.kv_a_norm
        self._q: Weight
        self._down: Weight
        self._first: Weight | None = None
        """What joined steps multiply the norm with: all that reads it."""
        alone = kernels.has("mla_queries") and weights.q_a is None and self._down_bias is None
        parted = parts_of(joined([weights.q, down]), weights.q.shape[0], kernels) if alone else None
        if parted is not None:
            self._first, self._q, self._down = parted
        else:
            self._q, self._down = kernels.weight(weights.q), kernels.weight(down)
            if kernels.has("mla_queries") and weights.q_a is not None:
                self._first = self._down
        self._o = kernels.weight(weights.o)
        # Partial outputs are summed over tp, so one rank alone adds the bias.
        self._o_bias = weights.o_bias if rank.tp == 0 else None
        up = weights.kv_b.view(self._heads, config.nope + config.value, config.kv_rank)
        self._absorb = kernels.weight(up[:, : config.nope].transpose(1, 2).contiguous(), op="heads_linear")
        # Copied also where it is contiguous already, by a rank of one head: else the whole would stay behind it.
        values = up[:, config.nope :].clone(memory_format=torch.contiguous_format)
        self._value_up = kernels.weight(values, op="heads_linear")
        self.boundary = boundaries.attention(name, config.hidden)

    def __call__(self, x: Tensor, residual: Tensor | None, state: StepState) -> tuple[Tensor, Tensor | None]:
        config, rows, take = self._config, x.shape[0], state.workspace.take
        if not rows:  # a dp rank whose branches all rest
            return x, residual
        run = self._kernels
        q, low = self._project(x, state)
        turned = q[:, :, config.nope :]
        run["rope"].at(rows)(turned, state.cos, state.sin)
        mixed = take("mixed", (rows, self._heads, config.value), x.dtype)
        if self._indexer is not None:
            self._indexer(x, low, state)
        if state.attention.few is not None:
            self._attend_few(q, state, mixed)
        if state.attention.many is not None:
            self._attend_many(q, state, mixed)
        return self._out(mixed, state), residual

    def after_norm(
        self, norm: AddNorm, x: Tensor, residual: Tensor | None, state: StepState
    ) -> tuple[Tensor, Tensor | None]:
        """`joined.AfterNorm`: the norm with the first product, and all that attention takes in one launch."""
        config, rows, take, run = self._config, x.shape[0], state.workspace.take, self._kernels
        dense = self._chosen is None and state.attention.many is None and state.attention.few is not None
        if self._first is None or residual is None or not rows or not dense:
            return self(*norm(x, residual, state), state)
        total = other_sum(residual, state)
        first = take("first", (rows, self._first.shape[0]), x.dtype)
        multiply = run["add_norm_linear"].at(rows)
        multiply(x, residual, norm.gain, norm.eps, self._first, self._down_bias, first, total)
        if self._q_norm is None:
            q = first[:, : -config.latent_width]
        else:
            low = take("q_low", (rows, self._q_rank), x.dtype)
            run["rms_norm"].at(rows)(first[:, : self._q_rank], self._q_norm, LATENT_NORM_EPS, low)
            q = take("q", (rows, self._q.shape[0]), x.dtype)
            run["linear"].at(rows)(low, self._q, None, q)
        absorbed = take("absorbed", (rows, self._heads, config.latent_width), x.dtype)
        run["mla_queries"].at(rows)(
            q.view(rows, self._heads, -1),
            first[:, -config.latent_width :],
            self._kv_norm,
            LATENT_NORM_EPS,
            state.cos,
            state.sin,
            state.slots,
            self._absorb,
            self._pool.flatten(0, 1),
            absorbed,
        )
        mixed = take("mixed", (rows, self._heads, config.value), x.dtype)
        self._attend(absorbed, state, mixed)
        return self._out(mixed, state), total

    def _out(self, mixed: Tensor, state: StepState) -> Tensor:
        rows = mixed.shape[0]
        out = state.workspace.take("attended", (rows, self._config.hidden), mixed.dtype)
        self._kernels["linear"].at(rows)(mixed.view(rows, -1), self._o, self._o_bias, out)
        return out

    def _project(self, x: Tensor, state: StepState) -> tuple[Tensor, Tensor]:
        """(Queries [T, H, nope + rope], what they were made of); the new latents are written to the pool on the way."""
        rows, take, run = x.shape[0], state.workspace.take, self._kernels
        down = take("down", (rows, self._down.shape[0]), x.dtype)
        run["linear"].at(rows)(x, self._down, self._down_bias, down)
        run["latent_append"].at(rows)(
            down[:, self._q_rank :],
            self._kv_norm,
            LATENT_NORM_EPS,
            state.cos,
            state.sin,
            state.slots,
            self._pool.flatten(0, 1),
        )
        low = x
        if self._q_norm is not None:
            low = take("q_low", (rows, self._q_rank), x.dtype)
            run["rms_norm"].at(rows)(down[:, : self._q_rank], self._q_norm, LATENT_NORM_EPS, low)
        q = take("q", (rows, self._q.shape[0]), x.dtype)
        run["linear"].at(rows)(low, self._q, None, q)
        return q.view(rows, self._heads, -1), low

    def _attend_few(self, q: Tensor, state: StepState, mixed: Tensor) -> None:
        config, take, run = self._config, state.workspace.take, self._kernels
        rows = q.shape[0]
        absorbed = take("absorbed", (rows, self._heads, config.latent_width), q.dtype)
        run["heads_linear"].at(rows)(q[:, :, : config.nope], self._absorb, absorbed[:, :, : config.kv_rank])
        run.copy(q[:, :, config.nope :], absorbed[:, :, config.kv_rank :])
        self._attend(absorbed, state, mixed)

    def _attend(self, absorbed: Tensor, state: StepState, mixed: Tensor) -> None:
        """`absorbed`: queries in the latent space."""
        config, take, run = self._config, state.workspace.take, self._kernels
        rows = absorbed.shape[0]
        latent = take("latent_out", (rows, self._heads, config.kv_rank), absorbed.dtype)
        if self._chosen is None:
            attend = run["mla_rows"].at(rows)
            attend(absorbed, self._pool, state.attention.few, self._scale, state.workspace, latent)
        else:
            assert self._chosen.rows is not None, "a layer that shares follows one that chooses"
            run["mla_selected"].at(rows)(absorbed, self._pool, self._chosen.rows, self._scale, latent)
        run["heads_linear"].at(rows)(latent, self._value_up, mixed)

    def _attend_many(self, q: Tensor, state: StepState, mixed: Tensor) -> None:
        """Rows of `few` keep what they have: the extend's result is taken for its own rows only."""
        alone = state.attention.few is None
        out = mixed if alone else state.workspace.take("extended", tuple(mixed.shape), q.dtype)
        attend = self._kernels["mla_extend"].at(q.shape[0])
        attend(q, self._pool, self._absorb, self._value_up, state.attention.many, self._scale, state.workspace, out)
        if not alone:
            rows = state.attention.many_rows
            mixed[rows] = out[rows]


def parts_of(rows: Stored, first: int, kernels: Kernels) -> tuple[Weight, Weight, Weight] | None:
    """A weight as kernels want it, its first rows and the others, in the same memory; None where a part would begin
    within what is kept together."""
    whole = kernels.weight(rows)
    if isinstance(whole, Tensor):
        return whole, whole[:first], whole[first:]
    if isinstance(whole, Packed) or first % whole.together:
        return None
    return whole, whole.outputs(0, first), whole.outputs(first, whole.shape[0])


def _score_scale(config: DeepseekConfig) -> float:
    """Of attention scores; yarn with `mscale_all_dim` makes them sharper (DeepSeek-V2)."""
    scale = float((config.nope + config.rope.width) ** -0.5)
    if config.yarn is not None and config.yarn.mscale_all_dim:
        scale *= yarn_scale(config.yarn.factor, config.yarn.mscale_all_dim) ** 2
    return scale


def _joined_down(weights: MlaWeights) -> tuple[Stored, Tensor | None]:
    """Both down-projections as one matrix: one product reads the hidden rows once."""
    if weights.q_a is None:
        return weights.kv_a, weights.kv_a_bias
    both = joined([weights.q_a, weights.kv_a])
    if weights.q_a_bias is None or weights.kv_a_bias is None:
        return both, None
    return both, torch.cat([weights.q_a_bias, weights.kv_a_bias])


def _half_layout(config: DeepseekConfig, heads: int, weights: MlaWeights) -> MlaWeights:
    """Reorders the rotary rows of both sides once, so that at run time pairs are always (i, i + rope / 2)."""
    order = torch.tensor(half_order(config.rope.width))
    head = torch.cat([torch.arange(config.nope), config.nope + order])
    q_order = (torch.arange(heads)[:, None] * len(head) + head).flatten()
    kv_order = torch.cat([torch.arange(config.kv_rank), config.kv_rank + order])
    return MlaWeights(
        q_a=weights.q_a,
        q_a_bias=weights.q_a_bias,
        q_a_norm=weights.q_a_norm,
        q=weights.q[q_order],
        kv_a=weights.kv_a[kv_order],
        kv_a_bias=None if weights.kv_a_bias is None else weights.kv_a_bias[kv_order].contiguous(),
        kv_a_norm=weights.kv_a_norm,
        kv_b=weights.kv_b,
        o=weights.o,
        o_bias=weights.o_bias,
    )

"""Modules that every family shares: embedding, residual norm, dense feed-forward and the head."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from agentspeed_engine.models import boundaries
from agentspeed_engine.models.state import StepState
from agentspeed_engine.spmd.placement import Rank
from agentspeed_kernels.fp8_blocks import Fp8Blocks
from agentspeed_kernels.packing import Weight
from agentspeed_kernels.selection import Kernels


@final
class Embed:
    """Ids to hidden rows; the vocabulary is cut over tp, and a rank gives zeros for ids it does not hold."""

    __slots__ = ("_dtype", "_first", "_table", "boundary")

    def __init__(self, name: str, table: Weight, rank: Rank, dtype: torch.dtype) -> None:
        """`table` is this rank's piece: the head's own weight where both are tied. `dtype` is that of the rows."""
        assert not isinstance(table, Fp8Blocks), "neither embeddings nor heads are kept so"
        self._table, self._dtype = table, dtype
        self._first = rank.tp * self._table.shape[0] if rank.mesh.tp > 1 else None
        self.boundary = boundaries.embedding(name, table.shape[1])

    def __call__(self, x: Tensor, residual: Tensor | None, state: StepState) -> tuple[Tensor, Tensor | None]:
        if self._first is None:
            return self._rows(x), residual
        local = x - self._first
        mine = (local >= 0) & (local < self._table.shape[0])
        return self._rows(local.clamp(0, self._table.shape[0] - 1)) * mine[:, None], residual

    def _rows(self, ids: Tensor) -> Tensor:
        return self._table[ids].to(self._dtype) if isinstance(self._table, Tensor) else self._table.rows(ids)


@final
class AddNorm:
    """Adds its input to the residual and hands on the norm of the sum; the first of a chain starts the residual."""

    __slots__ = ("_kernels", "boundary", "eps", "gain")

    def __init__(self, name: str, weight: Tensor, eps: float, kernels: Kernels) -> None:
        self.gain, self.eps, self._kernels = weight, eps, kernels
        self.boundary = boundaries.norm(name, weight.shape[0])

    def __call__(self, x: Tensor, residual: Tensor | None, state: StepState) -> tuple[Tensor, Tensor]:
        out = state.workspace.take("normed", (x.shape[0], x.shape[1]), x.dtype)
        if residual is None:
            self._kernels["rms_norm"].at(x.shape[0])(x, self.gain, self.eps, out)
            return out, x
        self._kernels["add_rms_norm"].at(x.shape[0])(x, residual, self.gain, self.eps, out)
        return out, residual


@final
class Dense:
    """SwiGLU; the inner width is cut over tp."""

    __slots__ = ("_down", "_gate_up", "_kernels", "boundary")

    def __init__(self, name: str, matrices: tuple[Weight, Weight], width: int, kernels: Kernels) -> None:
        """`matrices` (gate and up, down) are this rank's pieces, as those of experts of which there is one; `width` is
        that of the model."""
        self._gate_up, self._down = matrices
        self._kernels = kernels
        self.boundary = boundaries.dense(name, width)

    def __call__(self, x: Tensor, residual: Tensor | None, state: StepState) -> tuple[Tensor, Tensor | None]:
        if not x.shape[0]:  # a dp rank whose branches all rest
            return x, residual
        out = state.workspace.take("fed", (x.shape[0], x.shape[1]), x.dtype)
        ids = state.workspace.constant(0, (x.shape[0], 1), torch.int64)
        weights = state.workspace.constant(1, (x.shape[0], 1), _wide(x.dtype))
        self._kernels["experts"].at(x.shape[0])(x, self._gate_up, self._down, ids, weights, state.workspace, out)
        return out, residual


@final
class Head:
    """Logits of the selected rows; the vocabulary is cut over tp."""

    __slots__ = ("_kernels", "_table", "boundary")

    def __init__(self, name: str, table: Weight, rank: Rank, kernels: Kernels) -> None:
        """`table` is this rank's piece, in the layout of the kernels."""
        self._table, self._kernels = table, kernels
        self.boundary = boundaries.head(name, table.shape[0] * rank.mesh.tp)

    def __call__(self, x: Tensor, residual: Tensor | None, state: StepState) -> tuple[Tensor, Tensor | None]:
        rows = x[state.select]
        # A fresh tensor: logits leave the step, scratch memory does not.
        out = torch.empty(rows.shape[0], self._table.shape[0], dtype=x.dtype, device=x.device)
        if rows.shape[0]:
            self._kernels.head.at(rows.shape[0])(rows, self._table, None, out)
        return out, residual


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32

"""The C kernels for any number of rows, in blocks that give each row the same bits: what batch-invariant steps run on.

A row's products are its own sums over the inputs, in one order, whatever rows stand beside it; the BLAS of torch, which
is faster for many rows, promises no such thing. Scores of the router are taken row by row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, final

import torch
from torch import Tensor

from agentspeed_kernels.cpu import native
from agentspeed_kernels.cpu.native_kernels import DTYPES, FORM_PRIORITY, NativeKernels
from agentspeed_kernels.routing import RouteRule
from agentspeed_kernels.signature import KernelSpec
from agentspeed_kernels.workspace import Workspace

BLOCK_ROWS = 16
"""What the C code takes at once."""
BELOW = 50
"""How far its priority lies below that of the same code for few rows, and so below torch's."""


class FewRows(Protocol):
    """Of few rows, whatever their weights are in."""

    @property
    def linear(self) -> Callable[..., Any]: ...
    @property
    def heads_linear(self) -> Callable[..., Any]: ...
    @property
    def experts(self) -> Callable[..., Any]: ...


def in_blocks(few: FewRows) -> dict[str, Callable[..., Any]]:
    """The same for any number of rows, by op."""

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        for rows in _blocks(x.shape[0]):
            few.linear(x[rows], weight, bias, out[rows])

    def heads_linear(x: Tensor, weight: Tensor, out: Tensor) -> None:
        for rows in _blocks(x.shape[0]):
            few.heads_linear(x[rows], weight, out[rows])

    def experts(
        x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor, workspace: Workspace, out: Tensor
    ) -> None:
        for rows in _blocks(x.shape[0]):
            few.experts(x[rows], gate_up, down, ids[rows], weights[rows], workspace, out[rows])

    return {"linear": linear, "heads_linear": heads_linear, "experts": experts}


@final
class InvariantKernels:
    """The ops of one form and kind that otherwise have a limit of rows, or sums that depend on their number."""

    __slots__ = ("_few",)

    def __init__(self, form: native.Form, kind: native.Kind) -> None:
        self._few = NativeKernels(form, kind)

    def route(self, x: Tensor, weight: Tensor, bias: Tensor | None, rule: RouteRule) -> tuple[Tensor, Tensor]:
        ids = torch.empty(x.shape[0], rule.top, dtype=torch.int64)
        weights = torch.empty(x.shape[0], rule.top, dtype=torch.float32)
        for row in range(x.shape[0]):
            self._few.route_into(x[row : row + 1], weight, bias, rule, ids[row : row + 1], weights[row : row + 1])
        return ids, weights

    @property
    def calls(self) -> dict[str, Callable[..., Any]]:
        """By op."""
        return {
            **in_blocks(self._few),
            "route": self.route,
            "mla_rows": self._few.mla_rows,
            "gqa_rows": self._few.gqa_rows,
        }


def _blocks(rows: int) -> list[slice]:
    return [slice(at, min(at + BLOCK_ROWS, rows)) for at in range(0, rows, BLOCK_ROWS)]


SPECS: tuple[KernelSpec, ...] = tuple(
    KernelSpec(
        op=op,
        name=f"{form.name}-{kind}-blocks",
        dtypes=frozenset({DTYPES[kind]}),
        device="cpu",
        call=run,
        priority=priority - BELOW,
        features=frozenset({form.feature}),
        recordable=True,
        invariant=True,
    )
    for form, priority in FORM_PRIORITY.items()
    if form in native.forms_here()
    for kind in form.kinds
    for op, run in InvariantKernels(form, kind).calls.items()
)

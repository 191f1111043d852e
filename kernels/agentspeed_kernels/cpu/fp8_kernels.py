"""Products with weights in fp8 as entries of the registry: a form for each class of processors (torch: torch_bytes)."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from agentspeed_kernels.cpu import native
from agentspeed_kernels.cpu.amx_kernels import PRIORITY as TILE_PRIORITY
from agentspeed_kernels.cpu.native_kernels import (
    DTYPES,
    FORM_PRIORITY,
    MOST_PRODUCT_ROWS,
    OpenedFunctions,
    rows_packed,
)
from agentspeed_kernels.cpu.recording import call
from agentspeed_kernels.fp8_blocks import Fp8Blocks
from agentspeed_kernels.signature import KernelSpec
from agentspeed_kernels.workspace import Workspace

_ROW = 32
"""Inputs that become floats together: rows between two products are whole ones."""

_FEW_ROWS = 4
"""Up to so many rows of bfloat16 floats in registers are faster than tiles of bfloat16."""
_BEFORE_TILES = max(TILE_PRIORITY.values()) + 1


@final
class Fp8Kernels(OpenedFunctions):
    """The products of one form and kind."""

    __slots__ = ()

    def linear(self, x: Tensor, weight: Fp8Blocks, bias: Tensor | None, out: Tensor) -> None:
        assert rows_packed(x, out)
        outputs, inputs = weight.shape
        call(
            self.functions,
            "linear_fp8",
            (x, weight, bias, out),
            x.data_ptr(),
            x.stride(0),
            weight.data.data_ptr(),
            weight.scales.data_ptr(),
            None if bias is None else bias.data_ptr(),
            out.data_ptr(),
            out.stride(0),
            x.shape[0],
            outputs,
            inputs,
            torch.get_num_threads(),
        )

    def experts(
        self,
        x: Tensor,
        gate_up: Fp8Blocks,
        down: Fp8Blocks,
        ids: Tensor,
        weights: Tensor,
        workspace: Workspace,
        out: Tensor,
    ) -> None:
        assert x.is_contiguous() and out.is_contiguous() and ids.is_contiguous() and weights.is_contiguous()
        count, hidden, inner = down.shape
        pairs, tokens = ids.numel(), x.shape[0]
        act = workspace.take("fp8_inner", (pairs, -(-inner // _ROW) * _ROW), torch.float32)
        sums = workspace.take("fp8_sums", (tokens, hidden + 16), torch.float32)
        order = workspace.take("fp8_order", (pairs + count + 1,), torch.int32)
        call(
            self.functions,
            "experts_fp8",
            (x, gate_up, down, ids, weights, act, sums, order, out),
            x.data_ptr(),
            gate_up.data.data_ptr(),
            gate_up.scales.data_ptr(),
            down.data.data_ptr(),
            down.scales.data_ptr(),
            ids.data_ptr(),
            weights.data_ptr(),
            act.data_ptr(),
            sums.data_ptr(),
            order.data_ptr(),
            out.data_ptr(),
            tokens,
            ids.shape[1],
            count,
            inner,
            hidden,
            torch.get_num_threads(),
        )


def _specs(form: native.Form, kind: native.Kind) -> tuple[KernelSpec, ...]:
    kernels, tiles = Fp8Kernels(form, kind), form in TILE_PRIORITY
    pairs = kind == "bf16" and form is native.AVX512  # where there may be tiles too
    return tuple(
        KernelSpec(
            op=op,
            name=f"{form.name}-{kind}-fp8",
            dtypes=frozenset({DTYPES[kind]}),
            device="cpu",
            call=run,
            priority=TILE_PRIORITY[form] if tiles else _BEFORE_TILES if pairs else FORM_PRIORITY[form],
            features=frozenset({form.feature}),
            most_rows=None if tiles else _FEW_ROWS if pairs else MOST_PRODUCT_ROWS,
            recordable=True,
            weights=frozenset({"fp8"}),
            layout="blocks",
        )
        for op, run in (("linear", kernels.linear), ("experts", kernels.experts))
    )


SPECS: tuple[KernelSpec, ...] = tuple(
    spec for form in native.forms_here() for kind in form.kinds for spec in _specs(form, kind)
)

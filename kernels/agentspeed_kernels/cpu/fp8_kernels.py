"""Products with weights in fp8 as entries of the registry: a form for each class of processors (torch: torch_bytes)."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from agentspeed_kernels.cpu.amx_kernels import PRIORITY as TILE_PRIORITY
from agentspeed_kernels.cpu.byte_specs import byte_specs
from agentspeed_kernels.cpu.native_kernels import OpenedFunctions
from agentspeed_kernels.cpu.product_calls import rows_packed
from agentspeed_kernels.cpu.recording import call
from agentspeed_kernels.fp8_blocks import Fp8Blocks
from agentspeed_kernels.signature import KernelSpec
from agentspeed_kernels.workspace import Workspace

_ROW = 32
"""Inputs that become floats together: rows between two products are whole ones."""


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


SPECS: tuple[KernelSpec, ...] = byte_specs(
    Fp8Kernels, "fp8", frozenset({"fp8"}), "blocks", few=max(TILE_PRIORITY.values()) + 1
)

"""Products with weights in int8 as entries of the registry, a form for each class of processors (torch's: torch_bytes).

Activations stay in their own format, and so does what comes out. Every kernel takes a scale for each output as well as
one for each group of 32 inputs.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from agentspeed_kernels.cpu import native
from agentspeed_kernels.cpu.amx_kernels import PRIORITY as TILE_PRIORITY
from agentspeed_kernels.cpu.byte_specs import byte_specs
from agentspeed_kernels.cpu.native_kernels import OpenedFunctions
from agentspeed_kernels.cpu.product_calls import rows_packed
from agentspeed_kernels.cpu.recording import call
from agentspeed_kernels.quantised import GROUPS, INPUTS, OUTPUTS, Quantised
from agentspeed_kernels.signature import KernelSpec
from agentspeed_kernels.workspace import Workspace

_BLOCK = 16
"""Rows that are prepared together (amx_int8.h)."""


@final
class Int8Kernels(OpenedFunctions):
    """The products of one form and kind."""

    __slots__ = ()

    def linear(self, x: Tensor, weight: Quantised, bias: Tensor | None, out: Tensor) -> None:
        assert rows_packed(x, out)
        outputs, inputs = weight.shape
        left = torch.empty(self._block_bytes(inputs) * -(-x.shape[0] // _BLOCK), dtype=torch.uint8)
        call(
            self.functions,
            "linear_bytes",
            (x, weight, bias, out, left),
            x.data_ptr(),
            x.stride(0),
            weight.data.data_ptr(),
            weight.scales.data_ptr(),
            weight.group,
            None if bias is None else bias.data_ptr(),
            out.data_ptr(),
            out.stride(0),
            left.data_ptr(),
            x.shape[0],
            outputs,
            inputs,
            torch.get_num_threads(),
        )

    def experts(
        self,
        x: Tensor,
        gate_up: Quantised,
        down: Quantised,
        ids: Tensor,
        weights: Tensor,
        workspace: Workspace,
        out: Tensor,
    ) -> None:
        assert x.is_contiguous() and out.is_contiguous() and ids.is_contiguous() and weights.is_contiguous()
        assert gate_up.group == down.group
        count, hidden, inner = down.shape
        pairs, tokens = ids.numel(), x.shape[0]
        # Each expert that is chosen begins a block of its own.
        blocks = min(pairs, pairs // _BLOCK + count)
        size = max(blocks * max(map(self._block_bytes, (hidden, inner))), pairs * 4 * (inner + INPUTS))
        left = workspace.take("int8_left", (size,), torch.uint8)
        act = workspace.take("int8_inner", (pairs, inner + OUTPUTS), x.dtype)
        sums = workspace.take("int8_sums", (tokens, hidden + OUTPUTS), torch.float32)
        order = workspace.take("int8_order", (2 * pairs + 2 * count + 2,), torch.int32)
        call(
            self.functions,
            "experts_bytes",
            (x, gate_up, down, ids, weights, left, act, sums, order, out),
            x.data_ptr(),
            gate_up.data.data_ptr(),
            gate_up.scales.data_ptr(),
            down.data.data_ptr(),
            down.scales.data_ptr(),
            down.group,
            ids.data_ptr(),
            weights.data_ptr(),
            left.data_ptr(),
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

    def _block_bytes(self, inputs: int) -> int:
        """Of `_BLOCK` prepared rows: what amx_int8.h says; the other forms prepare none."""
        steps = -(-inputs // INPUTS)
        return 2 * (1024 * steps + 64 + 64 * 2 * steps)


SPECS: tuple[KernelSpec, ...] = byte_specs(
    Int8Kernels, "int8", frozenset(GROUPS), "bytes", few=TILE_PRIORITY[native.AVX512BF16] + 1
)

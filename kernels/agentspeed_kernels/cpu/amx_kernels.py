"""The kernels with tiles as entries of the registry: bfloat16, weights in tile order, any number of rows.

The tiles are those of AMX, or vectors where there is AVX512-BF16 alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor

from agentspeed_kernels.cpu import native
from agentspeed_kernels.cpu.native_kernels import (
    OpenedFunctions,
    call_gqa_rows,
    call_mla_rows,
    heads_of,
    in_fp8,
)
from agentspeed_kernels.cpu.product_calls import call_heads_linear, call_linear, rows_packed
from agentspeed_kernels.cpu.recording import call
from agentspeed_kernels.packing import TILE_INPUTS, Packed
from agentspeed_kernels.signature import KernelSpec
from agentspeed_kernels.tiles import TilePlan
from agentspeed_kernels.workspace import Workspace

PRIORITY = {native.AMX: 20, native.AVX512BF16: 18}
EXTEND_FROM = {(native.AVX512BF16, "gqa_extend"): 32, (native.AVX512BF16, "mla_extend"): 112}
"""At a context of 3 k, in processor time of one thread. Nothing is decompressed for grouped heads."""


@final
class TileKernels(OpenedFunctions):
    """The ops of one form. The tiles are asked for with the library, at the first call."""

    __slots__ = ()

    def __init__(self, form: native.Form) -> None:
        super().__init__(form, "bf16")

    def linear(self, x: Tensor, weight: Packed, bias: Tensor | None, out: Tensor) -> None:
        call_linear(self.functions, x, weight, bias, out)

    def heads_linear(self, x: Tensor, weight: Packed, out: Tensor) -> None:
        call_heads_linear(self.functions, x, weight, out)

    def experts(
        self, x: Tensor, gate_up: Packed, down: Packed, ids: Tensor, weights: Tensor, workspace: Workspace, out: Tensor
    ) -> None:
        assert x.is_contiguous() and out.is_contiguous() and ids.is_contiguous() and weights.is_contiguous()
        count, hidden, inner = down.shape
        pairs, tokens = ids.numel(), x.shape[0]
        gathered = workspace.take("expert_rows", (pairs, _steps(hidden)), torch.bfloat16)
        act = workspace.take("expert_inner", (pairs, _steps(inner)), torch.bfloat16)
        sums = workspace.take("expert_sums", (tokens, _steps(hidden)), torch.float32)
        order = workspace.take("expert_order", (pairs + count + 1,), torch.int32)
        call(
            self.functions,
            "experts",
            (x, gate_up, down, ids, weights, gathered, act, sums, order, out),
            x.data_ptr(),
            gate_up.data_ptr(),
            down.data_ptr(),
            ids.data_ptr(),
            weights.data_ptr(),
            gathered.data_ptr(),
            act.data_ptr(),
            sums.data_ptr(),
            order.data_ptr(),
            order.data_ptr() + 4 * pairs,
            out.data_ptr(),
            tokens,
            ids.shape[1],
            count,
            inner,
            hidden,
            torch.get_num_threads(),
        )

    def mla_rows(
        self, q: Tensor, pool: Tensor, tiles: TilePlan, scale: float, workspace: Workspace, out: Tensor
    ) -> None:
        call_mla_rows(self.functions, q, pool, tiles, scale, workspace, out, _steps(out.shape[2]))

    def gqa_rows(
        self,
        q: Tensor,
        key_pool: Tensor,
        value_pool: Tensor,
        tiles: TilePlan,
        scale: float,
        workspace: Workspace,
        out: Tensor,
    ) -> None:
        call_gqa_rows(self.functions, q, key_pool, value_pool, tiles, scale, workspace, out, _steps(out.shape[2]))

    def gqa_extend(
        self,
        q: Tensor,
        key_pool: Tensor,
        value_pool: Tensor,
        tiles: TilePlan,
        scale: float,
        workspace: Workspace,
        out: Tensor,
    ) -> None:
        """Rows without a tile keep what `out` had."""
        del workspace  # scratch memory is that of the threads
        assert rows_packed(q) and key_pool.is_contiguous() and value_pool.is_contiguous() and out.is_contiguous()
        heads, width = out.shape[1], out.shape[2]
        call(
            self.functions,
            "gqa_extend",
            (q, key_pool, value_pool, out),
            q.data_ptr(),
            q.stride(0),
            q.stride(1),
            key_pool.data_ptr(),
            value_pool.data_ptr(),
            key_pool.shape[1],
            width,
            heads,
            heads_of(key_pool, width),
            q.shape[0],
            tiles.count,
            *tiles.addresses[:7],
            tiles.merge_rows.size,
            tiles.addresses[7],
            scale,
            out.data_ptr(),
            in_fp8(key_pool),
            torch.get_num_threads(),
        )

    def mla_extend(
        self,
        q: Tensor,
        pool: Tensor,
        key_up: Packed,
        value_up: Packed,
        tiles: TilePlan,
        scale: float,
        workspace: Workspace,
        out: Tensor,
    ) -> None:
        """Rows without a tile keep what `out` had."""
        assert rows_packed(q) and pool.is_contiguous() and out.is_contiguous()
        heads, rank, nope = key_up.shape
        call(
            self.functions,
            "mla_extend",
            (q, pool, key_up, value_up, out),
            q.data_ptr(),
            q.stride(0),
            q.stride(1),
            pool.data_ptr(),
            pool.shape[1],
            rank + q.shape[2] - nope,
            key_up.data_ptr(),
            value_up.data_ptr(),
            heads,
            rank,
            nope,
            q.shape[2] - nope,
            value_up.shape[1],
            q.shape[0],
            tiles.count,
            *tiles.addresses[:7],
            tiles.merge_rows.size,
            tiles.addresses[7],
            scale,
            out.data_ptr(),
            in_fp8(pool),
            torch.get_num_threads(),
        )


def _steps(width: int) -> int:
    """In whole steps of a tile."""
    return -(-width // TILE_INPUTS) * TILE_INPUTS


def _specs(form: native.Form) -> tuple[KernelSpec, ...]:
    kernels = TileKernels(form)
    calls: dict[str, Callable[..., Any]] = {
        "linear": kernels.linear,
        "heads_linear": kernels.heads_linear,
        "experts": kernels.experts,
        "mla_rows": kernels.mla_rows,
        "mla_extend": kernels.mla_extend,
        "gqa_rows": kernels.gqa_rows,
        "gqa_extend": kernels.gqa_extend,
    }
    return tuple(
        KernelSpec(
            op=op,
            name=f"{form.name}-bf16",
            dtypes=frozenset({"bfloat16"}),
            device="cpu",
            call=run,
            priority=PRIORITY[form],
            features=frozenset({form.feature}),
            layout="tiles",
            recordable=not op.endswith("_extend"),
            extend_from=EXTEND_FROM.get((form, op)),
        )
        for op, run in calls.items()
    )


SPECS: tuple[KernelSpec, ...] = tuple(spec for form in PRIORITY if form in native.forms_here() for spec in _specs(form))

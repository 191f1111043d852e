"""Ops of the cache in 8 bits on torch: right for any format of activations and any number of rows, not fast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from agentspeed_kernels.cpu import torch_attention, torch_fused, torch_grouped, torch_kernels
from agentspeed_kernels.fp8_cache import LEAST_HEAD
from agentspeed_kernels.packing import Packed
from agentspeed_kernels.signature import Dtype, KernelSpec, Widths
from agentspeed_kernels.tiles import TilePlan
from agentspeed_kernels.workspace import Workspace


def mla_extend_of_tiles(
    q: Tensor,
    pool: Tensor,
    key_up: Packed,
    value_up: Packed,
    tiles: TilePlan,
    scale: float,
    workspace: Workspace,
    out: Tensor,
) -> None:
    """Where the model's weights are packed: those of one layer are taken back for each call."""
    torch_attention.mla_extend(q, pool, key_up.whole(), value_up.whole(), tiles, scale, workspace, out)


def mla_queries_of_tiles(
    q: Tensor,
    raw: Tensor,
    gain: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    key_up: Packed,
    pool: Tensor,
    out: Tensor,
) -> None:
    """As above."""
    torch_fused.mla_queries(q, raw, gain, eps, cos, sin, slots, key_up.whole(), pool, out)


_FORMATS: frozenset[Dtype] = frozenset({"float32", "float64", "bfloat16"})
_HEADS = {"W": Widths(least=LEAST_HEAD)}
_CALLS: dict[str, tuple[Callable[..., Any], dict[str, Widths]]] = {
    "latent_append": (torch_kernels.latent_append, {}),
    "mla_rows": (torch_attention.mla_rows, {}),
    "mla_extend": (torch_attention.mla_extend, {}),
    "mla_queries": (torch_fused.mla_queries, {}),
    "qkv_append": (torch_grouped.qkv_append, _HEADS),
    "gqa_rows": (torch_grouped.gqa_rows, _HEADS),
    "gqa_extend": (torch_grouped.gqa_extend, _HEADS),
    "copy_rows": (torch_fused.copy_rows, {}),
    "gather_pages": (torch_fused.gather_pages, {}),
    "scatter_pages": (torch_fused.scatter_pages, {}),
}
_OF_TILES: dict[str, Callable[..., Any]] = {"mla_extend": mla_extend_of_tiles, "mla_queries": mla_queries_of_tiles}
_FP8 = frozenset({"fp8"})

SPECS: tuple[KernelSpec, ...] = (
    *(
        KernelSpec(
            op=op, name="torch-fp8-cache", dtypes=_FORMATS, device="cpu", call=call, priority=0, cache=_FP8, sizes=sizes
        )
        for op, (call, sizes) in _CALLS.items()
    ),
    *(
        KernelSpec(
            op=op,
            name="torch-fp8-cache-tiles",
            dtypes=frozenset({"bfloat16"}),
            device="cpu",
            call=call,
            priority=1,
            cache=_FP8,
            layout="tiles",
        )
        for op, call in _OF_TILES.items()
    ),
)

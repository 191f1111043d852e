"""The C kernels as entries of the registry: float32, and mostly a few rows, where torch stays far from memory speed."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from agentspeed_kernels.cpu import native, native_extend
from agentspeed_kernels.routing import RouteRule
from agentspeed_kernels.signature import KernelSpec
from agentspeed_kernels.tiles import TilePlan
from agentspeed_kernels.workspace import Workspace

GROUP = 64
"""`GROUP` of native_mla.c: scratch rows a thread needs."""
MOST_PRODUCT_ROWS = 8
"""Above this the BLAS of torch is faster; the C code itself takes 16."""
MOST_ATTENTION_ROWS = 512


class NotBuilt(RuntimeError):
    """A native kernel was called though selection found the library absent."""


@cache
def _functions() -> dict[str, Any]:
    library = native.library()
    if isinstance(library, native.Unavailable):
        raise NotBuilt(library.reason)
    return library.functions


def _function(op: str) -> Any:
    return _functions()[op]


def _rows_packed(*tensors: Tensor) -> bool:
    return all(tensor.stride(-1) == 1 for tensor in tensors)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    assert _rows_packed(x, out) and weight.is_contiguous()
    _function("linear")(
        x.data_ptr(),
        x.stride(0),
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        out.stride(0),
        x.shape[0],
        *weight.shape,
        torch.get_num_threads(),
    )


def heads_linear(x: Tensor, weight: Tensor, out: Tensor) -> None:
    assert _rows_packed(x, out) and weight.is_contiguous()
    _function("heads_linear")(
        x.data_ptr(),
        x.stride(0),
        x.stride(1),
        weight.data_ptr(),
        out.data_ptr(),
        out.stride(0),
        out.stride(1),
        x.shape[0],
        *weight.shape,
        torch.get_num_threads(),
    )


def experts(
    x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor, workspace: Workspace, out: Tensor
) -> None:
    assert x.is_contiguous() and gate_up.is_contiguous() and down.is_contiguous() and out.is_contiguous()
    assert ids.is_contiguous() and weights.is_contiguous()
    count, hidden, inner = down.shape
    pairs = ids.numel()
    act = workspace.take("expert_act", (pairs, inner), torch.float32)
    order = workspace.take("expert_order", (pairs + count + 1,), torch.int32)
    _function("experts")(
        x.data_ptr(),
        gate_up.data_ptr(),
        down.data_ptr(),
        ids.data_ptr(),
        weights.data_ptr(),
        act.data_ptr(),
        order.data_ptr(),
        order.data_ptr() + 4 * pairs,
        out.data_ptr(),
        x.shape[0],
        ids.shape[1],
        count,
        inner,
        hidden,
        torch.get_num_threads(),
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    assert _rows_packed(x, out)
    _function("rms_norm")(
        x.data_ptr(),
        x.stride(0),
        weight.data_ptr(),
        eps,
        out.data_ptr(),
        out.stride(0),
        *x.shape,
        torch.get_num_threads(),
    )


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    assert x.is_contiguous() and residual.is_contiguous() and out.is_contiguous()
    _function("add_rms_norm")(
        x.data_ptr(),
        residual.data_ptr(),
        weight.data_ptr(),
        eps,
        out.data_ptr(),
        *x.shape,
        torch.get_num_threads(),
    )


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    assert _rows_packed(x) and cos.is_contiguous() and sin.is_contiguous()
    _function("rope")(
        x.data_ptr(),
        x.stride(0),
        x.stride(1),
        cos.data_ptr(),
        sin.data_ptr(),
        x.shape[0],
        x.shape[1],
        cos.shape[1],
        torch.get_num_threads(),
    )


def latent_append(
    raw: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, slots: Tensor, pool: Tensor
) -> None:
    assert _rows_packed(raw) and cos.is_contiguous() and sin.is_contiguous()
    assert pool.is_contiguous() and slots.is_contiguous()
    _function("latent_append")(
        raw.data_ptr(),
        raw.stride(0),
        weight.data_ptr(),
        eps,
        cos.data_ptr(),
        sin.data_ptr(),
        slots.data_ptr(),
        pool.data_ptr(),
        raw.shape[0],
        weight.shape[0],
        cos.shape[1],
        torch.get_num_threads(),
    )


def route(x: Tensor, weight: Tensor, bias: Tensor | None, rule: RouteRule) -> tuple[Tensor, Tensor]:
    assert x.is_contiguous() and weight.is_contiguous()
    experts_count = weight.shape[0]
    scratch = torch.empty(3 * experts_count, dtype=torch.float32)
    kept = torch.empty(rule.groups, dtype=torch.int64)
    ids = torch.empty(x.shape[0], rule.top, dtype=torch.int64)
    weights = torch.empty(x.shape[0], rule.top, dtype=torch.float32)
    _function("route")(
        x.data_ptr(),
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        scratch.data_ptr(),
        kept.data_ptr(),
        ids.data_ptr(),
        weights.data_ptr(),
        *x.shape,
        experts_count,
        rule.top,
        rule.groups,
        rule.top_groups,
        rule.score == "softmax",
        rule.group_score == "top2",
        rule.normalise,
        rule.scale,
    )
    return ids, weights


def mla_rows(q: Tensor, pool: Tensor, tiles: TilePlan, scale: float, workspace: Workspace, out: Tensor) -> None:
    assert _rows_packed(q) and pool.is_contiguous() and out.is_contiguous()
    heads, width, rank = q.shape[1], q.shape[2], out.shape[2]
    threads = torch.get_num_threads()
    partials = workspace.take("mla_partials", (tiles.entries * heads, rank + 2), torch.float32)
    scratch = workspace.take("mla_scratch", (threads, GROUP, width + rank), torch.float32)
    _function("mla_rows")(
        q.data_ptr(),
        q.stride(0),
        q.stride(1),
        pool.data_ptr(),
        pool.shape[1],
        width,
        rank,
        heads,
        tiles.count,
        *tiles.addresses[:7],
        tiles.merge_rows.size,
        *tiles.addresses[7:],
        scale,
        partials.data_ptr(),
        tiles.entries,
        scratch.data_ptr(),
        out.data_ptr(),
        threads,
    )


def mla_extend(*arguments: Any) -> None:
    native_extend.mla_extend(_functions(), *arguments)


SPECS: tuple[KernelSpec, ...] = tuple(
    KernelSpec(
        op=op,
        name="native",
        dtypes=frozenset({"float32"}),
        device="cpu",
        call=call,
        priority=10,
        features=frozenset({native.FEATURE}),
        most_rows=most_rows,
    )
    for op, call, most_rows in (
        ("linear", linear, MOST_PRODUCT_ROWS),
        ("heads_linear", heads_linear, MOST_PRODUCT_ROWS),
        ("experts", experts, MOST_PRODUCT_ROWS),
        ("mla_rows", mla_rows, MOST_ATTENTION_ROWS),
        ("mla_extend", mla_extend, None),
        ("rms_norm", rms_norm, None),
        ("add_rms_norm", add_rms_norm, None),
        ("rope", rope, None),
        ("latent_append", latent_append, None),
        ("route", route, MOST_PRODUCT_ROWS),
    )
)

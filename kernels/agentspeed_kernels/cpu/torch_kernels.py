"""Every op on torch: right for any format and any number of rows, fast where matrix products dominate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from agentspeed_kernels.cpu import torch_attention, torch_grouped, torch_sparse
from agentspeed_kernels.fp8_cache import latent_row
from agentspeed_kernels.routing import RouteRule
from agentspeed_kernels.signature import Dtype, KernelSpec
from agentspeed_kernels.workspace import Workspace


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, weight.T, out=out)
    else:
        torch.addmm(bias, x, weight.T, out=out)


def heads_linear(x: Tensor, weight: Tensor, out: Tensor) -> None:
    result = torch.bmm(x.transpose(0, 1), weight.transpose(1, 2))
    out.copy_(result.transpose(0, 1))


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    wide = _wide(x)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
    torch.mul((wide * scale).to(x.dtype), weight, out=out)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    residual.add_(x)
    rms_norm(residual, weight, eps, out)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    half = x.shape[-1] // 2
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    low, high = x[..., :half].clone(), x[..., half:].clone()
    x[..., :half] = low * cos - high * sin
    x[..., half:] = high * cos + low * sin


def latent_append(
    raw: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, slots: Tensor, pool: Tensor
) -> None:
    rank = weight.shape[0]
    row = raw.clone()
    rms_norm(raw[:, :rank], weight, eps, out=row[:, :rank])
    rope(row[:, None, rank:], cos, sin)
    if pool.dtype == torch.uint8:
        row = latent_row(rank, row.shape[1] - rank).coded(row)
    # A negative slot writes nothing: such a row does again what the first one with a slot does, or leaves row 0 as it
    # is where there is none. Nothing here waits for a device.
    live = slots >= 0
    first = live.int().argmax(0, keepdim=True)
    slot = slots[first].clamp(min=0)
    value = torch.where(live[first].unsqueeze(1), row[first], pool[slot])
    pool.index_copy_(0, torch.where(live, slots, slot), torch.where(live.unsqueeze(1), row, value))


def route(x: Tensor, weight: Tensor, bias: Tensor | None, rule: RouteRule) -> tuple[Tensor, Tensor]:
    logits = _wide(x) @ weight.T
    scores = logits.sigmoid() if rule.score == "sigmoid" else logits.softmax(-1)
    choice = scores if bias is None else scores + bias
    if rule.groups > 1:
        choice = _keep_groups(choice, rule)
    ids = choice.topk(rule.top, dim=-1).indices
    weights = scores.gather(1, ids)
    if rule.normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return ids, weights.mul_(rule.scale)


def _keep_groups(choice: Tensor, rule: RouteRule) -> Tensor:
    grouped = choice.view(choice.shape[0], rule.groups, -1)
    worth = grouped.amax(-1) if rule.group_score == "max" else grouped.topk(2, dim=-1).values.sum(-1)
    kept = worth.topk(rule.top_groups, dim=-1).indices
    outside = torch.ones_like(worth, dtype=torch.bool).scatter_(1, kept, False)
    return grouped.masked_fill(outside.unsqueeze(-1), float("-inf")).view_as(choice)


def experts(
    x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor, workspace: Workspace, out: Tensor
) -> None:
    def run(rows: Tensor, expert: int) -> Tensor:
        return swiglu(rows, gate_up[expert], down[expert])

    each_expert(x, gate_up.shape[0], run, ids, weights, out)


def each_expert(
    x: Tensor, experts: int, run: Callable[[Tensor, int], Tensor], ids: Tensor, weights: Tensor, out: Tensor
) -> None:
    """Tokens are sorted by expert, so `run` (rows, expert) is called once for each expert that is hit. An id past the
    last, whose weight is 0, is nobody."""
    if experts == 1:
        # Rows of a rank with one expert may have chosen others: their weights are 0 here.
        torch.mul(run(x, 0), weights.sum(1, keepdim=True).to(x.dtype), out=out)
        return
    top = ids.shape[1]
    flat = ids.reshape(-1)
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=experts)[:experts].tolist()
    shares = weights.reshape(-1)[order].unsqueeze(1).to(x.dtype)
    tokens = torch.div(order, top, rounding_mode="floor")
    out.zero_()
    at = 0
    for expert, count in enumerate(counts):
        if count:
            mine = tokens[at : at + count]
            out.index_add_(0, mine, run(x[mine], expert).mul_(shares[at : at + count]))
            at += count


def swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Of one expert, for all rows."""
    gate, up = (x @ gate_up.T).chunk(2, dim=-1)
    return torch.nn.functional.silu(gate).mul_(up) @ down.T


def _wide(x: Tensor) -> Tensor:
    """Sums of squares and router scores are taken in at least float32."""
    return x if x.dtype == torch.float64 else x.float()


_FORMATS: frozenset[Dtype] = frozenset({"float32", "float64", "bfloat16"})

_CALLS: dict[str, Callable[..., Any]] = {
    "linear": linear,
    "heads_linear": heads_linear,
    "rms_norm": rms_norm,
    "add_rms_norm": add_rms_norm,
    "rope": rope,
    "latent_append": latent_append,
    "route": route,
    "experts": experts,
    "mla_rows": torch_attention.mla_rows,
    "mla_extend": torch_attention.mla_extend,
    "qkv_append": torch_grouped.qkv_append,
    "gqa_rows": torch_grouped.gqa_rows,
    "gqa_extend": torch_grouped.gqa_extend,
    "index_append": torch_sparse.index_append,
    "index_select": torch_sparse.index_select,
    "mla_selected": torch_sparse.mla_selected,
}

SPECS: tuple[KernelSpec, ...] = tuple(
    KernelSpec(op=op, name="torch", dtypes=_FORMATS, device="cpu", call=call, priority=0) for op, call in _CALLS.items()
)

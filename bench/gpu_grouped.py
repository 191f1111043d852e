"""Sections of bench/gpu.py: grouped-query attention in Qwen3-8B's shapes, and the products beside it in a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gpu_checks import Size, check
from gpu_graphs import Branches
from gpu_layers import bf16, weights
from gpu_timing import DEVICE, Report, fail, limit_us, relative, rotated

from agentspeed_engine.models.inputs import Run
from agentspeed_kernels.ops import OPS
from agentspeed_kernels.signature import Dtype
from agentspeed_kernels.triton import attention, backend, extend, grouped, kernels, specs
from agentspeed_kernels.workspace import Workspace

HEADS, GROUPS, WIDTH, PAGE = 32, 8, 128, 64
HIDDEN, INNER, VOCABULARY = 4096, 12_288, 151_936
SCALE = WIDTH**-0.5
POOL_BYTES, MOST_LAYERS = 6e9, 24
OPS_HERE = ("qkv_append", "gqa_rows", "gqa_extend")
SIZES: dict[Dtype, tuple[Size, ...]] = {"bfloat16": ("wide",), "float32": ("small",)}
CASES: dict[str, tuple[Branches, float | None]] = {
    "1 branch at 4 k": (Branches(1, 4096, forked=False), None),
    "1 branch at 32 k": (Branches(1, 32_768, forked=False), 0.55),
    "8 branches at 4 k": (Branches(8, 4096, forked=False), 0.5),
    "8 forks at 4 k": (Branches(8, 4096), None),
    "8 forks at 32 k": (Branches(8, 32_768), 0.5),
    "32 branches at 4 k": (Branches(32, 4096, forked=False), 0.65),
}
"""With the least share of the limit, which is keys and values read once."""
AT = 100
"""Tokens of each branch beside the shared ones."""


def section_check(report: Report) -> None:
    """Errors against the definitions in float64, of hostile inputs too."""
    check(report, "grouped", [spec for spec in specs.SPECS if spec.op in OPS_HERE], SIZES)


def section_rows(report: Report) -> None:
    """Microseconds in a graph, beside torch's SDPA on dense tensors."""
    for label, (case, must) in CASES.items():
        _rows(report, label, case, must)
        torch.cuda.empty_cache()


def section_extend(report: Report) -> None:
    """New tokens of one branch on a cached context, and from how many on a long extend is worth it."""
    for count in (64, 128, 256, 512, 2048):
        _extend(report, count, 4096)


class Pools:
    """Keys and values of several layers, so that no call finds in the caches what another one read."""

    def __init__(self, pages: int) -> None:
        one = 4 * pages * PAGE * GROUPS * WIDTH
        self.layers = int(min(MOST_LAYERS, max(2, POOL_BYTES // one)))
        shape = (self.layers, pages, PAGE, GROUPS * WIDTH)
        self.keys, self.values = (torch.empty(shape, device=DEVICE, dtype=torch.bfloat16).normal_() for _ in range(2))

    def dense(self, layer: int, runs: Sequence[Run]) -> tuple[torch.Tensor, torch.Tensor]:
        """[1, G, tokens, W] of what `runs`, one after another, name."""
        found = []
        for pool in (self.keys[layer], self.values[layer]):
            parts = [
                pool[torch.from_numpy(run.pages).long().to(DEVICE)].view(-1, GROUPS, WIDTH)[: run.tokens]
                for run in runs
            ]
            found.append(torch.cat(parts).transpose(0, 1).unsqueeze(0).contiguous())
        return found[0], found[1]


def _rows(report: Report, label: str, case: Branches, must: float | None) -> None:
    pools, step = Pools(case.pages), case.step(AT)
    q, out = bf16(case.count, HEADS, WIDTH), bf16(case.count, HEADS, WIDTH)
    shape = backend.grouped_shape_of(HEADS, GROUPS, WIDTH, PAGE, DEVICE)
    plan, workspace = attention.prepare(step.runs, step.positions, shape, DEVICE), Workspace(DEVICE)

    def call(layer: int) -> None:
        grouped.gqa_rows(q, pools.keys[layer], pools.values[layer], plan, SCALE, workspace, out)

    call(0)
    shared = [run for run in step.runs if not run.causal]
    own = [[*shared, run] for run in step.runs if run.causal]
    error = max(_apart(q[row : row + 1], out[row : row + 1], *pools.dense(0, own[row])) for row in {0, case.count - 1})
    tokens = sum(run.tokens for run in step.runs)
    sizes = {"T": case.count, "H": HEADS, "G": GROUPS, "W": WIDTH, "C": tokens}
    limit = limit_us(OPS["gqa_rows"].cost(sizes, 2).bytes, 0)
    taken = rotated(call, pools.layers, limit * 2)
    figures: dict[str, Any] = {"form": f"{plan.form.block_rows}x{plan.form.tile}", "programs": plan.plan.programs}
    if len(own) * own[0][-1].tokens <= 300_000:
        figures["sdpa_us"] = _sdpa(pools, q, own)
    bound = {"met": error < 2e-2} if must is None else {"must": must, "met": limit / taken >= must and error < 2e-2}
    report.add("grouped", f"rows, {label}", us=taken, limit_us=limit, share=limit / taken, error=error, **figures,
               **bound)  # fmt: skip


def _apart(q: torch.Tensor, out: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> float:
    """Of one query [1, H, W] that sees all keys [1, G, tokens, W]."""
    queries = q.double().view(GROUPS, -1, WIDTH)
    shares = (queries @ keys[0].double().transpose(1, 2) * SCALE).softmax(-1)
    return relative(out.view(GROUPS, -1, WIDTH), shares @ values[0].double())


def _sdpa(pools: Pools, q: torch.Tensor, own: Sequence[Sequence[Run]]) -> float:
    """torch's attention to the same keys and values, dense and repeated for each branch."""
    layers = min(pools.layers, 4)
    held = []
    for layer in range(layers):
        parts = [pools.dense(layer, runs) for runs in own]
        held.append([torch.cat(side) for side in zip(*parts, strict=True)])
    queries = q.view(len(own), 1, HEADS, WIDTH).transpose(1, 2)
    attend = torch.nn.functional.scaled_dot_product_attention
    return rotated(lambda i: attend(queries, held[i][0], held[i][1], scale=SCALE, enable_gqa=True), layers, 40.0)


def _extend(report: Report, count: int, context: int) -> None:
    """`count` new tokens of one branch: as a long extend, as rows, and torch's attention to dense keys."""
    pages = -(-(context + count) // PAGE)
    pools = Pools(pages)
    run = Run(
        pages=np.arange(pages, dtype=np.int32), start=0, tokens=context + count,
        queries=np.arange(count, dtype=np.int32), causal=True,
    )  # fmt: skip
    positions = np.arange(context, context + count)
    q, out, workspace = bf16(count, HEADS, WIDTH), bf16(count, HEADS, WIDTH), Workspace(DEVICE)
    step = extend.prepare_extend([run], positions, PAGE, HEADS, DEVICE)

    def call(layer: int) -> None:
        grouped.gqa_extend(q, pools.keys[layer], pools.values[layer], step, SCALE, workspace, out)

    call(0)
    keys, values = pools.dense(0, [run])
    last = slice(count - 1, count)
    error = _apart(q[last], out[last], keys, values)
    sizes = {"T": count, "H": HEADS, "G": GROUPS, "W": WIDTH, "C": context + count // 2}
    cost = OPS["gqa_extend"].cost(sizes, 2)
    limit = limit_us(cost.bytes, cost.flops)
    figures: dict[str, Any] = {"us": rotated(call, 2, limit * 3)}
    if count <= 512:
        shape = backend.grouped_shape_of(HEADS, GROUPS, WIDTH, PAGE, DEVICE)
        plan = attention.prepare([run], positions, shape, DEVICE)
        figures["rows_us"] = rotated(
            lambda layer: grouped.gqa_rows(q, pools.keys[layer], pools.values[layer], plan, SCALE, workspace, out),
            2,
            limit * 3,
        )
    figures["sdpa_us"] = _sdpa_extend(q, keys, values)
    report.add("grouped", f"extend, {count} on {context}", **figures, limit_us=limit, share=limit / figures["us"],
               error=error, met=error < 2e-2)  # fmt: skip


def _sdpa_extend(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> float:
    from torch.nn.attention.bias import causal_lower_right

    queries = q.transpose(0, 1).unsqueeze(0)
    # Repeated beforehand: not every form of it takes fewer heads of keys together with this mask.
    repeated = [side.repeat_interleave(HEADS // GROUPS, 1) for side in (keys, values)]
    mask: Any = causal_lower_right(q.shape[0], keys.shape[2])
    attend = torch.nn.functional.scaled_dot_product_attention
    try:
        return rotated(lambda _: attend(queries, *repeated, attn_mask=mask, scale=SCALE), 1, 200.0)
    except RuntimeError as error:
        fail(f"torch's attention: {error}")
        return float("nan")


def section_append(report: Report) -> None:
    """Rows of a decode step, of a batch and of a prompt."""
    for rows in (1, 32, 2048):
        qkv, gain = bf16(rows, HEADS + 2 * GROUPS, WIDTH), bf16(WIDTH)
        cos, sin, slots = bf16(rows, WIDTH // 2), bf16(rows, WIDTH // 2), torch.arange(rows, device=DEVICE)
        q, pools = bf16(rows, HEADS, WIDTH), [bf16(64, PAGE, GROUPS * WIDTH) for _ in range(2)]
        taken = rotated(
            lambda _, a=(qkv, gain, gain, 1e-6, cos, sin, slots, q, *pools): grouped.qkv_append(*a), 1, 5.0, 200
        )
        cost = OPS["qkv_append"].cost({"T": rows, "H": HEADS, "G": GROUPS, "W": WIDTH}, 2)
        report.add("grouped", f"qkv_append T{rows}", us=taken, limit_us=limit_us(cost.bytes, 0))


def section_products(report: Report) -> None:
    """What else a layer of Qwen3-8B does, and its head: most of what a decode step waits for."""
    copies, workspace, gain = 6, Workspace(DEVICE), bf16(HIDDEN)
    wide = (HEADS + 2 * GROUPS) * WIDTH
    qkv, o = weights(copies, wide, HIDDEN), weights(copies, HIDDEN, HEADS * WIDTH)
    gate_up, down = weights(copies, 1, 2 * INNER, HIDDEN), weights(copies, 1, HIDDEN, INNER)
    head = weights(VOCABULARY, HIDDEN)
    for rows in (1, 2, 8, 32):
        x, residual, total, out = (bf16(rows, HIDDEN) for _ in range(4))
        joined, logits = bf16(rows, wide), bf16(rows, VOCABULARY)
        ids, ones = torch.zeros(rows, 1, dtype=torch.int64, device=DEVICE), torch.ones(rows, 1, device=DEVICE)
        product = kernels.linear if rows <= kernels.MOST_LINEAR_ROWS else _vendor
        calls = {
            "add_norm_linear": (
                lambda i, x=x, s=residual, y=joined, t=total: kernels.add_norm_linear(
                    x, s, gain, 1e-6, qkv[i], None, y, t
                ),
                qkv[0].numel(),
            ),
            "output": (lambda i, x=x, y=out, product=product: product(x, o[i], None, y), o[0].numel()),
            "dense": (
                lambda i, x=x, y=out, ids=ids, ones=ones: kernels.experts(
                    x, gate_up[i], down[i], ids, ones, workspace, y
                ),
                gate_up[0].numel() + down[0].numel(),
            ),
            "head": (lambda _, x=x, y=logits, product=product: product(x, head, None, y), head.numel()),
        }
        for name, (call, numbers) in calls.items():
            taken, limit = rotated(call, copies, 20.0, 800), limit_us(2 * numbers, 0)
            report.add("grouped", f"{name} T{rows}", us=taken, limit_us=limit, share=limit / taken)


def _vendor(x: torch.Tensor, weight: torch.Tensor, bias: None, out: torch.Tensor) -> None:
    torch.mm(x, weight.T, out=out)

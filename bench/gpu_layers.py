"""Sections of bench/gpu.py but for decode attention: ceilings, experts, small kernels, sampling, extend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from gpu_attention import PAGE, RANK, ROPE, SCALE, WIDTH, Batch
from gpu_checks import check
from gpu_timing import DEVICE, Report, graph_time, limit_us, relative, rotated

from agentspeed_kernels.ops import OPS
from agentspeed_kernels.routing import RouteRule
from agentspeed_kernels.triton import attention, extend, kernels, sampling, specs
from agentspeed_kernels.workspace import Workspace

HIDDEN, HEADS, NOPE, VALUE, EXPERTS, INNER, TOP, VOCABULARY = 2048, 16, 128, 128, 64, 1408, 6, 102400
"""One layer of DeepSeek-V2-Lite."""
RULE = RouteRule(score="softmax", top=TOP, groups=1, top_groups=1, group_score="max", normalise=False, scale=1.0)


@triton.jit
def _read(x, o, n, BLOCK: tl.constexpr, UNROLL: tl.constexpr):
    program, programs = tl.program_id(0), tl.num_programs(0)
    at = tl.arange(0, BLOCK)
    held = tl.zeros((BLOCK,), tl.int32)
    for i in range(program, n, programs):
        base = x + i.to(tl.int64) * (BLOCK * UNROLL)
        for u in tl.static_range(UNROLL):
            held ^= tl.load(base + u * BLOCK + at)
    folded = tl.sum(held, 0)
    if folded == 123456789:
        tl.store(o + program, folded)


def section_ceilings(report: Report, pool: torch.Tensor) -> None:
    words, out = pool.view(-1).view(torch.int32), torch.zeros(1 << 16, dtype=torch.int32, device=DEVICE)
    count = words.numel() // 16384
    taken = graph_time([lambda: _read[(528,)](words, out, count, BLOCK=8192, UNROLL=2, num_warps=8)] * 3)
    report.add("ceilings", "read-only stream", tb_per_s=count * 16384 * 4 / taken / 1e6)
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    c = torch.empty_like(a)
    taken = graph_time([lambda: torch.mm(a, b, out=c)] * 3)
    report.add("ceilings", "product 8192^3, burst", tflops=2 * 8192**3 / taken / 1e6)


def section_check(report: Report) -> None:
    """Each kernel against its float64 definition on hostile inputs, at the sizes of a real model."""
    check(report, "layers", specs.SPECS, {"bfloat16": ("wide", "odd")})
    _check_sampling(report)


def _check_sampling(report: Report) -> None:
    """Draws equal the CPU's, over the real vocabulary, with every rule and with masks."""
    from agentspeed_engine.exec.sampler import draw
    from agentspeed_engine.protocol.messages import Sampling

    rng = np.random.default_rng(5)
    count = 48
    logits = torch.from_numpy(rng.normal(size=(count, VOCABULARY)) * 3).to(torch.bfloat16).to(DEVICE)
    asked = [
        Sampling(
            temperature=float(rng.choice([0, 0.3, 1.0, 1.7])),
            top_k=None if rng.random() < 0.5 else int(rng.integers(1, 200)),
            top_p=float(rng.choice([1.0, 0.95, 0.5])),
            min_p=float(rng.choice([0.0, 0.05])),
            logprobs=None if rng.random() < 0.5 else int(rng.integers(0, 21)),
        )
        for _ in range(count)
    ]
    masks = [None if rng.random() < 0.5 else rng.random(VOCABULARY) < 0.2 for _ in range(count)]
    keys = [(int(rng.integers(1 << 62)), i, 7 * i) for i in range(count)]
    positions = rng.integers(1, 100000, count).tolist()
    rows = sampling_rows(asked, masks, keys, positions)
    got = sampling.sample(logits, rows, Workspace(DEVICE))
    ids, chance, own_chance = got.ids.tolist(), got.logprob.tolist(), got.draw_logprob.tolist()
    top = got.top_ids.tolist()
    host = logits.float().cpu().numpy()
    wrong, wrong_chance = 0, 0.0
    for i in range(count):
        wanted = draw(host[i], asked[i], keys[i], positions[i], masks[i])
        wrong += wanted.id != ids[i]
        if wanted.logprob is not None:
            wrong += [number for number, _ in wanted.top] != top[i][: len(wanted.top)]
            wrong_chance = max(wrong_chance, abs(wanted.logprob - chance[i]))
            own = 0.0 if wanted.draw_logprob is None else wanted.draw_logprob
            wrong_chance = max(wrong_chance, abs(own - own_chance[i]))
    report.add("layers", "sampling equals the CPU's", rows=count, different=wrong, logprob_error=wrong_chance,
               met=wrong == 0 and wrong_chance < 1e-9)  # fmt: skip


def sampling_rows(asked: list[Any], masks: list[Any], keys: list[Any], positions: list[int]) -> sampling.SamplingRows:
    held = [mask for mask in masks if mask is not None]
    words = np.zeros((max(len(held), 1), -(-VOCABULARY // 32)), np.int32)
    for row, mask in zip(words, held, strict=False):
        row[:] = np.packbits(np.pad(mask, (0, row.size * 32 - mask.size)), bitorder="little").view(np.int32)
    numbers = np.cumsum([mask is not None for mask in masks]) - 1
    mask_row = [int(number) if mask is not None else -1 for number, mask in zip(numbers, masks, strict=True)]

    def column(values: list[Any], kind: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=kind, device=DEVICE)

    return sampling.SamplingRows(
        temperature=column([one.temperature for one in asked], torch.float64),
        top_k=column([one.top_k or 0 for one in asked], torch.int32),
        top_p=column([one.top_p for one in asked], torch.float64),
        min_p=column([one.min_p for one in asked], torch.float64),
        state=torch.from_numpy(sampling.noise_state(keys, positions)).to(DEVICE),
        mask_row=column(mask_row, torch.int32),
        asked=column([-1 if one.logprobs is None else one.logprobs for one in asked], torch.int32),
        mask_words=torch.from_numpy(words).to(DEVICE),
        changed_row=column([-1] * len(asked), torch.int32),
        changed=None,
    )


def bf16(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)


def weights(*shape: int) -> torch.Tensor:
    return bf16(*shape).mul_(shape[-1] ** -0.5)


def section_experts(report: Report) -> None:
    """Routed experts of one layer; the limit reads each hit expert once."""
    layers = 4
    gate_up, down = weights(layers, EXPERTS, 2 * INNER, HIDDEN), weights(layers, EXPERTS, HIDDEN, INNER)
    for tokens, must in ((1, 0.65), (2, None), (4, None), (8, None), (32, 0.55), (64, None), (128, None), (512, None)):
        x, out, workspace = (
            bf16(tokens, HIDDEN),
            torch.empty(tokens, HIDDEN, device=DEVICE, dtype=torch.bfloat16),
            Workspace(DEVICE),
        )
        ids = torch.stack([torch.randperm(EXPERTS)[:TOP] for _ in range(tokens)]).to(DEVICE)
        shares = torch.rand(tokens, TOP, device=DEVICE)
        sizes = {"T": tokens, "D": HIDDEN, "I": INNER, "top": TOP, "hit": ids.unique().numel()}
        cost = OPS["experts"].cost(sizes, 2)
        limit = limit_us(cost.bytes, cost.flops)

        def call(layer: int, x=x, ids=ids, shares=shares, workspace=workspace, out=out) -> None:
            kernels.experts(x, gate_up[layer], down[layer], ids, shares, workspace, out)

        taken = rotated(call, layers, limit * 1.5)
        _figure(report, "experts", f"T{tokens} hit {sizes['hit']}", limit, taken, must)


def _figure(report: Report, section: str, name: str, limit: float, taken: float, must: float | None = None) -> None:
    bound = {} if must is None else {"must": must, "met": limit / taken >= must}
    report.add(section, name, us=taken, limit_us=limit, share=limit / taken, **bound)


def section_small(report: Report) -> None:
    """Products of few rows, appends, routing, sampling, pages: times as nodes of a graph."""
    copies = 16
    workspace = Workspace(DEVICE)
    wide = HEADS * (NOPE + ROPE) + RANK + ROPE
    qkv, gain, o = weights(copies, wide, HIDDEN), bf16(HIDDEN), weights(copies, HIDDEN, HEADS * VALUE)
    up, value_up = weights(copies, HEADS, RANK, NOPE), weights(copies, HEADS, VALUE, RANK)
    router = torch.randn(copies, EXPERTS, HIDDEN, device=DEVICE)
    for rows in (1, 2, 4, 32):
        x, residual, total = bf16(rows, HIDDEN), bf16(rows, HIDDEN), bf16(rows, HIDDEN)
        out, mixed = bf16(rows, wide), bf16(rows, HEADS * VALUE)
        limit = limit_us(2 * wide * HIDDEN, 0)
        if rows <= kernels.MOST_LINEAR_ROWS:
            _small(
                report,
                f"add+norm+linear {wide}x{HIDDEN} T{rows}",
                limit,
                copies,
                lambda r, x=x, s=residual, t=total, y=out: kernels.add_norm_linear(
                    x, s, gain, 1e-6, qkv[r], None, y, t
                ),
            )
            _small(
                report,
                f"linear {HIDDEN}x{HIDDEN} T{rows}",
                limit_us(2 * HIDDEN * HIDDEN, 0),
                copies,
                lambda r, m=mixed, y=total: kernels.linear(m, o[r], None, y),
            )
        _small(
            report,
            f"torch.mm {wide}x{HIDDEN} T{rows}",
            limit,
            copies,
            lambda r, x=x, y=out: torch.mm(x, qkv[r].T, out=y),
        )
        _small(
            report,
            f"add_rms_norm T{rows}",
            0.0,
            1,
            lambda _, x=x, s=residual, t=total: kernels.add_rms_norm(x, s, gain, 1e-6, t),
        )
        q, absorbed = bf16(rows, HEADS, NOPE + ROPE), bf16(rows, HEADS, WIDTH)
        _small(
            report,
            f"heads_linear up T{rows}",
            limit_us(2 * HEADS * RANK * NOPE, 0),
            copies,
            lambda r, q=q, a=absorbed: kernels.heads_linear(q[:, :, :NOPE], up[r], a[:, :, :RANK]),
        )
        latent, joined = bf16(rows, HEADS, RANK), bf16(rows, HEADS, VALUE)
        _small(
            report,
            f"heads_linear down T{rows}",
            limit_us(2 * HEADS * RANK * VALUE, 0),
            copies,
            lambda r, a=latent, y=joined: kernels.heads_linear(a, value_up[r], y),
        )
        raw, pool, norm = bf16(rows, WIDTH), bf16(4096, WIDTH), bf16(RANK)
        cos, sin, slots = bf16(rows, ROPE // 2), bf16(rows, ROPE // 2), torch.arange(rows, device=DEVICE)
        _small(
            report,
            f"latent_append T{rows}",
            0.0,
            1,
            lambda _, a=(raw, norm, 1e-6, cos, sin, slots, pool): kernels.latent_append(*a),
        )
        _small(report, f"rope T{rows}", 0.0, 1, lambda _, a=(q[:, :, NOPE:], cos, sin): kernels.rope(*a))
        _small(
            report,
            f"route T{rows}",
            limit_us(4 * EXPERTS * HIDDEN, 0),
            copies,
            lambda r, x=x: kernels.route(x, router[r], None, RULE),
        )
    from agentspeed_engine.protocol.messages import Sampling

    for rows in (1, 32):
        logits = torch.randn(rows, VOCABULARY, device=DEVICE, dtype=torch.bfloat16) * 3
        for name, rule in (
            ("greedy", Sampling(temperature=0.0)),
            ("temperature", Sampling(temperature=1.0)),
            ("top-p 0.95", Sampling(temperature=0.8, top_p=0.95)),
            ("top-k 40, logprobs 5", Sampling(temperature=0.8, top_k=40, logprobs=5)),
        ):
            asked = sampling_rows([rule] * rows, [None] * rows, [(1, i, 2) for i in range(rows)], [5] * rows)
            _small(
                report,
                f"sample {name} B{rows}",
                limit_us(2 * rows * VOCABULARY, 0),
                1,
                lambda _, x=logits, a=asked: sampling.sample(x, a, workspace),
            )
    layers = torch.randn(27, 512, PAGE, WIDTH, device=DEVICE).to(torch.bfloat16)
    pages = torch.randperm(512, device=DEVICE, dtype=torch.int32)[:128]
    packed = torch.empty(27, 128, PAGE, WIDTH, device=DEVICE, dtype=torch.bfloat16)
    _small(
        report,
        "gather 128 pages of 27 layers",
        limit_us(2 * packed.numel() * 2, 0),
        1,
        lambda _: kernels.gather_pages(layers, pages, packed),
    )
    moves = torch.tensor([[i, 256 + i, 40] for i in range(8)], device=DEVICE, dtype=torch.int32)
    _small(report, "copy 8 pages of 27 layers", 0.0, 1, lambda _: kernels.copy_rows(layers, moves))


def _small(report: Report, name: str, limit: float, copies: int, call: Callable[[int], Any]) -> None:
    taken = rotated(call, copies, 5.0, budget_us=200)
    report.add("small", name, us=taken, **({"share": limit / taken} if limit else {}))


def section_extend(report: Report, pool: torch.Tensor) -> None:
    """New tokens on a cached context: decompressed against absorbed, and where one begins to win."""
    context = 32768
    for heads, counts in ((16, (64, 128, 192, 256, 384, 512, 1024, 2048)), (128, (512,))):
        key_up, value_up = weights(heads, RANK, NOPE), weights(heads, VALUE, RANK)
        for count in counts:
            _extend(report, pool, heads, count, context, key_up, value_up)


def _extend(
    report: Report, pool: torch.Tensor, heads: int, count: int, context: int, key_up: torch.Tensor,
    value_up: torch.Tensor,
) -> None:  # fmt: skip
    batch = Batch(pool, [context + count], heads, new=count)
    q = bf16(count, heads, NOPE + ROPE)
    out, workspace = (
        torch.full((count, heads, VALUE), float("nan"), device=DEVICE, dtype=torch.bfloat16),
        Workspace(DEVICE),
    )
    steps = [
        extend.prepare_extend(batch.pieces(r), batch.positions, PAGE, heads, DEVICE) for r in range(batch.rotations)
    ]
    extend.mla_extend(q, pool, key_up, value_up, steps[0], SCALE, workspace, out)
    picked = [0, count // 2, count - 1]
    error = relative(out[picked], _wanted_extend(batch, q, key_up, value_up, picked))
    cost = OPS["mla_extend"].cost(
        {"T": count, "C": context + count, "H": heads, "R": RANK, "rope": ROPE, "nope": NOPE, "value": VALUE}, 2
    )
    limit = limit_us(cost.bytes, cost.flops)
    taken = rotated(
        lambda r: extend.mla_extend(q, pool, key_up, value_up, steps[r], SCALE, workspace, out), 2, limit * 2
    )
    figures: dict[str, Any] = {}
    if count <= 512 and heads == 16:
        plans = batch.prepare()
        absorbed, mixed = bf16(count, heads, WIDTH), torch.empty_like(out)

        def few(rotation: int) -> None:
            kernels.heads_linear(q[:, :, :NOPE], key_up, absorbed[:, :, :RANK])
            absorbed[:, :, RANK:] = q[:, :, NOPE:]
            attention.mla_rows(absorbed, pool, plans[rotation], SCALE, workspace, batch.out)
            kernels.heads_linear(batch.out, value_up, mixed)

        figures["absorbed_us"] = rotated(few, 2, limit * 2)
    must = 0.35 if count >= 512 and heads == 16 else None
    bound = {} if must is None else {"must": must, "met": limit / taken >= must and error < 1e-2}
    report.add(
        "extend",
        f"H{heads} {count} on {context}",
        us=taken,
        limit_us=limit,
        share=limit / taken,
        error=error,
        **figures,
        **bound,
    )


def _wanted_extend(
    batch: Batch, q: torch.Tensor, key_up: torch.Tensor, value_up: torch.Tensor, picked: list[int]
) -> torch.Tensor:
    pages = torch.from_numpy(batch.sets[0][1][0]).long().to(DEVICE)
    latents = batch.pool[pages].reshape(-1, WIDTH)[: batch.lengths[0]].double()
    out = torch.empty(len(picked), batch.heads, VALUE, device=DEVICE, dtype=torch.float64)
    for head in range(batch.heads):
        keys = torch.cat([latents[:, :RANK] @ key_up[head].double(), latents[:, RANK:]], dim=1)
        values = latents[:, :RANK] @ value_up[head].double().T
        for n, i in enumerate(picked):
            seen = batch.lengths[0] - batch.new + i + 1
            out[n, head] = torch.softmax(q[i, head].double() @ keys[:seen].T * SCALE, -1) @ values[:seen]
    return out

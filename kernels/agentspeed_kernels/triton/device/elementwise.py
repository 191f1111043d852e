"""Norms, rotary turns, the paged write of latents, and moves of pages: kernels that are bandwidth and latency alone."""

from __future__ import annotations

import triton
import triton.language as tl

from agentspeed_kernels.triton.device.fp8_numbers import coded, decoded, scale_of, sizes


@triton.jit
def rms_norm(x, gain, out, x_stride, out_stride, eps, D: tl.constexpr, BLOCK: tl.constexpr):
    """out[t] = x[t] / rms(x[t]) * gain; one program a row."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside = d < D
    value = tl.load(x + row * x_stride + d, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / D + eps)
    value = value * scale * tl.load(gain + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + d, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def add_rms_norm(x, residual, gain, out, total, eps, D: tl.constexpr, BLOCK: tl.constexpr):
    """total = residual + x, rounded to its format; out = norm of what was stored. `total` may be the residual."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside = d < D
    value = tl.load(residual + row * D + d, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(x + row * D + d, mask=inside, other=0.0).to(tl.float32)
    rounded = value.to(total.dtype.element_ty)
    tl.store(total + row * D + d, rounded, mask=inside)
    value = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / D + eps)
    value = value * scale * tl.load(gain + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * D + d, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def rope(x, cos, sin, x_token, x_head, HEADS: tl.constexpr, HALF: tl.constexpr, H2: tl.constexpr, BLOCK: tl.constexpr):
    """Turns coordinate i with coordinate i + HALF in place; one program a token, H2 heads (padded) at once."""
    token = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    h = tl.arange(0, H2)
    inside = (i < HALF)[None, :] & (h < HEADS)[:, None]
    c = tl.load(cos + token * HALF + i, mask=i < HALF, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + token * HALF + i, mask=i < HALF, other=0.0).to(tl.float32)[None, :]
    at = x + token * x_token + h[:, None] * x_head + i[None, :]
    low = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, (low * c - high * s).to(x.dtype.element_ty), mask=inside)
    tl.store(at + HALF, (high * c + low * s).to(x.dtype.element_ty), mask=inside)


@triton.jit
def append_row(
    raw, gain, cos, sin, slot, pool, eps,
    RANK: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """One token's normed latent and turned rope part go to a row of the pool; a negative slot writes nothing.

    A pool of bytes has rows as `fp8_cache.latent_row`, of RANK and 2 * HALF that are multiples of 16."""
    d = tl.arange(0, BLOCK)
    inside = d < RANK
    value = tl.load(raw + d, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / RANK + eps)
    value = value * scale * tl.load(gain + d, mask=inside, other=0.0).to(tl.float32)
    i = tl.arange(0, BLOCK_HALF)
    half = i < HALF
    c = tl.load(cos + i, mask=half, other=0.0).to(tl.float32)
    s = tl.load(sin + i, mask=half, other=0.0).to(tl.float32)
    low = tl.load(raw + RANK + i, mask=half, other=0.0).to(tl.float32)
    high = tl.load(raw + RANK + HALF + i, mask=half, other=0.0).to(tl.float32)
    live = slot >= 0
    turned = low * c - high * s
    turned_high = high * c + low * s
    if pool.dtype.element_ty == tl.uint8:
        at = pool + slot.to(tl.int64) * (RANK + 16 + 4 * HALF)
        by = scale_of(tl.max(sizes(value), 0))
        tl.store(at + d, coded(value, 1.0 / by), mask=inside & live)
        tl.store((at + RANK).to(tl.pointer_type(tl.float32), bitcast=True), by, mask=live)
        plain = (at + RANK + 16).to(tl.pointer_type(tl.bfloat16), bitcast=True) + i
        tl.store(plain, turned.to(tl.bfloat16), mask=half & live)
        tl.store(plain + HALF, turned_high.to(tl.bfloat16), mask=half & live)
    else:
        at = pool + slot.to(tl.int64) * (RANK + 2 * HALF)
        tl.store(at + d, value.to(pool.dtype.element_ty), mask=inside & live)
        tl.store(at + RANK + i, turned.to(pool.dtype.element_ty), mask=half & live)
        tl.store(at + RANK + HALF + i, turned_high.to(pool.dtype.element_ty), mask=half & live)


@triton.jit
def latent_append(
    raw, gain, cos, sin, slots, pool, raw_stride, eps,
    RANK: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """`append_row` of every token; one program a token."""
    token = tl.program_id(0).to(tl.int64)
    append_row(
        raw + token * raw_stride, gain, cos + token * HALF, sin + token * HALF, tl.load(slots + token), pool, eps,
        RANK, HALF, BLOCK, BLOCK_HALF,
    )  # fmt: skip


@triton.jit
def copy_rows(pool, moves, layer_stride, page_stride, ROW: tl.constexpr, BLOCK: tl.constexpr):
    """moves [n, 3] int32 (from page, to page, rows): the first rows of a page in every layer. Grid (n, layers)."""
    move = tl.program_id(0)
    layer = pool + tl.program_id(1).to(tl.int64) * layer_stride
    source = tl.load(moves + move * 3).to(tl.int64)
    target = tl.load(moves + move * 3 + 1).to(tl.int64)
    count = tl.load(moves + move * 3 + 2) * ROW
    i = tl.arange(0, BLOCK)
    for at in range(0, count, BLOCK):
        inside = at + i < count
        value = tl.load(layer + source * page_stride + at + i, mask=inside)
        tl.store(layer + target * page_stride + at + i, value, mask=inside)


@triton.jit
def gather_pages(
    pool, pages, packed, layer_stride, packed_layer, SIZE: tl.constexpr, BLOCK: tl.constexpr, BACK: tl.constexpr
):
    """packed[layer, i] = pool[layer, pages[i]] (BACK: the other way). Grid (pages, layers); SIZE elements a page."""
    i = tl.program_id(0).to(tl.int64)
    layer = tl.program_id(1).to(tl.int64)
    page = tl.load(pages + i).to(tl.int64)
    there = pool + layer * layer_stride + page * SIZE
    here = packed + layer * packed_layer + i * SIZE
    j = tl.arange(0, BLOCK)
    for at in range(0, SIZE, BLOCK):
        inside = at + j < SIZE
        if BACK:
            tl.store(there + at + j, tl.load(here + at + j, mask=inside), mask=inside)
        else:
            tl.store(here + at + j, tl.load(there + at + j, mask=inside), mask=inside)


@triton.jit
def decode_pages(
    pool, pages, out, page_stride, HEADS: tl.constexpr, WIDTH: tl.constexpr, PLAIN: tl.constexpr, BYTES: tl.constexpr,
    SCALES_AT: tl.constexpr, PLAIN_AT: tl.constexpr, PAGE: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_PLAIN: tl.constexpr,
):  # fmt: skip
    """out[i * PAGE + t] = the numbers of row t of page pages[i] of a pool of bytes (`fp8_cache.CacheRow`), each head's
    and then the plain ones. Grid (pages, PAGE / TOKENS, HEADS)."""
    i = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(2)
    row = pool + tl.load(pages + i).to(tl.int64) * page_stride + t[:, None] * BYTES
    to = out + (i * PAGE + t[:, None]) * (HEADS * WIDTH + PLAIN)
    w = tl.arange(0, BLOCK)[None, :]
    by = tl.load((row + SCALES_AT).to(tl.pointer_type(tl.float32), bitcast=True) + head)
    value = decoded(tl.load(row + head * WIDTH + w, mask=w < WIDTH, other=0)) * by
    tl.store(to + head * WIDTH + w, value.to(out.dtype.element_ty), mask=w < WIDTH)
    if head == 0:
        x = tl.arange(0, BLOCK_PLAIN)[None, :]
        plain = (row + PLAIN_AT).to(tl.pointer_type(tl.bfloat16), bitcast=True) + x
        rest = tl.load(plain, mask=x < PLAIN, other=0.0)
        tl.store(to + HEADS * WIDTH + x, rest.to(out.dtype.element_ty), mask=x < PLAIN)

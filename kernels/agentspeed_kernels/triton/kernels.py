"""The Triton kernels under the signatures of the public ops."""

from __future__ import annotations

import torch
from torch import Tensor

from agentspeed_kernels.routing import RouteRule
from agentspeed_kernels.triton import launching
from agentspeed_kernels.triton.device_code import device_code
from agentspeed_kernels.triton.launching import block_of
from agentspeed_kernels.workspace import Workspace

MOST_LINEAR_ROWS = 1
"""Above this the vendor's products are faster."""
MOST_SCORED = 64
"""Up to this many tokens the router's scores are one small kernel."""
MOST_FEW_TOKENS = 4
"""Up to this many tokens each reads the experts it visits by itself."""
MOST_HEADS_FEW = 2
GATE_UP_ROWS, GATE_UP_WARPS = 2, 8
"""Of a program of the few-token form: inner rows and warps."""
DOWN_ROWS, DOWN_BLOCK, DOWN_WARPS = 4, 512, 4
"""Likewise of the down matrices of all of a token's experts: rows, columns at once, warps."""


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    elementwise = device_code("elementwise")

    assert x.stride(1) == 1 and out.stride(1) == 1
    rows, width = x.shape
    elementwise.rms_norm[(rows,)](
        x, weight, out, x.stride(0), out.stride(0), eps, D=width, BLOCK=block_of(width), num_warps=_warps(width)
    )


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    add_norm(x, residual, weight, eps, out, residual)


def add_norm(x: Tensor, residual: Tensor, gain: Tensor, eps: float, out: Tensor, total: Tensor) -> None:
    """`total` gets the sum, out its norm; `total` may be the residual."""
    elementwise = device_code("elementwise")

    assert x.is_contiguous() and residual.is_contiguous() and out.is_contiguous() and total.is_contiguous()
    rows, width = x.shape
    elementwise.add_rms_norm[(rows,)](
        x, residual, gain, out, total, eps, D=width, BLOCK=block_of(width), num_warps=_warps(width)
    )


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    elementwise = device_code("elementwise")

    assert x.stride(2) == 1 and cos.is_contiguous() and sin.is_contiguous()
    tokens, heads, _ = x.shape
    half = cos.shape[1]
    elementwise.rope[(tokens,)](
        x, cos, sin, x.stride(0), x.stride(1), HEADS=heads, HALF=half, H2=block_of(heads), BLOCK=block_of(half)
    )


def latent_append(
    raw: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, slots: Tensor, pool: Tensor
) -> None:
    """A negative slot writes nothing: rows that pad a graph's batch."""
    elementwise = device_code("elementwise")

    assert raw.stride(1) == 1 and pool.is_contiguous() and cos.is_contiguous() and sin.is_contiguous()
    rank, half = weight.shape[0], cos.shape[1]
    elementwise.latent_append[(raw.shape[0],)](
        raw, weight, cos, sin, slots, pool, raw.stride(0), eps,
        RANK=rank, HALF=half, BLOCK=block_of(rank), BLOCK_HALF=block_of(half), num_warps=_warps(rank),
    )  # fmt: skip


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """For few rows; each reads the weights by itself, from L2 after the first."""
    products = device_code("products")

    assert x.stride(1) == 1 and weight.is_contiguous() and out.stride(1) == 1
    rows, width = x.shape
    count = weight.shape[0]
    columns, block, warps = linear_shape(width, norm=False)
    early = launching.early(x)
    products.linear[(-(-count // columns), rows)](
        x, x, x, weight, bias if bias is not None else x, out, x, x.stride(0), out.stride(0), 0.0, rows, count,
        K=width, BN=columns, BK=block, NORM=False, BIAS=bias is not None, EARLY=early, num_warps=warps,
        **launching.options(early),
    )  # fmt: skip


def add_norm_linear(
    x: Tensor,
    residual: Tensor,
    gain: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    total: Tensor,
) -> None:
    """out = norm(x + residual) * gain @ weight^T; `total`, not the residual itself, gets the sum."""
    products = device_code("products")

    assert x.is_contiguous() and residual.is_contiguous() and weight.is_contiguous() and total.is_contiguous()
    assert total.data_ptr() != residual.data_ptr()
    rows, width = x.shape
    if rows > MOST_LINEAR_ROWS:
        normed = torch.empty_like(x)
        add_norm(x, residual, gain, eps, normed, total)
        if bias is None:
            torch.mm(normed, weight.T, out=out)
        else:
            torch.addmm(bias, normed, weight.T, out=out)
        return
    count = weight.shape[0]
    columns, block, warps = linear_shape(width, norm=True)
    early = launching.early(x)
    products.linear[(-(-count // columns), rows)](
        x, residual, gain, weight, bias if bias is not None else x, out, total, x.stride(0), out.stride(0), eps, rows,
        count, K=width, BN=columns, BK=block, NORM=True, BIAS=bias is not None, EARLY=early, num_warps=warps,
        **launching.options(early),
    )  # fmt: skip


def linear_shape(width: int, norm: bool) -> tuple[int, int, int]:
    """(rows of the weights, columns at once, warps) of a program."""
    block = min(block_of(width), 2048)
    if block < 512:
        return 16, block, 4
    return (4, block, 8) if norm else (2, block, 4)


def heads_linear(x: Tensor, weight: Tensor, out: Tensor) -> None:
    products = device_code("products")

    assert x.stride(2) == 1 and weight.is_contiguous() and out.stride(2) == 1
    tokens, heads, width = x.shape
    count = weight.shape[1]
    if tokens <= MOST_HEADS_FEW:
        strides = (x.stride(0), x.stride(1), out.stride(0), out.stride(1))
        columns, early = _head_columns(count, width), launching.early(x)
        products.heads_few[(-(-count // columns), heads, tokens)](
            x, weight, out, *strides, N=count, K=width, BN=columns, BK=block_of(width), EARLY=early, num_warps=4,
            **launching.options(early),
        )  # fmt: skip
        return
    heads_many(x, weight, out, 16 if tokens <= 16 else 32 if tokens <= 32 else 64)


def heads_many(x: Tensor, weight: Tensor, out: Tensor, block_t: int) -> None:
    """`heads_linear` by matrix instructions, in blocks of so many tokens."""
    products = device_code("products")

    tokens, heads, width = x.shape
    count = weight.shape[1]
    # Narrow blocks where there are few columns: programs enough to fill the device count for more than reuse.
    block_n = 32 if count <= 128 and tokens <= 64 else min(128, max(16, block_of(count)))
    block_k = min(64, max(16, block_of(width)))
    products.heads_many[(-(-tokens // block_t), -(-count // block_n), heads)](
        x,
        weight,
        out,
        x.stride(0),
        x.stride(1),
        out.stride(0),
        out.stride(1),
        tokens,
        N=count,
        K=width,
        BT=block_t,
        BN=block_n,
        BK=block_k,
        num_warps=4,
        num_stages=3,
    )


def _head_columns(count: int, width: int) -> int:
    return max(1, min(block_of(count), 8192 // block_of(width)))


def mla_queries(
    q: Tensor,
    raw: Tensor,
    gain: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    key_up: Tensor,
    pool: Tensor,
    out: Tensor,
) -> None:
    """Absorbed queries with their turned rope parts, and the paged write of latents; a negative slot writes nothing."""
    queries = device_code("queries")

    assert q.stride(2) == 1 and raw.stride(1) == 1 and pool.is_contiguous() and out.is_contiguous()
    assert key_up.is_contiguous() and cos.is_contiguous() and sin.is_contiguous()
    tokens, heads, _ = q.shape
    _, rank, nope = key_up.shape
    half = cos.shape[1]
    given = (q, raw, gain, cos, sin, slots)
    strides = (q.stride(0), q.stride(1), raw.stride(0), eps)
    sizes = {
        "HEADS": heads, "H2": block_of(heads), "RANK": rank, "NOPE": nope, "HALF": half, "BLOCK": block_of(rank),
        "BLOCK_HALF": block_of(half),
    }  # fmt: skip
    if tokens > MOST_HEADS_FEW:
        queries.turn_and_append[(tokens, 2)](*given, pool, out, *strides, **sizes, num_warps=4)
        heads_linear(q[:, :, :nope], key_up, out[:, :, :rank])
        return
    columns, early = _head_columns(rank, nope), launching.early(q)
    blocks = -(-rank // columns)
    queries.queries_few[(heads * blocks + 1, tokens)](
        *given, key_up, pool, out, *strides, **sizes, BN=columns, BLOCKS=blocks, BK=block_of(nope), EARLY=early,
        num_warps=4, **launching.options(early),
    )  # fmt: skip


def route(x: Tensor, weight: Tensor, bias: Tensor | None, rule: RouteRule) -> tuple[Tensor, Tensor]:
    """Scores in float32; ties go to the lower expert."""
    if x.shape[0] > MOST_SCORED:
        return _chosen(x.float() @ weight.T, bias, rule, None)
    return route_by_token(x, weight, bias, rule)


def route_by_token(x: Tensor, weight: Tensor, bias: Tensor | None, rule: RouteRule) -> tuple[Tensor, Tensor]:
    """`route`, whose scores are made for each token by itself."""
    tokens, width = x.shape
    device, early = device_code("experts"), launching.early(x)
    logits = torch.empty(tokens, weight.shape[0], dtype=torch.float32, device=x.device)
    device.scores[(-(-weight.shape[0] // 4), tokens)](
        x, x, x, weight, logits, x, x, x.stride(0), 0.0, E=weight.shape[0], D=width, BE=4,
        BD=min(block_of(width), 1024), NORM=False, EARLY=early, num_warps=4, **launching.options(early),
    )  # fmt: skip
    return _chosen(logits, bias, rule, None)


def add_norm_route(
    x: Tensor,
    residual: Tensor,
    gain: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    rule: RouteRule,
    slots: Tensor,
    normed: Tensor,
    total: Tensor,
) -> tuple[Tensor, Tensor]:
    """What `route` gives for the norm of x + residual; `total`, not the residual itself, gets the sum. Rows with a
    negative slot choose nobody."""
    assert x.is_contiguous() and residual.is_contiguous() and normed.is_contiguous() and total.is_contiguous()
    assert weight.is_contiguous() and total.data_ptr() != residual.data_ptr()
    tokens, width = x.shape
    if tokens > MOST_SCORED:
        add_norm(x, residual, gain, eps, normed, total)
        return _chosen(normed.float() @ weight.T, bias, rule, slots)
    device, early = device_code("experts"), launching.early(x)
    count, block = weight.shape[0], block_of(width)
    logits = torch.empty(tokens, count, dtype=torch.float32, device=x.device)
    rows = max(1, min(4, 8192 // block))
    device.scores[(-(-count // rows), tokens)](
        x, residual, gain, weight, logits, normed, total, x.stride(0), eps, E=count, D=width, BE=rows, BD=block,
        NORM=True, EARLY=early, num_warps=8 if block > 1024 else 4, **launching.options(early),
    )  # fmt: skip
    return _chosen(logits, bias, rule, slots)


def _chosen(logits: Tensor, bias: Tensor | None, rule: RouteRule, slots: Tensor | None) -> tuple[Tensor, Tensor]:
    device, early = device_code("experts"), launching.early(logits)
    tokens, count = logits.shape
    ids = torch.empty(tokens, rule.top, dtype=torch.int64, device=logits.device)
    weights = torch.empty(tokens, rule.top, dtype=torch.float32, device=logits.device)
    group = count // rule.groups
    device.choose[(tokens,)](
        logits, bias if bias is not None else logits, slots if slots is not None else ids, ids, weights, rule.scale,
        E=count, GROUP=group, GROUPS=rule.groups, PAD_GROUP=block_of(group), PAD_GROUPS=block_of(rule.groups),
        TOP=rule.top, PAD_TOP=block_of(rule.top), TOP_GROUPS=rule.top_groups, SIGMOID=rule.score == "sigmoid",
        BIAS=bias is not None, SUM_OF_TWO=rule.group_score == "top2", NORMALISE=rule.normalise,
        SLOTS=slots is not None, EARLY=early, num_warps=1 if count <= 128 else 4, **launching.options(early),
    )  # fmt: skip
    return ids, weights


def own(ids: Tensor, weights: Tensor, first: int, held: int) -> None:
    """`selection.Kernels.own` for kernels that visit nobody for the id `held`."""
    assert ids.is_contiguous() and weights.is_contiguous()
    early, pairs = launching.early(ids), ids.numel()
    device_code("experts").own[(-(-pairs // 256),)](
        ids, weights, pairs, first, HELD=held, BLOCK=256, EARLY=early, num_warps=2, **launching.options(early)
    )


def experts(
    x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor, workspace: Workspace, out: Tensor
) -> None:
    """The few-token form, the grouped form, or, for one expert and many tokens, the vendor's products."""
    _check_experts(x, gate_up, down, ids, weights, out)
    dense = gate_up.shape[0] == 1 and ids.shape[1] == 1 and x.is_cuda
    if dense and x.shape[0] > MOST_LINEAR_ROWS:
        torch.mul(_swiglu(x, gate_up[0], down[0], workspace), weights.to(x.dtype), out=out)
    elif x.shape[0] <= MOST_FEW_TOKENS:
        experts_few(x, gate_up, down, ids, weights, None, workspace, out)
    else:
        experts_grouped(x, gate_up, down, ids, weights, None, workspace, out)


def experts_and_shared(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    ids: Tensor,
    weights: Tensor,
    shared_gate_up: Tensor,
    shared_down: Tensor,
    workspace: Workspace,
    out: Tensor,
) -> None:
    """`experts`, and for every row the shared expert, whose matrices are [1, 2 S, D] and [1, D, S]."""
    _check_experts(x, gate_up, down, ids, weights, out)
    assert shared_gate_up.is_contiguous() and shared_down.is_contiguous()
    if x.shape[0] <= MOST_FEW_TOKENS:
        experts_few(x, gate_up, down, ids, weights, (shared_gate_up, shared_down), workspace, out)
    else:
        shared = _swiglu(x, shared_gate_up[0], shared_down[0], workspace)
        experts_grouped(x, gate_up, down, ids, weights, shared, workspace, out)


def _check_experts(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor, out: Tensor) -> None:
    assert x.is_contiguous() and gate_up.is_contiguous() and down.is_contiguous() and out.is_contiguous()
    assert ids.is_contiguous() and weights.is_contiguous()


def _swiglu(x: Tensor, gate_up: Tensor, down: Tensor, workspace: Workspace) -> Tensor:
    """Of one expert that every row visits: the vendor's products."""
    rows, inner = x.shape[0], down.shape[1]
    both = workspace.take("dense_gate_up", (rows, 2 * inner), x.dtype)
    torch.mm(x, gate_up.T, out=both)
    return torch.mm(activated(both, workspace), down.T, out=workspace.take("dense_out", (rows, x.shape[1]), x.dtype))


def activated(both: Tensor, workspace: Workspace) -> Tensor:
    """silu of the first half of each row [T, 2 I], times the second: [T, I] in scratch memory."""
    device = device_code("experts")

    rows, inner = both.shape[0], both.shape[1] // 2
    act = workspace.take("dense_inner", (rows, inner), both.dtype)
    block = min(block_of(inner), 1024)
    device.activate[(-(-inner // block), rows)](both, act, I=inner, BLOCK=block, num_warps=4)
    return act


def experts_few(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    ids: Tensor,
    weights: Tensor,
    shared: tuple[Tensor, Tensor] | None,
    workspace: Workspace,
    out: Tensor,
) -> None:
    """`shared`: its matrices of the expert that every row visits."""
    device, early = device_code("experts"), launching.early(x)

    count, width, inner = down.shape
    tokens, top = ids.shape
    shared_gate_up, shared_down = shared or (gate_up, down)
    beside = shared_down.shape[2] if shared is not None else 0
    act = workspace.take("expert_act", (tokens, top * inner + beside), torch.float32)
    rows = GATE_UP_ROWS
    device.gate_up_few[(top * -(-inner // rows) + -(-beside // rows), tokens)](
        x, gate_up, shared_gate_up, ids, act, E=count, TOP=top, D=width, I=inner, S=beside, BI=rows,
        BD=min(block_of(width), 2048), EARLY=early, num_warps=GATE_UP_WARPS, **launching.options(early),
    )  # fmt: skip
    block = min(block_of(inner), DOWN_BLOCK)
    rows = DOWN_ROWS if inner > 64 else 32
    device.down_few[(-(-width // rows), tokens)](
        act, down, shared_down, ids, weights, out, E=count, TOP=top, D=width, I=inner, S=beside, BN=rows, BI=block,
        EARLY=early, num_warps=DOWN_WARPS, **launching.options(early),
    )  # fmt: skip


def experts_grouped(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    ids: Tensor,
    weights: Tensor,
    shared: Tensor | None,
    workspace: Workspace,
    out: Tensor,
    most_rows: int | None = None,
) -> None:
    """`shared` [T, D]: what is added to every row. `most_rows`: of a block; None: what is fastest."""
    device = device_code("experts")

    count, width, inner = down.shape
    tokens, top = ids.shape
    pairs = tokens * top
    order, starts = arranged(ids, count, workspace)
    act = workspace.take("expert_inner", (pairs, inner), x.dtype)
    part = workspace.take("expert_part", (pairs, width), torch.float32)
    rows, columns, depth, warps, stages = grouped_shape(min(pairs / count, most_rows or pairs), x.element_size())
    blocks = -(-tokens // rows)
    device.gate_up_grouped[(-(-inner // columns), blocks, count)](
        x, gate_up, order, starts, act, TOP=top, D=width, I=inner, BM=rows, BI=columns, BD=depth, num_warps=warps,
        num_stages=stages,
    )  # fmt: skip
    device.down_grouped[(-(-width // columns), blocks, count)](
        act, down, order, starts, weights, part, D=width, I=inner, BM=rows, BN=columns, BI=depth, num_warps=warps,
        num_stages=stages,
    )  # fmt: skip
    combine(part, ids, shared, count, out)


def arranged(ids: Tensor, count: int, workspace: Workspace) -> tuple[Tensor, Tensor]:
    """The pairs (token, choice) of `count` experts one expert after the other, and where each one's begin."""
    pairs, block = ids.numel(), min(max(block_of(ids.numel()), 16), 1024)
    order = workspace.take("expert_order", (pairs,), torch.int32)
    starts = workspace.take("expert_starts", (count + 1,), torch.int32)
    device_code("experts").arrange[(count,)](ids, order, starts, pairs, E=count, BLOCK=block, num_warps=4)
    return order, starts


def combine(part: Tensor, ids: Tensor, added: Tensor | None, count: int, out: Tensor) -> None:
    """out = the sums of each token's pairs in `part` [pairs, D], and what is added to every row."""
    (tokens, top), width = ids.shape, out.shape[1]
    block = min(block_of(width), 1024)
    device_code("experts").combine[(-(-width // block), tokens)](
        part, ids, added if added is not None else part, out, E=count, TOP=top, D=width, BLOCK=block,
        SHARED=added is not None, num_warps=4,
    )  # fmt: skip


def grouped_shape(rows_an_expert: float, element_bytes: int = 2) -> tuple[int, int, int, int, int]:
    """(rows, columns, depth, warps, stages) of a program of the grouped form."""
    if element_bytes > 2:  # shared memory has no room for larger ones
        return (16, 64, 64, 4, 2) if rows_an_expert <= 16 else (32, 64, 32, 4, 2)
    if rows_an_expert <= 16:
        return 16, 64, 128, 4, 3
    if rows_an_expert <= 32:
        return 32, 64, 128, 4, 3
    return (64, 64, 64, 4, 4) if rows_an_expert <= 96 else (64, 128, 64, 8, 4)


def copy_rows(pool: Tensor, moves: Tensor) -> None:
    """`moves` [n, 3] int32 (from page, to page, rows) in every layer of `pool` [layers, pages, page_tokens, width].

    A page is written by one move and read by none that writes it: the order of moves does not matter."""
    elementwise = device_code("elementwise")

    layers, _, tokens, width = pool.shape
    elementwise.copy_rows[(moves.shape[0], layers)](
        pool, moves, pool.stride(0), tokens * width, ROW=width, BLOCK=4096, num_warps=8
    )


def gather_pages(pool: Tensor, pages: Tensor, packed: Tensor) -> None:
    """packed [layers, n, page_tokens, width] = the named pages of every layer."""
    _move_pages(pool, pages, packed, back=False)


def scatter_pages(pool: Tensor, pages: Tensor, packed: Tensor) -> None:
    """The named pages of every layer = packed [layers, n, page_tokens, width]."""
    _move_pages(pool, pages, packed, back=True)


def _move_pages(pool: Tensor, pages: Tensor, packed: Tensor, *, back: bool) -> None:
    elementwise = device_code("elementwise")

    layers, _, tokens, width = pool.shape
    elementwise.gather_pages[(pages.shape[0], layers)](
        pool, pages, packed, pool.stride(0), packed.stride(0), SIZE=tokens * width, BLOCK=4096, BACK=back, num_warps=8
    )


def _warps(width: int) -> int:
    return 8 if width > 4096 else 4 if width > 512 else 1

"""What each op means, written to be read; inputs of any format are taken to float64 first."""

from __future__ import annotations

import torch
from torch import Tensor

from agentspeed_kernels.fp8_cache import CacheRow, latent_row
from agentspeed_kernels.routing import RouteRule
from agentspeed_kernels.tiles import TilePlan


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = x.double() @ weight.double().T
    return y if bias is None else y + bias.double()


def heads_linear(x: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("thk,hnk->thn", x.double(), weight.double())


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.double()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.double()


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(normed, new residual)"""
    total = residual.double() + x.double()
    return rms_norm(total, weight, eps), total


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Coordinate i turns with coordinate i + width/2."""
    low, high = x.double().chunk(2, dim=-1)
    cos, sin = (angle.double().reshape(-1, *[1] * (x.dim() - 2), angle.shape[-1]) for angle in (cos, sin))
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


def latent_append(
    raw: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, slots: Tensor, pool: Tensor
) -> Tensor:
    """The pool after the rows are written; it is not changed itself. Of a pool in 8 bits what it stands for, and the
    rows as they are before they are taken to 8 bits."""
    rank = weight.shape[0]
    row = torch.cat([rms_norm(raw[:, :rank], weight, eps), rope(raw[:, rank:], cos, sin)], dim=-1)
    after = numbers_of(pool, latent_row(rank, row.shape[1] - rank)).clone()
    after[slots] = row
    return after


def numbers_of(pool: Tensor, row: CacheRow) -> Tensor:
    """float64: what the rows of a pool stand for."""
    return row.decoded(pool, torch.float64) if pool.dtype == torch.uint8 else pool.double()


def mla_rows(q: Tensor, pool: Tensor, tiles: TilePlan, scale: float, rank: int) -> Tensor:
    """Softmax attention of each row over the latents of all tokens it sees; a row that sees none gives zeros."""
    places, often = seen(tiles, q.shape[0], pool.shape[1])
    latents = numbers_of(pool, latent_row(rank, q.shape[2] - rank)).flatten(0, 1)[places]
    return shares(scale * torch.einsum("thd,cd->thc", q.double(), latents), often) @ latents[:, :rank]


def mla_extend(q: Tensor, pool: Tensor, key_up: Tensor, value_up: Tensor, tiles: TilePlan, scale: float) -> Tensor:
    """The same attention over keys and values that are decompressed from the latents first."""
    rank = key_up.shape[1]
    places, often = seen(tiles, q.shape[0], pool.shape[1])
    latents = numbers_of(pool, latent_row(rank, q.shape[2] - key_up.shape[2])).flatten(0, 1)[places]
    nope = torch.einsum("cr,hrn->chn", latents[:, :rank], key_up.double())
    turned = latents[:, None, rank:].expand(-1, nope.shape[1], -1)
    values = torch.einsum("cr,hvr->chv", latents[:, :rank], value_up.double())
    scores = scale * torch.einsum("thd,chd->thc", q.double(), torch.cat([nope, turned], dim=-1))
    return torch.einsum("thc,chv->thv", shares(scores, often), values)


def seen(tiles: TilePlan, rows: int, page_tokens: int) -> tuple[Tensor, Tensor]:
    """(Where in the pool the tokens are that any row sees, [rows, those] how often each row sees each of them)"""
    pages = int(tiles.pages.max(initial=-1)) + 1
    often = torch.zeros(rows, pages * page_tokens, dtype=torch.float64)
    within = torch.arange(page_tokens)
    for tile in tiles.tiles:
        assert tile.offset < page_tokens
        held = (torch.from_numpy(tile.pages).long()[:, None] * page_tokens + within).flatten()
        held = held[tile.offset : tile.offset + tile.tokens]
        visible = torch.arange(tile.tokens) < torch.from_numpy(tile.visible)[:, None]
        often[torch.from_numpy(tile.rows).long()[:, None], held] += visible
    places = often.any(0).nonzero().flatten()
    return places, often[:, places]


def shares(scores: Tensor, often: Tensor) -> Tensor:
    """[T, H, C]: of each token in what a row attends to, by softmax over those it sees; zeros where it sees none."""
    weights = (scores + often.log()[:, None]).softmax(-1)
    weights[~often.any(1)] = 0
    return weights


def route(x: Tensor, weight: Tensor, bias: Tensor | None, rule: RouteRule) -> tuple[Tensor, Tensor]:
    """(expert ids by falling choice score, their weights)"""
    logits = x.double() @ weight.double().T
    scores = logits.sigmoid() if rule.score == "sigmoid" else logits.softmax(-1)
    choice = scores if bias is None else scores + bias.double()
    ids = torch.stack([_choose(row, rule) for row in choice])
    weights = scores.gather(1, ids)
    if rule.normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return ids, weights * rule.scale


def _choose(choice: Tensor, rule: RouteRule) -> Tensor:
    groups = choice.view(rule.groups, -1)
    worth = groups.max(-1).values if rule.group_score == "max" else groups.topk(2, -1).values.sum(-1)
    kept = set(worth.topk(rule.top_groups).indices.tolist())
    size = groups.shape[1]
    allowed = [expert for expert in range(choice.numel()) if rule.groups == 1 or expert // size in kept]
    ranked = sorted(allowed, key=lambda expert: -float(choice[expert]))
    return torch.tensor(ranked[: rule.top])


def experts(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    out = torch.zeros(x.shape[0], x.shape[1], dtype=torch.float64)
    for token in range(x.shape[0]):
        for expert, share in zip(ids[token].tolist(), weights[token].tolist(), strict=True):
            gate, up = (gate_up[expert].double() @ x[token].double()).chunk(2)
            out[token] += share * (down[expert].double() @ (torch.nn.functional.silu(gate) * up))
    return out


def add_norm_linear(
    x: Tensor, residual: Tensor, gain: Tensor, eps: float, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(product of the normed sum, the sum)"""
    normed, total = add_rms_norm(x, residual, gain, eps)
    return linear(normed, weight, bias), total


def copy_rows(pool: Tensor, moves: Tensor) -> Tensor:
    """The pool after the first rows of some pages went to others, in every layer."""
    after = pool.double().clone()
    for source, target, rows in moves.tolist():
        after[:, target, :rows] = pool[:, source, :rows].double()
    return after


def gather_pages(pool: Tensor, pages: Tensor) -> Tensor:
    return pool.double()[:, pages.long()]


def scatter_pages(pool: Tensor, pages: Tensor, packed: Tensor) -> Tensor:
    """The pool after the named pages of every layer were written."""
    after = pool.double().clone()
    after[:, pages.long()] = packed.double()
    return after

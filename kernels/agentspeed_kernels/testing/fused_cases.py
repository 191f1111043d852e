"""Cases of the ops that join others, for the conformance suite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from agentspeed_kernels.fp8_blocks import Fp8Blocks
from agentspeed_kernels.fp8_cache import latent_row
from agentspeed_kernels.packing import Weight
from agentspeed_kernels.quantised import Quantised
from agentspeed_kernels.reference import definitions, fused
from agentspeed_kernels.routing import RouteRule
from agentspeed_kernels.signature import CacheFormat
from agentspeed_kernels.testing.cache_cases import appended, pool_of
from agentspeed_kernels.workspace import Workspace

Pairs = list[tuple[Tensor, Tensor]]
Call = Callable[..., Any]


class Draws(Protocol):
    """Seeded tensors in a case's format and manner."""

    rows: int
    hidden: int
    rank: int
    rope: int
    heads: int
    kind: torch.dtype
    device: torch.device
    cache: CacheFormat | None

    def tensor(self, *shape: int) -> Tensor: ...
    def weight(self, *shape: int) -> Tensor: ...
    def laid(self, weight: Tensor, parts: int = 1) -> Weight: ...
    def gain(self, width: int) -> Tensor: ...
    def angles(self) -> tuple[Tensor, Tensor]: ...
    def empty(self, *shape: int) -> Tensor: ...


def meant(weight: Tensor, laid: Weight) -> Tensor:
    """What a kernel is measured against: of a weight that is kept in another format what that stands for."""
    if isinstance(laid, Quantised | Fp8Blocks):
        return laid.whole(torch.float64).reshape(weight.shape)
    return laid.to(weight.dtype) if isinstance(laid, Tensor) else weight


def _meant(definition: Callable[..., Any], *given: Any) -> Any:
    """Definitions compute on the CPU."""
    return definition(*(one.cpu() if isinstance(one, Tensor) else one for one in given))


def add_norm_linear(call: Call, draw: Draws) -> Pairs:
    x, residual = draw.tensor(draw.rows, draw.hidden), draw.tensor(draw.rows, draw.hidden)
    gain, weight = draw.gain(draw.hidden), draw.weight(draw.rank + 5, draw.hidden)
    pairs: Pairs = []
    for bias in (None, draw.gain(draw.rank + 5)):
        out, total = draw.empty(draw.rows, draw.rank + 5), draw.empty(draw.rows, draw.hidden)
        laid = draw.laid(weight)
        wanted, added = _meant(definitions.add_norm_linear, x, residual, gain, 1e-6, meant(weight, laid), bias)
        call(x, residual, gain, 1e-6, laid, bias, out, total)
        pairs += [(out, wanted), (total, added.to(draw.kind).double())]
    return pairs


def mla_queries(call: Call, draw: Draws) -> Pairs:
    """Queries and latents are pieces of wider rows."""
    nope = draw.rope + 4
    q = draw.tensor(draw.rows, draw.heads + 1, nope + draw.rope)[:, 1:]
    raw = draw.tensor(draw.rows, 3 + draw.rank + draw.rope)[:, 3:]
    gain, (cos, sin), key_up = draw.gain(draw.rank), draw.angles(), draw.weight(draw.heads, draw.rank, nope)
    row = latent_row(draw.rank, draw.rope)
    pool = pool_of(draw.tensor(2 * draw.rows, draw.rank + draw.rope), row, draw)
    slots = torch.randperm(2 * draw.rows, generator=torch.Generator().manual_seed(3))[: draw.rows].to(draw.device)
    out = draw.empty(draw.rows, draw.heads, draw.rank + draw.rope)
    given = (q, raw, gain, 1e-6, cos, sin, slots)
    (wanted, after), before = _meant(fused.mla_queries, *given, key_up, pool), pool.clone()
    call(*given, draw.laid(key_up), pool, out)
    return [(out, wanted), *appended(pool, before, after, slots, row, draw)]


def add_norm_route(call: Call, draw: Draws, rules: Sequence[RouteRule], exact: bool) -> Pairs:
    """Equal scores may be taken in any order: the ids are compared where inputs are `exact`ly what chance gives. Sum
    and norm are results in the format, which may round either way; scores are those of the sum as it was rounded."""
    wide = torch.float64 if draw.kind == torch.float64 else torch.float32
    pairs: Pairs = []
    for rule in rules:
        x, residual = draw.tensor(draw.rows, draw.hidden), draw.tensor(draw.rows, draw.hidden)
        gain, weight = draw.gain(draw.hidden), draw.weight(8, draw.hidden).to(wide)
        bias = 0.1 * draw.weight(8).to(wide) if rule.score == "sigmoid" else None
        normed, total = draw.empty(draw.rows, draw.hidden), draw.empty(draw.rows, draw.hidden)
        slots = torch.arange(draw.rows).to(draw.device)
        slots[1::2] = -1
        ids, weights = call(x, residual, gain, 1e-6, weight, bias, rule, slots, normed, total)
        given = (total, torch.zeros_like(total), gain, 1e-6, weight, bias, rule, slots)
        wanted_ids, wanted, its_norm, _ = _meant(fused.add_norm_route, *given)
        pairs += [(weights, wanted), _near(total, x.double() + residual.double()), _near(normed, its_norm)]
        if exact:
            pairs.append((ids.double(), wanted_ids.double()))
    return pairs


def _near(got: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Ones where `got` is within some roundings of its format, and where it should be."""
    wanted = wanted.cpu()
    most = 8 * torch.finfo(got.dtype).eps * wanted.abs().amax()
    return ((got.cpu().double() - wanted).abs() <= most).double(), torch.ones_like(wanted)


def experts_and_shared(call: Call, draw: Draws) -> Pairs:
    """A shared expert as wide as a routed one, narrower and wider."""
    count, top, inner, hidden = 5, 2, draw.rank + 3, draw.hidden
    pairs: Pairs = []
    for beside in (inner, draw.rank - 5, 2 * inner + 1):
        x, gate_up = draw.tensor(draw.rows, hidden), draw.weight(count, 2 * inner, hidden)
        down, shared_down = draw.weight(count, hidden, inner), draw.weight(1, hidden, beside)
        shared_gate_up, out = draw.weight(1, 2 * beside, hidden), draw.empty(draw.rows, hidden)
        noise = torch.Generator().manual_seed(5)
        ids = torch.stack([torch.randperm(count, generator=noise)[:top] for _ in range(draw.rows)]).to(draw.device)
        wide = torch.float64 if draw.kind == torch.float64 else torch.float32
        weights = torch.rand(draw.rows, top, generator=noise).to(wide).to(draw.device)
        ids[1::3], weights[1::3] = count, 0.0  # nobody
        matrices = (gate_up, down, shared_gate_up, shared_down)
        laid = [draw.laid(one, parts) for one, parts in zip(matrices, (2, 1, 2, 1), strict=True)]
        call(x, *laid[:2], ids, weights, *laid[2:], Workspace(draw.device), out)
        stand_for = [meant(one, its) for one, its in zip(matrices, laid, strict=True)]
        given = (x, *stand_for[:2], ids, weights, *stand_for[2:])
        pairs.append((out, _meant(fused.experts_and_shared, *given)))
    return pairs

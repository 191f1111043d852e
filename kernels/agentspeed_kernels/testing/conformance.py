"""Cases for every op, friendly and hostile, and one call that measures a kernel against its float64 definition.

A kernel from outside is checked the same way: `worst_error(spec, case)` for each of `cases(spec)`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, final, get_args

import numpy as np
import torch
from torch import Tensor

from agentspeed_kernels.fp8_cache import latent_row
from agentspeed_kernels.packing import Weight, kept_in, pack
from agentspeed_kernels.reference import definitions
from agentspeed_kernels.routing import RouteRule
from agentspeed_kernels.signature import CacheFormat, Dtype, KernelSpec, Layout, WeightFormat
from agentspeed_kernels.testing import cache_cases, fused_cases, grouped_cases, page_cases, sparse_cases
from agentspeed_kernels.testing.noise import Noise
from agentspeed_kernels.testing.tolerance import KIND_OF, UNDEFINED, tolerance
from agentspeed_kernels.tiles import Int32s, Int64s, Piece, TilePlan, plan_tiles
from agentspeed_kernels.workspace import Workspace

Manner = Literal["random", "zeros", "large", "tiny", "one_peak"]
MANNERS: tuple[Manner, ...] = ("random", "zeros", "large", "tiny", "one_peak")
"""zeros: sums of nothing and equal scores. large: scores of a size where exp overflows unless the peak is taken off.
tiny: squares near the end of float32's range. one_peak: one coordinate rules, its neighbours vanish beside it."""
SIZES: tuple[Literal["small", "odd", "wide"], ...] = ("small", "odd", "wide")
"""odd sizes are no multiple of a vector; wide ones are those of a real model."""
RANKS: dict[str, int] = {"small": 32, "odd": 23, "wide": 512}
ROPES: dict[str, int] = {"small": 16, "odd": 6, "wide": 64}
KINDS: dict[Dtype, torch.dtype] = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    op: str
    dtype: Dtype
    manner: Manner
    size: Literal["small", "odd", "wide"]
    rows: int
    weights: WeightFormat | None = None
    """None: the case's dtype."""
    cache: CacheFormat | None = None
    """Of the pools; None: the case's dtype."""

    @property
    def name(self) -> str:
        weights = f"-{self.weights}" if self.weights else ""
        cache = f"-{self.cache}-cache" if self.cache else ""
        return f"{self.op}-{self.dtype}{weights}{cache}-{self.manner}-{self.size}-{self.rows}"


def cases(spec: KernelSpec, most: int = 70) -> Iterator[Case]:
    """All that `spec` says it can do: its formats and widths, and row counts from one to just past its last vector.

    `most` bounds the rows, for kernels that an interpreter runs."""
    most = min(most, spec.most_rows) if spec.most_rows is not None else most
    for dtype, weights, cache in itertools.product(sorted(spec.dtypes), weights_of(spec), caches_of(spec)):
        for manner in MANNERS:
            if (KIND_OF[spec.op], dtype, manner) in UNDEFINED or (weights == "int8-32" and manner != "random"):
                continue  # groups change how scales are read, which no manner of the inputs does
            for size in SIZES if manner == "random" else SIZES[:2]:
                if not fits(spec, size):
                    continue
                for rows in sorted({1, min(3, most), min(most, 70 if size != "wide" else 8)}):
                    yield Case(
                        op=spec.op, dtype=dtype, manner=manner, size=size, rows=rows, weights=weights, cache=cache
                    )


def weights_of(spec: KernelSpec) -> list[WeightFormat | None]:
    """The formats of weights that a kernel takes; None: that of a case's dtype."""
    formats: list[WeightFormat | None] = [kind for kind in get_args(WeightFormat) if kind in (spec.weights or ())]
    return formats or [None]


def caches_of(spec: KernelSpec) -> list[CacheFormat | None]:
    """The formats of pools that a kernel takes; None: that of a case's dtype."""
    caches: list[CacheFormat | None] = [kind for kind in get_args(CacheFormat) if kind in (spec.cache or ())]
    return caches or [None]


def fits(spec: KernelSpec, size: Literal["small", "odd", "wide"]) -> bool:
    """Whether the kernel takes the widths that cases of a size have."""
    widths = {"R": RANKS[size], "rope": ROPES[size], "nope": ROPES[size], "W": 2 * ROPES[size]}
    return all(spec.sizes[axis].objection(axis, width) is None for axis, width in widths.items() if axis in spec.sizes)


def objection(spec: KernelSpec) -> str | None:
    """What is wrong with a kernel, found by a few of its cases; None when nothing is. Some milliseconds a case."""
    for case in cases(spec, most=3):
        if case.size == "small":
            error = worst_error(spec, case, spec.device)
            if not error <= tolerance(case.op, case.dtype):
                return f"its error is {error:.1e} where {tolerance(case.op, case.dtype):.0e} is allowed ({case.name})"
    return None


def worst_error(spec: KernelSpec, case: Case, device: torch.device | str = "cpu") -> float:
    """max|d| / max|definition| of one call; infinite when the kernel gives anything that is not finite."""
    draw = _Draw(case, spec.layout, torch.device(device))
    draw.paged = spec.plans == "triton"
    pairs = _CALLS[case.op](spec.call, draw)
    return max(_relative(got, wanted) for got, wanted in pairs)


@final
class _OnCpu:
    """The definitions, for arguments that may lie on a device."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(definitions, name)
        return lambda *given: function(*(one.cpu() if isinstance(one, Tensor) else one for one in given))


define = _OnCpu()


def _relative(got: Tensor, wanted: Tensor) -> float:
    got, wanted = got.cpu(), wanted.cpu()
    if not bool(torch.isfinite(got).all()):
        return float("inf")
    scale = float(wanted.abs().max()) or 1.0
    return float((got.double() - wanted).abs().max()) / scale


def _plans_of_triton(
    pieces: list[Piece], path: list[Piece], positions: Int64s, draw: _Draw, page_tokens: int
) -> Callable[[int, int | None, int], tuple[Any, Any]]:
    """(Heads, groups or None for latents, width of a head) to the plans of rows and of an extend."""
    from agentspeed_kernels.triton import attention, backend, extend

    def planned(heads: int, groups: int | None, width: int) -> tuple[Any, Any]:
        given = (page_tokens, draw.device, 1 if draw.cache == "fp8" else draw.kind.itemsize)
        if groups is None:
            shape = backend.shape_of(heads, draw.rank, draw.rope, *given)
        else:
            shape = backend.grouped_shape_of(heads, groups, width, *given)
        few = attention.prepare(pieces, positions, shape, draw.device)
        return few, extend.prepare_extend(path, positions, page_tokens, heads, draw.device)

    return planned


@final
class _Draw:
    """Seeded tensors in a case's format and manner."""

    def __init__(self, case: Case, layout: Layout, device: torch.device) -> None:
        self.case, self.layout, self.device = case, layout, device
        self.paged = False
        self.cache: CacheFormat | None = case.cache
        self.kind = KINDS[case.dtype]
        self.rows = case.rows
        self.hidden = {"small": 32, "odd": 45, "wide": 512}[case.size]
        self.rank, self.rope = RANKS[case.size], ROPES[case.size]
        self.heads = {"small": 4, "odd": 3, "wide": 8}[case.size]
        self._noise = Noise(7)

    def tensor(self, *shape: int, spread: float = 1.0) -> Tensor:
        """In the case's manner."""
        drawn = self._noise.normal(*shape) * spread
        match self.case.manner:
            case "zeros":
                drawn = drawn * 0
            case "large":
                drawn = drawn * 100
            case "tiny":
                drawn = drawn * 1e-12
            case "one_peak":
                drawn[..., 0] = 50 * spread
            case "random":
                pass
        return drawn.to(self.kind).to(self.device)

    def weight(self, *shape: int) -> Tensor:
        """Always ordinary: hostile are the values that come from users and layers before."""
        drawn = self._noise.normal(*shape)
        return (drawn / math.sqrt(shape[-1])).to(self.kind).to(self.device)

    def laid(self, weight: Tensor, parts: int = 1) -> Weight:
        """In the layout of the kernel that is checked."""
        if self.case.weights is not None:
            return kept_in(weight, self.case.weights, parts)
        return weight if self.layout == "rows" else pack(weight, parts)

    def gain(self, width: int) -> Tensor:
        return (1 + 0.1 * self._noise.normal(width)).to(self.kind).to(self.device)

    def angles(self) -> tuple[Tensor, Tensor]:
        turned = self._noise.uniform(self.rows, self.rope // 2) * 6.3
        return turned.cos().to(self.kind).to(self.device), turned.sin().to(self.kind).to(self.device)

    def empty(self, *shape: int) -> Tensor:
        """Filled with what must not survive."""
        return torch.full(shape, float("nan"), dtype=self.kind, device=self.device)


Call = Callable[..., Any]
Pairs = list[tuple[Tensor, Tensor]]


def _linear(call: Call, draw: _Draw) -> Pairs:
    x, weight = draw.tensor(draw.rows, draw.hidden + 3)[:, : draw.hidden], draw.weight(draw.rank + 5, draw.hidden)
    laid = draw.laid(weight)
    pairs: Pairs = []
    for bias in (None, draw.gain(draw.rank + 5)):
        out = draw.empty(draw.rows, draw.rank + 5)
        call(x, laid, bias, out)
        pairs.append((out, define.linear(x, fused_cases.meant(weight, laid), bias)))
    return pairs


def _heads_linear(call: Call, draw: _Draw) -> Pairs:
    x = draw.tensor(draw.rows, draw.heads, draw.rope + 7)[:, :, : draw.rope]
    weight = draw.weight(draw.heads, draw.rank, draw.rope)
    laid = draw.laid(weight)
    out = draw.empty(draw.rows, draw.heads, draw.rank + 4)[:, :, : draw.rank]
    call(x, laid, out)
    return [(out, define.heads_linear(x, fused_cases.meant(weight, laid)))]


def _rms_norm(call: Call, draw: _Draw) -> Pairs:
    x, gain = draw.tensor(draw.rows, draw.hidden + 2)[:, : draw.hidden], draw.gain(draw.hidden)
    out = draw.empty(draw.rows, draw.hidden)
    call(x, gain, 1e-6, out)
    return [(out, define.rms_norm(x, gain, 1e-6))]


def _add_rms_norm(call: Call, draw: _Draw) -> Pairs:
    x, residual = draw.tensor(draw.rows, draw.hidden), draw.tensor(draw.rows, draw.hidden)
    gain, out = draw.gain(draw.hidden), draw.empty(draw.rows, draw.hidden)
    wanted, total = define.add_rms_norm(x, residual, gain, 1e-6)
    call(x, residual, gain, 1e-6, out)
    return [(out, wanted), (residual, total)]


def _rope(call: Call, draw: _Draw) -> Pairs:
    x = draw.tensor(draw.rows, draw.heads, draw.rope + 5)[:, :, 5:]
    cos, sin = draw.angles()
    wanted = define.rope(x, cos, sin)
    call(x, cos, sin)
    return [(x, wanted)]


def _latent_append(call: Call, draw: _Draw) -> Pairs:
    raw = draw.tensor(draw.rows, 3 + draw.rank + draw.rope)[:, 3:]
    gain, (cos, sin) = draw.gain(draw.rank), draw.angles()
    row = latent_row(draw.rank, draw.rope)
    pool = cache_cases.pool_of(draw.tensor(2 * draw.rows, draw.rank + draw.rope), row, draw)
    slots = torch.randperm(2 * draw.rows, generator=torch.Generator().manual_seed(3))[: draw.rows].to(draw.device)
    wanted, before = define.latent_append(raw, gain, 1e-6, cos, sin, slots, pool), pool.clone()
    call(raw, gain, 1e-6, cos, sin, slots, pool)
    return cache_cases.appended(pool, before, wanted, slots, row, draw)


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Attention:
    """Latents, and what attends to them: tiles for the definitions beside the plans of the kernels."""

    latents: Tensor
    """[pages, page_tokens, R + rope] in the format of the activations."""
    tiles: TilePlan
    planned: Callable[[int, int | None, int], tuple[Any, Any]]
    """(Heads, groups or None for latents, width of a head) to what is for rows and for an extend."""
    path: TilePlan
    """What an extend computes."""


def _attentions(draw: _Draw) -> Iterator[_Attention]:
    """Pools and plans: small pages and, on the CPU, a plan of nothing, pages of a running engine and pieces that begin
    within a page."""
    small = _small_pages(draw)
    yield small
    if draw.paged or draw.case.manner != "random":
        return
    nothing = plan_tiles([], np.zeros(0, np.int64), page_tokens=4, chunk_tokens=8, block_rows=5)
    yield _on_cpu(small.latents, nothing)
    for page_tokens, chunk, block in ((64, 512, 32), (48, 100, 7)):
        yield _long_pages(draw, page_tokens, chunk, block)


def _on_cpu(latents: Tensor, tiles: TilePlan) -> _Attention:
    return _Attention(latents=latents, tiles=tiles, planned=lambda *_: (tiles, tiles), path=tiles)


def _long_pages(draw: _Draw, page_tokens: int, chunk: int, block: int) -> _Attention:
    """A shared context of some hundred tokens and a causal piece. What no token was written to is not a number: rows of
    a session that ended, in pages that another one got."""
    shared, own = 300 + draw.rows, draw.rows + 9
    order = np.random.default_rng(2).permutation(-(-shared // page_tokens) + -(-own // page_tokens)).astype(np.int32)
    held = -(-shared // page_tokens)
    pool = torch.full((order.size, page_tokens, draw.rank + draw.rope), float("nan"), dtype=draw.kind)
    for pages, tokens in ((order[:held], shared), (order[held:], own)):
        for index, page in enumerate(pages.tolist()):
            written = min(page_tokens, tokens - index * page_tokens)
            pool[page, :written] = draw.tensor(written, draw.rank + draw.rope)
    everyone = np.arange(draw.rows, dtype=np.int32)
    pieces = [_Piece(order[:held], 0, shared, everyone, False), _Piece(order[held:], shared, own, everyone, True)]
    positions = np.arange(draw.rows, dtype=np.int64) + shared + 9
    align: Literal["page", "query"] = "page" if page_tokens == 64 else "query"
    tiles = plan_tiles(pieces, positions, page_tokens=page_tokens, chunk_tokens=chunk, block_rows=block, align=align)
    return _on_cpu(pool, tiles)


def _small_pages(draw: _Draw) -> _Attention:
    """A pool of scattered pages and plans with a shared piece, causal tails and a long piece in chunks."""
    page_tokens, pages = 16 if draw.paged else 4, 12
    pool = draw.tensor(pages, page_tokens, draw.rank + draw.rope)
    positions = np.arange(draw.rows, dtype=np.int64) + 4 * page_tokens + 1
    everyone = np.arange(draw.rows, dtype=np.int32)
    own = 3 * page_tokens + 2
    pieces: list[Piece] = [
        _Piece(np.array([7, 8, 9], np.int32), 0, 3 * page_tokens - 1, everyone, False),
        _Piece(np.array([3, 1], np.int32), 3 * page_tokens - 1, page_tokens + 2, everyone[:1], False),
        _Piece(np.array([11, 2, 5, 4], np.int32), 4 * page_tokens + 1, own, everyone, True),
    ]
    tiles = plan_tiles(pieces, positions, page_tokens=page_tokens, chunk_tokens=2 * page_tokens, block_rows=5)
    path: list[Piece] = [
        _Piece(np.array([7, 8, 9, 3], np.int32), 0, 4 * page_tokens, everyone, False),
        _Piece(np.array([11, 2, 5, 4, 6, 10], np.int32), 4 * page_tokens, 6 * page_tokens, everyone, True),
    ]
    if not draw.paged:
        return _on_cpu(pool, tiles)
    planned = _plans_of_triton(pieces, path, positions, draw, page_tokens)
    path_tiles = plan_tiles(path, positions, page_tokens=page_tokens, chunk_tokens=2 * page_tokens, block_rows=5)
    return _Attention(latents=pool, tiles=tiles, planned=planned, path=path_tiles)


def _unwritten(draw: _Draw, case: _Attention, width: int) -> Tensor:
    """What a call writes all of, or, of a plan of nothing, may leave as it is: zeros, as the definition has it."""
    out = draw.empty(draw.rows, draw.heads, width)
    return out if case.tiles.count else out.zero_()


def _latent_pool(draw: _Draw, case: _Attention) -> Tensor:
    return cache_cases.pool_of(case.latents, latent_row(draw.rank, draw.rope), draw)


def _mla_rows(call: Call, draw: _Draw) -> Pairs:
    pairs: Pairs = []
    for case in _attentions(draw):
        q = draw.tensor(draw.rows, draw.heads, draw.rank + draw.rope)
        out, scale = _unwritten(draw, case, draw.rank), (draw.rank + draw.rope) ** -0.5
        rows, _ = case.planned(draw.heads, None, draw.rank)
        pool = _latent_pool(draw, case)
        call(q, pool, rows, scale, Workspace(draw.device), out)
        pairs.append((out, define.mla_rows(q, pool, case.tiles, scale, draw.rank)))
    return pairs


def _mla_extend(call: Call, draw: _Draw) -> Pairs:
    pairs: Pairs = []
    # narrower and wider than the keys, and the usual widths
    widths = [(draw.rope, draw.rope + (8 if draw.paged else 1)), (draw.rope, 3 * draw.rope)]
    widths += [(128, 128)] * (draw.case.size == "wide")
    # How wide a head is decides nothing about long pages: those are tried with one width.
    small = itertools.product(widths[:-1], itertools.islice(_attentions(draw), 2))
    for (nope, value), case in itertools.chain(small, itertools.product(widths[-1:], _attentions(draw))):
        q = draw.tensor(draw.rows, draw.heads, nope + draw.rope)
        key_up, value_up = draw.weight(draw.heads, draw.rank, nope), draw.weight(draw.heads, value, draw.rank)
        out, scale = _unwritten(draw, case, value), (nope + draw.rope) ** -0.5
        laid = (draw.laid(key_up), draw.laid(value_up))
        _, step = case.planned(draw.heads, None, draw.rank)
        pool, ups = (
            _latent_pool(draw, case),
            [fused_cases.meant(*pair) for pair in zip((key_up, value_up), laid, strict=True)],
        )
        call(q, pool, *laid, step, scale, Workspace(draw.device), out)
        pairs.append((out, define.mla_extend(q, pool, *ups, case.path, scale)))
    return pairs


def _gqa(call: Call, draw: _Draw) -> Pairs:
    long = draw.case.op == "gqa_extend"

    def planned(case: _Attention) -> grouped_cases.Planned:
        return lambda heads, groups, width: case.planned(heads, groups, width)[long]

    found = [(case.latents, case.path if long else case.tiles, planned(case)) for case in _attentions(draw)]
    return grouped_cases.gqa(call, draw, found)


def _index_select(call: Call, draw: _Draw) -> Pairs:
    case = _small_pages(draw)
    return sparse_cases.index_select(call, draw, case.tiles, (case.latents.shape[0], case.latents.shape[1]))


def _add_norm_route(call: Call, draw: _Draw) -> Pairs:
    return fused_cases.add_norm_route(call, draw, _RULES, exact=draw.case.manner == "random")


def _route(call: Call, draw: _Draw) -> Pairs:
    """Equal scores may be taken in any order, so the chosen scores are compared, not the ids."""
    wide = torch.float64 if draw.kind == torch.float64 else torch.float32
    pairs: Pairs = []
    for rule in _RULES:
        x, weight = draw.tensor(draw.rows, draw.hidden), draw.weight(8, draw.hidden).to(wide)
        bias = 0.1 * draw.weight(8).to(wide) if rule.score == "sigmoid" else None
        ids, weights = call(x, weight, bias, rule)
        wanted_ids, wanted = define.route(x, weight, bias, rule)
        pairs.append((weights, wanted))
        if draw.case.manner == "random":
            pairs.append((ids.double(), wanted_ids.double()))
    return pairs


def _rule(score: Literal["sigmoid", "softmax"], groups: int, normalise: bool) -> RouteRule:
    return RouteRule(
        score=score,
        top=3,
        groups=groups,
        top_groups=min(groups, 2),
        group_score="top2" if score == "sigmoid" else "max",
        normalise=normalise,
        scale=1.5,
    )


_RULES = (_rule("sigmoid", 1, True), _rule("sigmoid", 4, True), _rule("softmax", 1, False), _rule("softmax", 4, False))


def _experts(call: Call, draw: _Draw) -> Pairs:
    pairs: Pairs = []
    shapes = ((5, 2, False), (1, 1, True), (1, 2, False))
    for count, top, dense in shapes[: 3 if draw.case.weights in (None, "bfloat16") else 1]:
        inner, hidden = draw.rank + 3, draw.hidden
        x = draw.tensor(draw.rows, hidden)
        gate_up, down = draw.weight(count, 2 * inner, hidden), draw.weight(count, hidden, inner)
        noise = torch.Generator().manual_seed(5)
        # A rank that has one expert sees choices of others as its own, with weight 0, and so twice the same expert.
        ids = torch.stack([torch.randperm(max(count, top), generator=noise)[:top] for _ in range(draw.rows)])
        ids = ids.clamp(max=count - 1)
        wide = torch.float64 if draw.kind == torch.float64 else torch.float32
        weights = torch.rand(draw.rows, top, generator=noise).to(wide)
        if dense:
            weights.fill_(1)
        elif count == 1:
            weights[::2, 1] = 0
        ids, weights = ids.to(draw.device), weights.to(draw.device)
        out = draw.empty(draw.rows, hidden)
        laid = (draw.laid(gate_up, 2), draw.laid(down))
        call(x, *laid, ids, weights, Workspace(draw.device), out)
        meant = (fused_cases.meant(gate_up, laid[0]), fused_cases.meant(down, laid[1]))
        pairs.append((out, define.experts(x, *meant, ids, weights)))
    return pairs


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    pages: Int32s
    start: int
    tokens: int
    queries: Int32s
    causal: bool


def piece(pages: Int32s, start: int, tokens: int, queries: Int32s, causal: bool) -> Piece:
    """For tests: cached tokens that several rows read."""
    return _Piece(pages, start, tokens, queries, causal)


_CALLS: dict[str, Callable[[Call, _Draw], Pairs]] = {
    "linear": _linear,
    "heads_linear": _heads_linear,
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "rope": _rope,
    "latent_append": _latent_append,
    "mla_rows": _mla_rows,
    "mla_extend": _mla_extend,
    "qkv_append": grouped_cases.qkv_append,
    "gqa_rows": _gqa,
    "gqa_extend": _gqa,
    "add_norm_linear": fused_cases.add_norm_linear,
    "mla_queries": fused_cases.mla_queries,
    "add_norm_route": _add_norm_route,
    "experts_and_shared": fused_cases.experts_and_shared,
    "copy_rows": page_cases.copy_rows,
    "gather_pages": page_cases.gather_pages,
    "scatter_pages": page_cases.scatter_pages,
    "route": _route,
    "experts": _experts,
    "index_append": sparse_cases.index_append,
    "index_select": _index_select,
    "mla_selected": sparse_cases.mla_selected,
}

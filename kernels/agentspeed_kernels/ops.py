"""The public ops: their names, what a call means in one line, and the least bytes and FLOPs a call costs.

Axes: T tokens, K inputs, N outputs, H heads, G heads of keys and values, W head width, R latent rank, D hidden,
E experts, I expert width, C context tokens. Of an indexer: J heads of width V, `chosen` tokens that a row reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, final

from torch import Tensor

from agentspeed_kernels.packing import Weight
from agentspeed_kernels.routing import RouteRule
from agentspeed_kernels.signature import Cost
from agentspeed_kernels.workspace import Workspace

Dims = Mapping[str, int]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    name: str
    call: str
    """Its arguments; the definition of the same name in `reference.definitions` says what comes out."""
    cost: Callable[[Dims, int], Cost]
    """(sizes, bytes of an element) -> the least it can cost."""


def _linear(d: Dims, item: int) -> Cost:
    return Cost(bytes=item * (d["N"] * d["K"] + d["T"] * (d["K"] + d["N"])), flops=2 * d["T"] * d["N"] * d["K"])


def _heads_linear(d: Dims, item: int) -> Cost:
    one = _linear(d, item)
    return Cost(bytes=d["H"] * one.bytes, flops=d["H"] * one.flops)


def _norm(d: Dims, item: int) -> Cost:
    return Cost(bytes=item * (4 * d["T"] + 1) * d["D"], flops=4 * d["T"] * d["D"])


def _latent_append(d: Dims, item: int) -> Cost:
    width = d["R"] + d["rope"]
    return Cost(bytes=item * 2 * d["T"] * width, flops=6 * d["T"] * width)


def _rope(d: Dims, item: int) -> Cost:
    return Cost(bytes=item * 2 * d["T"] * d["H"] * d["rope"], flops=3 * d["T"] * d["H"] * d["rope"])


def _mla_rows(d: Dims, item: int) -> Cost:
    """C tokens of context are read once, whatever the number of rows that see them."""
    width, rows = d["R"] + d["rope"], d["T"] * d["H"]
    return Cost(bytes=item * (d["C"] * width + rows * (width + d["R"])), flops=2 * rows * d["C"] * (width + d["R"]))


def _mla_extend(d: Dims, item: int) -> Cost:
    inner = d["nope"] + d["value"]
    expand = 2 * d["C"] * d["R"] * d["H"] * inner
    attend = 2 * d["T"] * d["C"] * d["H"] * (inner + d["rope"])
    weights = d["H"] * inner * d["R"]
    moved = d["C"] * (d["R"] + d["rope"]) + weights + d["T"] * d["H"] * (inner + d["rope"])
    return Cost(bytes=item * moved, flops=expand + attend)


def _qkv_append(d: Dims, item: int) -> Cost:
    width = (d["H"] + 2 * d["G"]) * d["W"]
    return Cost(bytes=item * 2 * d["T"] * width, flops=6 * d["T"] * width)


def _gqa(d: Dims, item: int) -> Cost:
    """C tokens of context are read once, whatever the number of rows that see them."""
    moved = 2 * d["C"] * d["G"] * d["W"] + 2 * d["T"] * d["H"] * d["W"]
    return Cost(bytes=item * moved, flops=4 * d["T"] * d["H"] * d["C"] * d["W"])


def _index_append(d: Dims, item: int) -> Cost:
    return Cost(bytes=item * 2 * d["T"] * d["V"], flops=8 * d["T"] * d["V"])


def _index_select(d: Dims, item: int) -> Cost:
    moved = d["C"] * d["V"] + d["J"] * d["D"] + d["T"] * (d["D"] + d["J"] * d["V"])
    return Cost(bytes=item * moved, flops=2 * d["T"] * d["J"] * (d["D"] + d["C"] * (d["V"] + 1)))


def _mla_selected(d: Dims, item: int) -> Cost:
    """Rows may choose different tokens: each reads its own."""
    width, rows = d["R"] + d["rope"], d["T"] * d["H"]
    moved = d["T"] * d["chosen"] * width + rows * (width + d["R"])
    return Cost(bytes=item * moved, flops=2 * rows * d["chosen"] * (width + d["R"]))


def _route(d: Dims, item: int) -> Cost:
    return Cost(bytes=item * (d["T"] + d["E"]) * d["D"], flops=2 * d["T"] * d["E"] * d["D"])


def _experts(d: Dims, item: int) -> Cost:
    """`hit` experts are read; every token visits `top` of them."""
    weights, visits = 3 * d["hit"] * d["I"] * d["D"], d["T"] * d["top"]
    return Cost(bytes=item * (weights + 2 * d["T"] * d["D"]), flops=6 * visits * d["I"] * d["D"])


WEIGHT_OPS = frozenset(
    {"linear", "heads_linear", "experts", "mla_extend", "add_norm_linear", "mla_queries", "experts_and_shared"}
)
"""Ops whose weights may be packed. A model's weights have one layout, so these kernels are chosen together."""
BYTE_OPS = frozenset({"linear", "experts", "add_norm_linear", "experts_and_shared"})
"""Those whose weights may be kept in 8 bits. The weights of the others are a small part, and read by two ops each."""

CACHE_OPS = frozenset(
    {"latent_append", "mla_rows", "mla_extend", "qkv_append", "gqa_rows", "gqa_extend", "mla_queries"}
    | {"index_append", "index_select", "mla_selected", "copy_rows", "gather_pages", "scatter_pages"}
)
"""Those that read or write pools, whose rows may be kept in 8 bits: a pool is uint8 then, and its last axis bytes."""


def _add_norm_linear(d: Dims, item: int) -> Cost:
    return Cost(
        bytes=item * (d["N"] * d["K"] + d["T"] * (3 * d["K"] + d["N"]) + d["K"]), flops=2 * d["T"] * d["N"] * d["K"]
    )


def _mla_queries(d: Dims, item: int) -> Cost:
    absorbed = _heads_linear({"T": d["T"], "H": d["H"], "N": d["R"], "K": d["nope"]}, item)
    append, turn = _latent_append(d, item), _rope(d, item)
    return Cost(bytes=absorbed.bytes + append.bytes + turn.bytes, flops=absorbed.flops + append.flops + turn.flops)


def _add_norm_route(d: Dims, item: int) -> Cost:
    norm, scores = _norm(d, item), _route(d, item)
    return Cost(bytes=norm.bytes + scores.bytes, flops=norm.flops + scores.flops)


def _experts_and_shared(d: Dims, item: int) -> Cost:
    """S: the inner width of the shared expert."""
    routed = _experts(d, item)
    return Cost(bytes=routed.bytes + item * 3 * d["S"] * d["D"], flops=routed.flops + 6 * d["T"] * d["S"] * d["D"])


def _pages(d: Dims, item: int) -> Cost:
    """`pages` pages of every layer are read and written."""
    return Cost(bytes=2 * item * d["layers"] * d["pages"] * d["page_tokens"] * (d["R"] + d["rope"]), flops=0)


class Linear(Protocol):
    def __call__(self, x: Tensor, weight: Weight, bias: Tensor | None, out: Tensor) -> None: ...


class HeadsLinear(Protocol):
    def __call__(self, x: Tensor, weight: Weight, out: Tensor) -> None: ...


class RmsNorm(Protocol):
    def __call__(self, x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None: ...


class AddRmsNorm(Protocol):
    def __call__(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor) -> None: ...


class AddNormLinear(Protocol):
    def __call__(
        self,
        x: Tensor,
        residual: Tensor,
        gain: Tensor,
        eps: float,
        weight: Weight,
        bias: Tensor | None,
        out: Tensor,
        total: Tensor,
    ) -> None: ...


class TurnRope(Protocol):
    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor) -> None: ...


class LatentAppend(Protocol):
    def __call__(
        self, raw: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, slots: Tensor, pool: Tensor
    ) -> None: ...


class MlaRows(Protocol):
    """`plan` is what the attention backend of the same device prepared; callers only hand it on."""

    def __call__(self, q: Tensor, pool: Tensor, plan: Any, scale: float, workspace: Workspace, out: Tensor) -> None: ...


class MlaExtend(Protocol):
    """`plan` as in `MlaRows`; writes the rows of the plan at least, what it does to others is open."""

    def __call__(
        self,
        q: Tensor,
        pool: Tensor,
        key_up: Weight,
        value_up: Weight,
        plan: Any,
        scale: float,
        workspace: Workspace,
        out: Tensor,
    ) -> None: ...


class QkvAppend(Protocol):
    def __call__(
        self,
        qkv: Tensor,
        q_gain: Tensor | None,
        k_gain: Tensor | None,
        eps: float,
        cos: Tensor,
        sin: Tensor,
        slots: Tensor,
        q: Tensor,
        key_pool: Tensor,
        value_pool: Tensor,
    ) -> None: ...


class GqaRows(Protocol):
    """`plan` as in `MlaRows`; of `gqa_extend` too. Rows without a part in the plan keep what they had."""

    def __call__(
        self,
        q: Tensor,
        key_pool: Tensor,
        value_pool: Tensor,
        plan: Any,
        scale: float,
        workspace: Workspace,
        out: Tensor,
    ) -> None: ...


class IndexAppend(Protocol):
    def __call__(
        self,
        raw: Tensor,
        gain: Tensor,
        shift: Tensor,
        eps: float,
        cos: Tensor,
        sin: Tensor,
        slots: Tensor,
        pool: Tensor,
    ) -> None: ...


class IndexSelect(Protocol):
    """`plan` as in `MlaRows`; every row of the step is in it. `weight` is float32 at least."""

    def __call__(
        self, q: Tensor, x: Tensor, weight: Tensor, pool: Tensor, plan: Any, top: int, workspace: Workspace
    ) -> Tensor: ...


class MlaSelected(Protocol):
    def __call__(self, q: Tensor, pool: Tensor, chosen: Tensor, scale: float, out: Tensor) -> None: ...


class Route(Protocol):
    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, rule: RouteRule) -> tuple[Tensor, Tensor]: ...


class Experts(Protocol):
    def __call__(
        self,
        x: Tensor,
        gate_up: Weight,
        down: Weight,
        ids: Tensor,
        weights: Tensor,
        workspace: Workspace,
        out: Tensor,
    ) -> None: ...


class MlaQueries(Protocol):
    def __call__(
        self,
        q: Tensor,
        raw: Tensor,
        gain: Tensor,
        eps: float,
        cos: Tensor,
        sin: Tensor,
        slots: Tensor,
        key_up: Weight,
        pool: Tensor,
        out: Tensor,
    ) -> None: ...


class AddNormRoute(Protocol):
    def __call__(
        self,
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
    ) -> tuple[Tensor, Tensor]: ...


class ExpertsAndShared(Protocol):
    def __call__(
        self,
        x: Tensor,
        gate_up: Weight,
        down: Weight,
        ids: Tensor,
        weights: Tensor,
        shared_gate_up: Weight,
        shared_down: Weight,
        workspace: Workspace,
        out: Tensor,
    ) -> None: ...


class CopyRows(Protocol):
    def __call__(self, pool: Tensor, moves: Tensor) -> None: ...


class MovePages(Protocol):
    def __call__(self, pool: Tensor, pages: Tensor, packed: Tensor) -> None: ...


OPS: dict[str, Op] = {
    op.name: op
    for op in (
        Op(name="linear", call="x[T,K], weight[N,K], bias[N]|None, out[T,N]", cost=_linear),
        Op(
            name="heads_linear",
            call="x[T,H,K], weight[H,N,K], out[T,H,N]; x and out may be strided",
            cost=_heads_linear,
        ),
        Op(name="rms_norm", call="x[T,D], weight[D], eps, out[T,D]", cost=_norm),
        Op(name="add_rms_norm", call="x[T,D], residual[T,D] (x is added to it), weight[D], eps, out[T,D]", cost=_norm),
        Op(
            name="latent_append",
            call="raw[T,R+rope], weight[R], eps, cos[T,rope/2], sin[T,rope/2], slots[T], pool[rows,R+rope] (written)",
            cost=_latent_append,
        ),
        Op(
            name="rope", call="x[T,H,rope] (rotated in place; may be strided), cos[T,rope/2], sin[T,rope/2]", cost=_rope
        ),
        Op(
            name="mla_rows",
            call="q[T,H,R+rope], pool[pages,page_tokens,R+rope], plan, scale, workspace, out[T,H,R]",
            cost=_mla_rows,
        ),
        Op(
            name="mla_extend",
            call="q[T,H,nope+rope], pool, key_up[H,R,nope], value_up[H,value,R], plan, scale, workspace, out",
            cost=_mla_extend,
        ),
        Op(
            name="qkv_append",
            call="qkv[T,H+2G,W] (may be strided), q_gain[W]|None, k_gain[W]|None (norms of heads), eps, cos[T,W/2], "
            "sin[T,W/2], slots[T], q[T,H,W] (written), key_pool[pages,page_tokens,G*W], value_pool (written)",
            cost=_qkv_append,
        ),
        Op(
            name="gqa_rows",
            call="q[T,H,W] (may be strided), key_pool, value_pool, tiles, scale, workspace, out[T,H,W]; rows without a "
            "tile keep what they had",
            cost=_gqa,
        ),
        Op(name="gqa_extend", call="as gqa_rows, for tiles of many rows", cost=_gqa),
        Op(
            name="index_append",
            call="raw[T,V], gain[V], shift[V], eps, cos[T,rope/2], sin[T,rope/2], slots[T], pool[rows,V] (written); "
            "the first `rope` coordinates turn",
            cost=_index_append,
        ),
        Op(
            name="index_select",
            call="q[T,J,V], x[T,D], weight[J,D], pool[pages,page_tokens,V], plan, top, workspace -> chosen[T,n] (rows "
            "of the pool, -1 where a row sees fewer; n is top, or the most that a row sees)",
            cost=_index_select,
        ),
        Op(
            name="mla_selected",
            call="q[T,H,R+rope], pool[pages,page_tokens,R+rope], chosen[T,n], scale, out[T,H,R]",
            cost=_mla_selected,
        ),
        Op(name="route", call="x[T,D], weight[E,D], bias[E]|None, rule -> ids[T,top], weights[T,top]", cost=_route),
        Op(
            name="experts",
            call="x[T,D], gate_up[E,2I,D] (in tiles [E,2,I,D]), down[E,D,I], ids[T,top], weights, workspace, out[T,D]",
            cost=_experts,
        ),
        Op(
            name="add_norm_linear",
            call="x[T,K], residual[T,K], gain[K], eps, weight[N,K], bias[N]|None, out[T,N], total[T,K] (x + residual)",
            cost=_add_norm_linear,
        ),
        Op(
            name="mla_queries",
            call="q[T,H,nope+rope] (may be strided), raw[T,R+rope], gain[R], eps, cos[T,rope/2], sin[T,rope/2], "
            "slots[T], key_up[H,R,nope], pool[rows,R+rope] (written), out[T,H,R+rope]",
            cost=_mla_queries,
        ),
        Op(
            name="add_norm_route",
            call="x[T,D], residual[T,D], gain[D], eps, weight[E,D], bias[E]|None, rule, slots[T], normed[T,D] "
            "(written), total[T,D] (x + residual) -> ids[T,top], weights[T,top]; where the slot is negative nobody is "
            "chosen: the id E, with weight 0",
            cost=_add_norm_route,
        ),
        Op(
            name="experts_and_shared",
            call="as experts, with shared_gate_up[1,2S,D] and shared_down[1,D,S] behind the weights of the choices; "
            "the id E, with weight 0, is nobody",
            cost=_experts_and_shared,
        ),
        Op(
            name="copy_rows",
            call="pool[layers,pages,page_tokens,R+rope] (written), moves[n,3] (from, to, rows)",
            cost=_pages,
        ),
        Op(name="gather_pages", call="pool, pages[n], packed[layers,n,page_tokens,R+rope] (written)", cost=_pages),
        Op(name="scatter_pages", call="pool (written), pages[n], packed[layers,n,page_tokens,R+rope]", cost=_pages),
    )
}

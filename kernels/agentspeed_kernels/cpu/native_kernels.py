"""The plain C kernels as entries of the registry: mostly for a few rows, where torch stays far from memory speed.

One set for each form (class of processors) and kind of number; weights are as the checkpoint has them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor

from agentspeed_kernels.cpu import native, native_extend
from agentspeed_kernels.cpu.product_calls import call_experts, call_heads_linear, call_linear, rows_packed
from agentspeed_kernels.cpu.recording import PARTIALS, call, note_partials
from agentspeed_kernels.fp8_cache import heads_in
from agentspeed_kernels.routing import RouteRule
from agentspeed_kernels.signature import Dtype, KernelSpec
from agentspeed_kernels.tiles import TilePlan
from agentspeed_kernels.workspace import Workspace

MOST_PRODUCT_ROWS = 8
"""Above this the BLAS of torch is faster; the C code itself takes 16."""
MOST_ATTENTION_ROWS = 512
VARIANT = frozenset({"route", "mla_extend"})
"""Ops whose sums depend on the number of rows: scores of four rows are taken at once, and torch's products."""
DTYPES: dict[native.Kind, Dtype] = {"f32": "float32", "bf16": "bfloat16"}


class NotBuilt(RuntimeError):
    """A native kernel was called though selection found the library or its form absent."""


def _opened(form: native.Form, kind: native.Kind) -> dict[str, native.Function]:
    """The C functions of a form. Raises `NotBuilt`."""
    library = native.library()
    if isinstance(library, native.Unavailable):
        raise NotBuilt(library.reason)
    if form not in library.forms:
        raise NotBuilt((library.lacks | library.refused).get(form.feature, f"{form.name} was not built"))
    return library.functions(form, kind)


def in_fp8(pool: Tensor) -> bool:
    """Whether the rows of a pool are bytes (`fp8_cache`)."""
    return pool.dtype == torch.uint8


def heads_of(pool: Tensor, width: int) -> int:
    """Of a pool of keys, or of values."""
    return heads_in(pool.shape[2], width).heads if in_fp8(pool) else pool.shape[2] // width


class OpenedFunctions:
    """The C functions of one form and kind; the library is opened at the first call."""

    __slots__ = ("_form", "_functions", "_kind")

    def __init__(self, form: native.Form, kind: native.Kind) -> None:
        self._form = form
        self._kind: native.Kind = kind
        self._functions: dict[str, native.Function] | None = None

    @property
    def functions(self) -> dict[str, native.Function]:
        """By name. Raises `NotBuilt`."""
        if self._functions is None:
            self._functions = _opened(self._form, self._kind)
        return self._functions


@final
class NativeKernels(OpenedFunctions):
    """The ops of one form and kind."""

    __slots__ = ()

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        assert weight.is_contiguous()
        call_linear(self.functions, x, weight, bias, out)

    def heads_linear(self, x: Tensor, weight: Tensor, out: Tensor) -> None:
        assert weight.is_contiguous()
        call_heads_linear(self.functions, x, weight, out)

    def experts(
        self, x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor, workspace: Workspace, out: Tensor
    ) -> None:
        call_experts(self.functions, x, gate_up, down, ids, weights, workspace, out)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
        assert rows_packed(x, out)
        call(
            self.functions,
            "rms_norm",
            (x, weight, out),
            x.data_ptr(),
            x.stride(0),
            weight.data_ptr(),
            eps,
            out.data_ptr(),
            out.stride(0),
            *x.shape,
            torch.get_num_threads(),
        )

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
        assert x.is_contiguous() and residual.is_contiguous() and out.is_contiguous()
        call(
            self.functions,
            "add_rms_norm",
            (x, residual, weight, out),
            x.data_ptr(),
            residual.data_ptr(),
            weight.data_ptr(),
            eps,
            out.data_ptr(),
            *x.shape,
            torch.get_num_threads(),
        )

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> None:
        assert rows_packed(x) and cos.is_contiguous() and sin.is_contiguous()
        call(
            self.functions,
            "rope",
            (x, cos, sin),
            x.data_ptr(),
            x.stride(0),
            x.stride(1),
            cos.data_ptr(),
            sin.data_ptr(),
            cos.dtype == torch.float32,
            x.shape[0],
            x.shape[1],
            cos.shape[1],
            torch.get_num_threads(),
        )

    def latent_append(
        self, raw: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, slots: Tensor, pool: Tensor
    ) -> None:
        assert rows_packed(raw) and cos.is_contiguous() and sin.is_contiguous()
        assert pool.is_contiguous() and slots.is_contiguous()
        call(
            self.functions,
            "latent_append",
            (raw, weight, cos, sin, slots, pool),
            raw.data_ptr(),
            raw.stride(0),
            weight.data_ptr(),
            eps,
            cos.data_ptr(),
            sin.data_ptr(),
            cos.dtype == torch.float32,
            slots.data_ptr(),
            pool.data_ptr(),
            raw.shape[0],
            weight.shape[0],
            cos.shape[1],
            in_fp8(pool),
            torch.get_num_threads(),
        )

    def route(self, x: Tensor, weight: Tensor, bias: Tensor | None, rule: RouteRule) -> tuple[Tensor, Tensor]:
        ids = torch.empty(x.shape[0], rule.top, dtype=torch.int64)
        weights = torch.empty(x.shape[0], rule.top, dtype=torch.float32)
        self.route_into(x, weight, bias, rule, ids, weights)
        return ids, weights

    def route_into(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, rule: RouteRule, ids: Tensor, weights: Tensor
    ) -> None:
        """`route`, whose results go to `ids` and `weights` [T, top]."""
        assert x.is_contiguous() and weight.is_contiguous() and weight.dtype == torch.float32
        call(
            self.functions,
            "route",
            (x, weight, bias, ids, weights),
            x.data_ptr(),
            weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            ids.data_ptr(),
            weights.data_ptr(),
            *x.shape,
            weight.shape[0],
            rule.top,
            rule.groups,
            rule.top_groups,
            rule.score == "softmax",
            rule.group_score == "top2",
            rule.normalise,
            rule.scale,
            torch.get_num_threads(),
        )

    def copy(self, x: Tensor, out: Tensor) -> None:
        """[T, H, N]; both may be strided."""
        assert rows_packed(x, out)
        call(
            self.functions,
            "copy",
            (x, out),
            x.data_ptr(),
            x.stride(0),
            x.stride(1),
            out.data_ptr(),
            out.stride(0),
            out.stride(1),
            *x.shape,
        )

    def add(self, x: Tensor, total: Tensor) -> None:
        assert x.is_contiguous() and total.is_contiguous()
        call(self.functions, "add", (x, total), x.data_ptr(), total.data_ptr(), x.numel())

    def own(self, ids: Tensor, weights: Tensor, first: int, held: int) -> None:
        assert ids.is_contiguous() and weights.is_contiguous() and weights.dtype == torch.float32
        call(self.functions, "own", (ids, weights), ids.data_ptr(), weights.data_ptr(), ids.numel(), first, held)

    def mla_rows(
        self, q: Tensor, pool: Tensor, tiles: TilePlan, scale: float, workspace: Workspace, out: Tensor
    ) -> None:
        call_mla_rows(self.functions, q, pool, tiles, scale, workspace, out, out.shape[2])

    def gqa_rows(
        self,
        q: Tensor,
        key_pool: Tensor,
        value_pool: Tensor,
        tiles: TilePlan,
        scale: float,
        workspace: Workspace,
        out: Tensor,
    ) -> None:
        call_gqa_rows(self.functions, q, key_pool, value_pool, tiles, scale, workspace, out, out.shape[2])

    def qkv_append(
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
    ) -> None:
        assert rows_packed(qkv) and cos.is_contiguous() and sin.is_contiguous() and slots.is_contiguous()
        assert q.is_contiguous() and key_pool.is_contiguous() and value_pool.is_contiguous()
        call(
            self.functions,
            "qkv_append",
            (qkv, q_gain, k_gain, cos, sin, slots, q, key_pool, value_pool),
            qkv.data_ptr(),
            qkv.stride(0),
            qkv.stride(1),
            None if q_gain is None else q_gain.data_ptr(),
            None if k_gain is None else k_gain.data_ptr(),
            eps,
            cos.data_ptr(),
            sin.data_ptr(),
            cos.dtype == torch.float32,
            slots.data_ptr(),
            q.data_ptr(),
            key_pool.data_ptr(),
            value_pool.data_ptr(),
            qkv.shape[0],
            q.shape[1],
            (qkv.shape[1] - q.shape[1]) // 2,
            cos.shape[1],
            in_fp8(key_pool),
            torch.get_num_threads(),
        )

    def mla_extend(self, *arguments: Any) -> None:
        steps = {op: function.call for op, function in self.functions.items()}
        native_extend.mla_extend(steps, *arguments)


def call_mla_rows(
    functions: dict[str, native.Function],
    q: Tensor,
    pool: Tensor,
    tiles: TilePlan,
    scale: float,
    workspace: Workspace,
    out: Tensor,
    partial_width: int,
) -> None:
    """`partial_width`: floats that a form keeps of a row's sums in each tile."""
    assert rows_packed(q) and pool.is_contiguous() and out.is_contiguous()
    heads, rank = out.shape[1], out.shape[2]
    partials = workspace.take(PARTIALS, (tiles.entries * heads, partial_width + 2), torch.float32)
    call(
        functions,
        "mla_rows",
        (q, pool, partials, out),
        q.data_ptr(),
        q.stride(0),
        q.stride(1),
        pool.data_ptr(),
        pool.shape[1],
        q.shape[2],
        rank,
        heads,
        tiles.count,
        *tiles.addresses[:7],
        tiles.merge_rows.size,
        *tiles.addresses[7:],
        scale,
        partials.data_ptr(),
        tiles.entries,
        out.data_ptr(),
        in_fp8(pool),
        torch.get_num_threads(),
    )
    note_partials(heads * (partial_width + 2))


def call_gqa_rows(
    functions: dict[str, native.Function],
    q: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    tiles: TilePlan,
    scale: float,
    workspace: Workspace,
    out: Tensor,
    partial_width: int,
) -> None:
    """`partial_width` as above."""
    assert rows_packed(q) and key_pool.is_contiguous() and value_pool.is_contiguous() and out.is_contiguous()
    heads, width = out.shape[1], out.shape[2]
    partials = workspace.take(PARTIALS, (tiles.entries * heads, partial_width + 2), torch.float32)
    call(
        functions,
        "gqa_rows",
        (q, key_pool, value_pool, partials, out),
        q.data_ptr(),
        q.stride(0),
        q.stride(1),
        key_pool.data_ptr(),
        value_pool.data_ptr(),
        key_pool.shape[1],
        width,
        heads,
        heads_of(key_pool, width),
        tiles.count,
        *tiles.addresses[:7],
        tiles.merge_rows.size,
        *tiles.addresses[7:],
        scale,
        partials.data_ptr(),
        tiles.entries,
        out.data_ptr(),
        in_fp8(key_pool),
        torch.get_num_threads(),
    )
    note_partials(heads * (partial_width + 2))


def _specs(form: native.Form, kind: native.Kind, priority: int) -> tuple[KernelSpec, ...]:
    kernels = NativeKernels(form, kind)
    calls: tuple[tuple[str, Callable[..., Any], int | None], ...] = (
        ("linear", kernels.linear, MOST_PRODUCT_ROWS),
        ("heads_linear", kernels.heads_linear, MOST_PRODUCT_ROWS),
        ("experts", kernels.experts, MOST_PRODUCT_ROWS),
        ("mla_rows", kernels.mla_rows, MOST_ATTENTION_ROWS),
        ("gqa_rows", kernels.gqa_rows, MOST_ATTENTION_ROWS),
        ("qkv_append", kernels.qkv_append, None),
        ("rms_norm", kernels.rms_norm, None),
        ("add_rms_norm", kernels.add_rms_norm, None),
        ("rope", kernels.rope, None),
        ("latent_append", kernels.latent_append, None),
        ("route", kernels.route, None),
        # Its products are torch's, and torch's own attention in bf16 is as fast.
        *((("mla_extend", kernels.mla_extend, None),) if kind == "f32" else ()),
    )
    return tuple(
        KernelSpec(
            op=op,
            name=f"{form.name}-{kind}",
            dtypes=frozenset({DTYPES[kind]}),
            device="cpu",
            call=run,
            priority=priority,
            features=frozenset({form.feature}),
            most_rows=most_rows,
            recordable=op != "mla_extend",
            invariant=op not in VARIANT,
        )
        for op, run, most_rows in calls
    )


def moves(features: frozenset[str], dtype: Dtype) -> NativeKernels | None:
    """What copies and adds between ops: of the best form that runs here."""
    forms = (form for form in FORM_PRIORITY if form.feature in features)
    kind = next((kind for kind, named in DTYPES.items() if named == dtype), None)
    return next((NativeKernels(form, kind) for form in forms if kind in form.kinds), None) if kind else None


FORM_PRIORITY = {native.AVX512: 12, native.AVX2: 11, native.NEON: 10}
SPECS: tuple[KernelSpec, ...] = tuple(
    spec
    for form, priority in FORM_PRIORITY.items()
    if form in native.forms_here()
    for kind in form.kinds
    for spec in _specs(form, kind, priority)
)

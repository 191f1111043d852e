"""The Triton kernels as entries of the registry."""

from __future__ import annotations

from dataclasses import replace

from agentspeed_kernels.fp8_cache import ALIGN
from agentspeed_kernels.signature import Dtype, KernelSpec, Widths
from agentspeed_kernels.triton import attention, extend, fp8_kernels, grouped, invariant, kernels

FEATURE = "triton"
_FORMATS: frozenset[Dtype] = frozenset({"float32", "bfloat16"})
_POOL = {"page_tokens": Widths(multiple=16), "R": Widths(multiple=16), "rope": Widths(multiple=16)}
"""Tiles are read by descriptors: rows are multiples of 16 bytes, and a tile of at least 16 tokens lies in one page."""
_EXTEND = _POOL | {"nope": Widths(multiple=8), "value": Widths(multiple=8)}
_GROUPED = {"page_tokens": Widths(multiple=16), "W": Widths(multiple=8, most=256)}
"""Likewise; wider heads have no room for their tiles."""

_BYTES = {"R": Widths(multiple=ALIGN), "rope": Widths(multiple=ALIGN)}
_BYTE_GROUPS = {"page_tokens": Widths(multiple=16), "W": Widths(multiple=ALIGN, most=256)}
"""Of pools of bytes: the sections of a row follow each other. Only bits are moved, so any GPU takes them."""
_MOVED = frozenset({"copy_rows", "gather_pages", "scatter_pages"})
"""Ops that know no format."""

_BY_ROW = frozenset({"rms_norm", "add_rms_norm", "rope", "latent_append", "mla_rows", "gqa_rows"})
"""Ops whose kernels give each row to programs of its own, or, of attention, whose order of sums is the plan's."""
_EXPERTS = frozenset({"experts", "experts_and_shared"})
_BELOW = -10
"""Priority of the batch-invariant forms: below that of the vendor's library, which is faster."""

_IN_DTYPE: tuple[KernelSpec, ...] = tuple(
    KernelSpec(
        op=op,
        name="triton",
        dtypes=_FORMATS,
        device="cuda",
        call=call,
        priority=10,
        features=frozenset({FEATURE}),
        most_rows=most_rows,
        sizes=sizes,
        plans="triton",
        invariant=op in _BY_ROW,
        nobody=op in _EXPERTS,
    )
    for op, call, most_rows, sizes in (
        ("linear", kernels.linear, kernels.MOST_LINEAR_ROWS, {}),
        ("add_norm_linear", kernels.add_norm_linear, None, {}),
        ("mla_queries", kernels.mla_queries, None, {}),
        ("add_norm_route", kernels.add_norm_route, None, {}),
        ("experts_and_shared", kernels.experts_and_shared, None, {}),
        ("heads_linear", kernels.heads_linear, None, {}),
        ("rms_norm", kernels.rms_norm, None, {}),
        ("add_rms_norm", kernels.add_rms_norm, None, {}),
        ("rope", kernels.rope, None, {}),
        ("latent_append", kernels.latent_append, None, {}),
        ("route", kernels.route, None, {}),
        ("experts", kernels.experts, None, {}),
        ("copy_rows", kernels.copy_rows, None, {}),
        ("gather_pages", kernels.gather_pages, None, {}),
        ("scatter_pages", kernels.scatter_pages, None, {}),
        ("mla_rows", attention.mla_rows, None, _POOL),
        ("mla_extend", extend.mla_extend, None, _EXTEND),
        ("qkv_append", grouped.qkv_append, None, {}),
        ("gqa_rows", grouped.gqa_rows, None, _GROUPED),
        ("gqa_extend", grouped.gqa_extend, None, _GROUPED),
    )
)
_IN_FP8: tuple[KernelSpec, ...] = tuple(
    KernelSpec(
        op=op,
        name="triton-fp8",
        dtypes=_FORMATS,
        device="cuda",
        call=call,
        priority=10,
        features=frozenset({FEATURE, "fp8"}),
        layout="blocks",
        weights=frozenset({"fp8"}),
        nobody=op in _EXPERTS,
    )
    for op, call in (
        ("linear", fp8_kernels.linear),
        ("add_norm_linear", fp8_kernels.add_norm_linear),
        ("experts", fp8_kernels.experts),
        ("experts_and_shared", fp8_kernels.experts_and_shared),
    )
)
_CALLS = {spec.op: spec for spec in _IN_DTYPE}
_BYTE_POOLS: tuple[KernelSpec, ...] = tuple(
    replace(
        _CALLS[op],
        name="triton-fp8-cache",
        dtypes=_FORMATS if op in _MOVED else frozenset({"bfloat16"}),
        cache=frozenset({"fp8"}),
        sizes=sizes,
    )
    for op, sizes in (
        ("latent_append", _BYTES),
        ("mla_queries", _BYTES),
        ("mla_rows", _POOL),
        ("mla_extend", _EXTEND),
        ("qkv_append", _BYTE_GROUPS),
        ("gqa_rows", _BYTE_GROUPS),
        ("gqa_extend", _BYTE_GROUPS),
        ("copy_rows", {}),
        ("gather_pages", {}),
        ("scatter_pages", {}),
    )
)
_INVARIANT: tuple[KernelSpec, ...] = tuple(
    KernelSpec(
        op=op,
        name="triton-blocks",
        dtypes=_FORMATS,
        device="cuda",
        call=call,
        priority=_BELOW,
        features=frozenset({FEATURE}),
        invariant=True,
    )
    for op, call in (
        ("linear", invariant.linear),
        ("heads_linear", invariant.heads_linear),
        ("route", invariant.route),
        ("experts", invariant.experts),
        ("qkv_append", grouped.qkv_append_by_head),
    )
)
_INVARIANT_BYTES = tuple(
    replace(spec, name=f"{spec.name}-fp8-cache", dtypes=frozenset({"bfloat16"}), cache=frozenset({"fp8"}),
            sizes=_BYTE_GROUPS)
    for spec in _INVARIANT
    if spec.op == "qkv_append"
)  # fmt: skip
SPECS: tuple[KernelSpec, ...] = (*_IN_DTYPE, *_IN_FP8, *_BYTE_POOLS, *_INVARIANT, *_INVARIANT_BYTES)

"""The torch kernels, which run on any device, as what CUDA falls back to: formats and sizes Triton's do not take.

Attention, `experts` and `copy_rows` among them wait for the device in every layer: they are right, not fast."""

from __future__ import annotations

from agentspeed_kernels.cpu import torch_attention, torch_fused, torch_grouped, torch_kernels, torch_sparse
from agentspeed_kernels.signature import Dtype, KernelSpec

FEATURE = "cuda"
_FORMATS: frozenset[Dtype] = frozenset({"float32", "float64", "bfloat16"})

SPECS: tuple[KernelSpec, ...] = tuple(
    KernelSpec(
        op=op, name="torch-cuda", dtypes=_FORMATS, device="cuda", call=call, priority=0, features=frozenset({FEATURE})
    )
    for op, call in (
        ("linear", torch_kernels.linear),
        ("heads_linear", torch_kernels.heads_linear),
        ("rms_norm", torch_kernels.rms_norm),
        ("add_rms_norm", torch_kernels.add_rms_norm),
        ("add_norm_linear", torch_fused.add_norm_linear),
        ("mla_queries", torch_fused.mla_queries),
        ("add_norm_route", torch_fused.add_norm_route),
        ("experts_and_shared", torch_fused.experts_and_shared),
        ("rope", torch_kernels.rope),
        ("latent_append", torch_kernels.latent_append),
        ("route", torch_kernels.route),
        ("gather_pages", torch_fused.gather_pages),
        ("scatter_pages", torch_fused.scatter_pages),
        ("copy_rows", torch_fused.copy_rows),
        ("experts", torch_kernels.experts),
        ("mla_rows", torch_attention.mla_rows),
        ("mla_extend", torch_attention.mla_extend),
        ("qkv_append", torch_grouped.qkv_append),
        ("gqa_rows", torch_grouped.gqa_rows),
        ("gqa_extend", torch_grouped.gqa_extend),
        ("index_append", torch_sparse.index_append),
        ("index_select", torch_sparse.index_select),
        ("mla_selected", torch_sparse.mla_selected),
    )
)

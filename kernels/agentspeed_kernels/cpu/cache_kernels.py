"""The kernels in C that read and write pools, for pools in fp8: the same calls, which tell a pool by its format."""

from __future__ import annotations

from dataclasses import replace

from agentspeed_kernels.cpu import amx_kernels, invariant_kernels, native_kernels
from agentspeed_kernels.fp8_cache import LEAST_HEAD
from agentspeed_kernels.signature import KernelSpec, Widths

_SIZES: dict[str, dict[str, Widths]] = {
    "latent_append": {},
    "mla_rows": {},
    "mla_extend": {},
    "qkv_append": {"W": Widths(least=LEAST_HEAD)},
    "gqa_rows": {"W": Widths(least=LEAST_HEAD)},
    "gqa_extend": {"W": Widths(least=LEAST_HEAD)},
}
SPECS: tuple[KernelSpec, ...] = tuple(
    replace(spec, name=f"{spec.name}-fp8-cache", cache=frozenset({"fp8"}), sizes=_SIZES[spec.op])
    for spec in (*native_kernels.SPECS, *invariant_kernels.SPECS, *amx_kernels.SPECS)
    if spec.op in _SIZES
)

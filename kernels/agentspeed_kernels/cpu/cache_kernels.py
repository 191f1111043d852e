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


def for_bytes(spec: KernelSpec) -> KernelSpec:
    """The kernel for pools in fp8, of the sizes that it takes of numbers and that rows of bytes can tell."""
    sizes = dict(spec.sizes)
    for axis, limit in _SIZES[spec.op].items():
        sizes[axis] = sizes.get(axis, Widths()) & limit
    return replace(spec, name=f"{spec.name}-fp8-cache", cache=frozenset({"fp8"}), sizes=sizes)


SPECS: tuple[KernelSpec, ...] = tuple(
    for_bytes(spec)
    for spec in (*native_kernels.SPECS, *invariant_kernels.SPECS, *amx_kernels.SPECS)
    if spec.op in _SIZES
)

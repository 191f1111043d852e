"""The list of kernels that exist; a second kernel of one name is refused, never shadowed."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace
from importlib.metadata import entry_points
from typing import final

from agentspeed_kernels.ops import OPS
from agentspeed_kernels.signature import Dtype, KernelSpec

ENTRY_POINTS = "agentspeed.kernels"
log = logging.getLogger("agentspeed.kernels")


class RegistryError(ValueError):
    """A kernel that cannot be registered."""


@final
class Registry:
    """Kernels by op, in registration order."""

    __slots__ = ("_by_op",)

    def __init__(self, specs: Iterable[KernelSpec] = ()) -> None:
        self._by_op: dict[str, dict[str, KernelSpec]] = {op: {} for op in OPS}
        for spec in specs:
            self.add(spec)

    def add(self, spec: KernelSpec) -> None:
        if spec.op not in self._by_op:
            raise RegistryError(f"{spec} is for an unknown op. Ops are {', '.join(sorted(self._by_op))}.")
        held = self._by_op[spec.op]
        if spec.name in held:
            raise RegistryError(f"{spec} is registered twice. Give one of them another name.")
        equal = [other for other in held.values() if _same_rank(other, spec)]
        if equal:
            raise RegistryError(
                f"{spec} and {equal[0]} have the same priority for the same formats. Change one priority."
            )
        held[spec.name] = spec

    def candidates(self, op: str) -> tuple[KernelSpec, ...]:
        return tuple(self._by_op[op].values())

    def __iter__(self) -> Iterator[KernelSpec]:
        return (spec for held in self._by_op.values() for spec in held.values())


def _same_rank(left: KernelSpec, right: KernelSpec) -> bool:
    if left.priority != right.priority or left.device != right.device:
        return False
    shared: Iterable[Dtype] = left.dtypes & right.dtypes
    return any(
        (left.weights or {dtype}) & (right.weights or {dtype}) and (left.cache or {dtype}) & (right.cache or {dtype})
        for dtype in shared
    )


def standard() -> Registry:
    """The project's kernels plus those of installed packages (entry points: a callable returning specs).

    A package that fails to load, or whose kernel cannot be registered, is left out with a warning that names it: it
    must not take the engine with it. `select.Kernels` checks what its kernels compute when one is first chosen."""
    from agentspeed_kernels.cpu import (
        amx_kernels,
        cache_kernels,
        fp8_kernels,
        int8_kernels,
        invariant_kernels,
        native_kernels,
        torch_bytes,
        torch_fp8_cache,
        torch_fused,
        torch_kernels,
        torch_widened,
        widened_kernels,
    )
    from agentspeed_kernels.triton import portable, specs

    registry = Registry(
        (
            *torch_kernels.SPECS,
            *torch_fused.SPECS,
            *torch_bytes.SPECS,
            *torch_fp8_cache.SPECS,
            *cache_kernels.SPECS,
            *native_kernels.SPECS,
            *invariant_kernels.SPECS,
            *amx_kernels.SPECS,
            *int8_kernels.SPECS,
            *fp8_kernels.SPECS,
            *torch_widened.SPECS,
            *widened_kernels.SPECS,
            *portable.SPECS,
            *specs.SPECS,
        )
    )
    for point in entry_points(group=ENTRY_POINTS):
        name = str(getattr(point, "name", point))
        try:
            offered = [replace(spec, origin=name) for spec in point.load()()]
        except Exception as error:  # noqa: BLE001 - foreign code may raise anything; the warning below names it
            log.warning("kernels of %s are left out: loading them failed: %s: %s", name, type(error).__name__, error)
            continue
        for spec in offered:
            try:
                registry.add(spec)
            except RegistryError as error:
                log.warning("a kernel of %s is left out: %s", name, error)
    return registry

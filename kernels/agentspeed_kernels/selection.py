"""Chooses a kernel for a need: pure, and able to say why every other candidate was passed over."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from agentspeed_kernels.cpu.native_kernels import moves
from agentspeed_kernels.ops import WEIGHT_OPS
from agentspeed_kernels.packing import Weight, pack
from agentspeed_kernels.platform import Platform
from agentspeed_kernels.registry import Registry
from agentspeed_kernels.signature import Dtype, KernelSpec, Layout, Need

log = logging.getLogger("agentspeed.kernels")


class NoKernel(LookupError):
    """Nothing registered can serve a need; the message lists every candidate with its reason."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    kernel: KernelSpec
    rejected: tuple[tuple[KernelSpec, str], ...]

    def explain(self) -> str:
        others = "; ".join(f"not {spec.name}: {why}" for spec, why in self.rejected)
        return f"{self.kernel.op}: {self.kernel.name}" + (f" ({others})" if others else "")


def select(need: Need, candidates: tuple[KernelSpec, ...], platform: Platform) -> Choice:
    """The fitting candidate of highest priority."""
    rejected = [(spec, why) for spec in candidates if (why := _misfit(spec, need, platform)) is not None]
    unfit = {spec.name for spec, _ in rejected}
    fitting = sorted((spec for spec in candidates if spec.name not in unfit), key=lambda spec: -spec.priority)
    if not fitting:
        reasons = "; ".join(f"{spec.name}: {why}" for spec, why in rejected) or "none is registered"
        raise NoKernel(f"no kernel for {need.op} in {need.dtype} with {need.rows} rows on {platform.device}: {reasons}")
    best = fitting[0]
    rejected += [(spec, f"priority {spec.priority} is below {best.priority}") for spec in fitting[1:]]
    return Choice(kernel=best, rejected=tuple(rejected))


def _misfit(spec: KernelSpec, need: Need, platform: Platform) -> str | None:
    if spec.device != platform.device:
        return f"runs on {spec.device}"
    if need.dtype not in spec.dtypes:
        return f"formats are {', '.join(sorted(spec.dtypes))}"
    for feature in sorted(spec.features - platform.features):
        why = platform.absent.get(feature) or platform.lacks.get(feature, "absent")
        return f"needs {feature}: {why}"
    if spec.most_rows is not None and need.rows > spec.most_rows:
        return f"up to {spec.most_rows} rows"
    if need.layout is not None and spec.layout != need.layout:
        return f"takes weights in {spec.layout}, not {need.layout}"
    return None


@final
class Ladder:
    """The choices of one op over the number of rows, made once; a step only compares integers."""

    __slots__ = ("_bands", "_last")

    def __init__(self, bands: tuple[tuple[int, Choice], ...], last: Choice) -> None:
        self._bands = tuple((most, choice.kernel.call, choice.kernel) for most, choice in bands)
        self._last = (last.kernel.call, last.kernel)

    def at(self, rows: int) -> Callable[..., Any]:
        for most, call, _ in self._bands:
            if rows <= most:
                return call
        return self._last[0]

    def kernel(self, rows: int) -> KernelSpec:
        return next((kernel for most, _, kernel in self._bands if rows <= most), self._last[1])


UNBOUNDED = 1 << 62


@final
class Kernels:
    """All ops for one dtype on one platform."""

    __slots__ = ("_ladders", "_moves", "dtype", "layout")

    def __init__(self, registry: Registry, platform: Platform, dtype: Dtype, ops: tuple[str, ...]) -> None:
        self.dtype: Dtype = dtype
        self.layout: Layout = _layout(registry, platform, dtype)
        """Of all weights: that of the best kernel for single rows, where weights are what a step waits for."""
        self._ladders = {op: _ladder(registry.candidates(op), platform, dtype, op, self.layout) for op in ops}
        self._moves = moves(platform.features, dtype)
        for feature, why in platform.absent.items():
            log.warning("slower kernels run because %s is absent: %s", feature, why)

    def __getitem__(self, op: str) -> Ladder:
        return self._ladders[op]

    def weight(self, held: Tensor, parts: int = 1) -> Weight:
        """`held` [..., N, K] as the kernels want it (`parts` as in `pack`). Keep the result and drop `held`: then there
        is no second copy."""
        return held if self.layout == "rows" else pack(held, parts)

    def copy(self, x: Tensor, out: Tensor) -> None:
        """out[T, H, N] = x; both may be strided. Like `add`, what lies between ops: part of a recorded step."""
        if self._moves is None:
            out.copy_(x)
        else:
            self._moves.copy(x, out)

    def add(self, x: Tensor, total: Tensor) -> None:
        """total += x, both contiguous."""
        if self._moves is None:
            total.add_(x)
        else:
            self._moves.add(x, total)

    def recordable(self, ops: tuple[str, ...], rows: int) -> bool:
        """A step of these ops and `rows` tokens is nothing but calls of the C library."""
        return all(self._ladders[op].kernel(rows).recordable for op in ops)


def _layout(registry: Registry, platform: Platform, dtype: Dtype) -> Layout:
    need = Need(op="linear", dtype=dtype, rows=1)
    return select(need, registry.candidates("linear"), platform).kernel.layout


def _ladder(candidates: tuple[KernelSpec, ...], platform: Platform, dtype: Dtype, op: str, layout: Layout) -> Ladder:
    asked = layout if op in WEIGHT_OPS else None
    edges = sorted({spec.most_rows for spec in candidates if spec.most_rows is not None})
    bands = tuple(
        (edge, select(Need(op=op, dtype=dtype, rows=edge, layout=asked), candidates, platform)) for edge in edges
    )
    last = select(Need(op=op, dtype=dtype, rows=UNBOUNDED, layout=asked), candidates, platform)
    for edge, choice in bands:
        log.info("%s up to %d rows: %s", dtype, edge, choice.explain())
    log.info("%s: %s", dtype, last.explain())
    return Ladder(bands, last)

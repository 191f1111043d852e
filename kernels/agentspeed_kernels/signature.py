"""What a kernel says about itself, so that choosing one needs no trial call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, final

Dtype = Literal["float32", "float64", "bfloat16"]
Device = Literal["cpu", "cuda"]
Layout = Literal["rows", "tiles"]
"""Of weights: as the checkpoint has them, or in the order of matrix tiles (`packing`)."""
DTYPE_BYTES: dict[Dtype, int] = {"float32": 4, "float64": 8, "bfloat16": 2}


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """The least a call can move and compute; its ratio to measured time is the kernel's distance to the limit."""

    bytes: int
    flops: int

    def limit_seconds(self, bytes_per_second: float, flops_per_second: float) -> float:
        return max(self.bytes / bytes_per_second, self.flops / flops_per_second)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSpec:
    """One implementation of one op."""

    op: str
    name: str
    dtypes: frozenset[Dtype]
    """Formats of the activations and weights; every role of a call has the same one."""
    device: Device
    call: Callable[..., Any]
    priority: int
    """The highest one that fits is chosen. 0 portable, 10 tuned for a class of machines."""
    features: frozenset[str] = frozenset()
    """Platform features without which it cannot run."""
    most_rows: int | None = None
    """Above this many query rows another kernel is faster or this one does not apply."""
    recordable: bool = False
    """Its calls go to the C library alone, so `cpu.recording` can repeat them."""
    layout: Layout = "rows"
    """What its weights must be in; means nothing for an op without weights."""

    def __repr__(self) -> str:
        return f"<kernel {self.op}/{self.name}>"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What a caller asks for."""

    op: str
    dtype: Dtype
    rows: int
    """Query rows (tokens) of the call."""
    layout: Layout | None = None
    """What the weights are in; None: any, or the op has none."""

"""What a kernel says about itself, so that choosing one needs no trial call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import lcm
from typing import Any, Literal, final

Dtype = Literal["float32", "float64", "bfloat16"]
Device = Literal["cpu", "cuda"]
ByteFormat = Literal["int8", "int8-32", "fp8"]
"""Of weights that are kept in 8 bits: `quantised` says how the first two are, `fp8_blocks` the last."""
WeightFormat = Literal[ByteFormat, "bfloat16"]
"""Of weights that are kept in another format than that of the activations. bfloat16, for activations in float32: those
of a checkpoint that is stored so, of which no number changes."""
CacheFormat = Literal["fp8"]
"""Of rows of the cache that are not kept in the format of the activations: `fp8_cache` says how."""
Layout = Literal["rows", "tiles", "bytes", "blocks"]
"""Of weights: as the checkpoint has them, in the order of matrix tiles (`packing`), in int8 (`quantised`), or in fp8
(`fp8_blocks`)."""
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
class Widths:
    """What sizes of one axis a kernel takes; axes are named as in `ops`, `page_tokens` among them."""

    multiple: int = 1
    least: int = 1
    most: int | None = None

    def __and__(self, other: Widths) -> Widths:
        """What both take."""
        ends = [end for end in (self.most, other.most) if end is not None]
        return Widths(
            multiple=lcm(self.multiple, other.multiple),
            least=max(self.least, other.least),
            most=min(ends, default=None),
        )

    def objection(self, axis: str, size: int) -> str | None:
        if size % self.multiple:
            return f"{axis} is a multiple of {self.multiple}, not {size}"
        if size < self.least:
            return f"{axis} is {self.least} or more, not {size}"
        if self.most is not None and size > self.most:
            return f"{axis} is up to {self.most}, not {size}"
        return None


OWN = "agentspeed"
"""Origin of the project's kernels; others carry the name of their entry point."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSpec:
    """One implementation of one op."""

    op: str
    name: str
    dtypes: frozenset[Dtype]
    """Formats of the activations, and of every role below that names none of its own."""
    device: Device
    call: Callable[..., Any]
    """Typed by the op's Protocol in `ops`."""
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
    weights: frozenset[str] | None = None
    """Formats of the weights; None: that of the activations."""
    cache: frozenset[str] | None = None
    """Formats of the pools; None: that of the activations."""
    sizes: Mapping[str, Widths] = field(default_factory=dict)
    """Limits on axes; an axis that is not named may have any size."""
    invariant: bool = False
    """A row of its output has the same bits whatever other rows are in the call and however many they are; of
    attention, where the plan is cut at fixed places (`AttentionBackend`)."""
    plans: Literal["tiles", "triton"] = "tiles"
    """Of attention: whose plan it takes, that of `cpu.attention_plan` or of `triton.backend`."""
    extend_from: int | None = None
    """Of attention of many new rows: from so many of a branch on it costs less than the kernel of few. None: what the
    backend takes for granted."""
    nobody: bool = False
    """Of experts: the id after the last one is nobody's, and nothing is computed for it."""
    origin: str = OWN

    def __repr__(self) -> str:
        return (
            f"<kernel {self.op}/{self.name}>"
            if self.origin == OWN
            else f"<kernel {self.op}/{self.name} of {self.origin}>"
        )


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What a caller asks for."""

    op: str
    dtype: Dtype
    """Format of the activations."""
    rows: int
    """Query rows (tokens) of the call."""
    layout: Layout | None = None
    """What the weights are in; None: any, or the op has none."""
    weights: str | None = None
    cache: str | None = None
    """None: the format of the activations."""
    invariant: bool = False
    """Only kernels that are batch-invariant serve it."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Axes that are known; a limit on an axis that is not named here objects to nothing."""

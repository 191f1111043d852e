"""Where a value lives over the axes of a mesh of ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, final

from agentspeed_engine.spmd.experts import Exchange, ExpertSpread

Axis = Literal["dp", "tp"]
AXES: tuple[Axis, ...] = ("dp", "tp")
TOKENS = 0
"""The dim of the token axis: its shards may be uneven and come from the step's tokens per rank."""
FEATURES = -1
"""The last dim: its shards are equal."""


@final
@dataclass(frozen=True, slots=True)
class Replicate:
    """Every rank holds the whole value."""

    def __str__(self) -> str:
        return "R"


@final
@dataclass(frozen=True, slots=True)
class Shard:
    """Rank i holds the i-th piece along `dim`."""

    dim: int

    def __str__(self) -> str:
        return "S(tokens)" if self.dim == TOKENS else "S(features)" if self.dim == FEATURES else f"S({self.dim})"


@final
@dataclass(frozen=True, slots=True)
class Partial:
    """The value is the sum over the ranks."""

    def __str__(self) -> str:
        return "P"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Owners:
    """A row lies on every rank that has an expert it chose: on several, or on none. Its home rank keeps its place."""

    share: float
    """The part of a rank's rows that another rank is expected to be sent."""
    extra: int
    """Bytes that are sent with a row: which experts it chose, and their weights."""

    def __str__(self) -> str:
        return "E"


Placement = Replicate | Shard | Partial | Owners


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One placement per axis."""

    dp: Placement
    tp: Placement

    def on(self, axis: Axis) -> Placement:
        return self.dp if axis == "dp" else self.tp

    def replaced(self, axis: Axis, placement: Placement) -> Layout:
        return Layout(dp=placement, tp=self.tp) if axis == "dp" else Layout(dp=self.dp, tp=placement)

    def __str__(self) -> str:
        return f"{self.dp}@dp {self.tp}@tp"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """dp × tp ranks; rank = dp index * tp + tp index."""

    dp: int = 1
    tp: int = 1
    experts: ExpertSpread = field(default_factory=ExpertSpread)

    def __post_init__(self) -> None:
        if self.dp < 1 or self.tp < 1:
            raise ValueError(f"a mesh has at least one rank on each axis, not dp={self.dp} tp={self.tp}")

    @property
    def size(self) -> int:
        return self.dp * self.tp

    @property
    def expert_groups(self) -> int:
        """Groups of ranks that have routed experts of their own."""
        return self.experts.groups or self.size

    @property
    def exchange(self) -> Exchange:
        """How rows find their experts. One dp rank has nobody to exchange rows with: tp ranks have the same ones."""
        return self.experts.exchange if self.dp > 1 else "sum"

    def extent(self, axis: Axis) -> int:
        return self.dp if axis == "dp" else self.tp

    def rank(self, index: int) -> Rank:
        return Rank(mesh=self, dp=index // self.tp, tp=index % self.tp)

    def ranks(self) -> tuple[Rank, ...]:
        return tuple(self.rank(index) for index in range(self.size))


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """One place on a mesh."""

    mesh: Mesh
    dp: int
    tp: int

    @property
    def index(self) -> int:
        return self.dp * self.mesh.tp + self.tp

    @property
    def expert_group(self) -> int:
        """Whose experts it has."""
        return self.index // (self.mesh.size // self.mesh.expert_groups)

    @property
    def expert_part(self) -> tuple[int, int]:
        """(Which piece, of how many) of each of them."""
        each = self.mesh.size // self.mesh.expert_groups
        return self.index % each, each


ONE = Mesh().rank(0)

"""Inserts the collectives a chain needs on a mesh, and prices them. Pure: declarations in, plan out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

from agentspeed_engine.spmd.placement import (
    AXES,
    TOKENS,
    Axis,
    Layout,
    Mesh,
    Owners,
    Partial,
    Placement,
    Replicate,
    Shard,
)
from agentspeed_engine.spmd.spec import Boundary

Kind = Literal["all_reduce", "reduce_scatter", "all_gather", "slice", "dispatch", "combine"]
"""`dispatch` and `combine` are the two ways of an all-to-all: rows to the ranks of their experts, and results back."""
Value = Literal["x", "residual"]


class PlanError(ValueError):
    """No legal transition between two neighbours; the message names both."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """Run module `module` of the chain."""

    module: int


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Collective:
    """Move one value of the chain from one placement to another along one axis."""

    kind: Kind
    axis: Axis
    value: Value
    dim: int
    """Of the shard; for all_reduce it means nothing and is 0."""
    width: int
    """Features of the whole value."""
    between: tuple[str, str]
    owners: Owners | None = None
    """Of a dispatch or a combine."""

    def bytes_moved(self, mesh: Mesh, tokens: int, item_bytes: int) -> int:
        """What each rank sends for `tokens` rows of the whole value: over a ring, or to every owner of its rows."""
        extent = mesh.extent(self.axis)
        if self.owners is not None:
            sent = tokens / extent * self.owners.share * (extent - 1)
            return math.ceil(sent * (self.width * item_bytes + (self.owners.extra if self.kind == "dispatch" else 0)))
        whole = tokens * self.width * item_bytes
        return self.hops * whole * (extent - 1) // extent

    @property
    def hops(self) -> int:
        """How often a ring passes the whole value on. A reduce-scatter is run as an all-reduce whose result is cut
        (`distributed`: gloo has none for uneven shards), so it costs as much."""
        return {"all_reduce": 2, "reduce_scatter": 2, "all_gather": 1}.get(self.kind, 0)

    @property
    def launches(self) -> int:
        """A dispatch first tells how many rows it brings."""
        return {"slice": 0, "dispatch": 2}.get(self.kind, 1)

    def __str__(self) -> str:
        return f"{self.kind}({self.value}@{self.axis}) between {self.between[0]} and {self.between[1]}"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class SumCall:
    """Sum the value over an axis and call the module that adds it to the residual, in one pass. By definition: the
    all-reduce, then the call."""

    reduce: Collective
    module: int


Step = Call | Collective | SumCall


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    mesh: Mesh
    steps: tuple[Step, ...]

    @property
    def collectives(self) -> tuple[Collective, ...]:
        """Those of fused steps among them."""
        found = (step.reduce if isinstance(step, SumCall) else step for step in self.steps)
        return tuple(step for step in found if isinstance(step, Collective))

    @property
    def fused(self) -> int:
        """Collectives that are no step of their own."""
        return sum(isinstance(step, SumCall) for step in self.steps)

    def price(self, tokens: int, item_bytes: int) -> tuple[int, int]:
        """(bytes each rank sends, launches) for one forward pass."""
        moved = sum(step.bytes_moved(self.mesh, tokens, item_bytes) for step in self.collectives)
        return moved, sum(step.launches for step in self.collectives)


def plan(chain: Sequence[Boundary], mesh: Mesh, *, start: Layout, finish: Layout) -> Plan:
    """Steps that run `chain` on `mesh`, from a value laid out as `start` to one laid out as `finish`.

    The residual is a second value with a layout of its own, from the first module that names one to the end.
    """
    steps: list[Step] = []
    held, residual, width, before = start, None, 0, "the input"
    for index, module in enumerate(chain):
        steps += transitions(held, module.input, mesh, "x", width, (before, module.name))
        if module.residual is not None:
            if residual is not None:
                steps += transitions(residual, module.residual, mesh, "residual", width, (before, module.name))
            residual = module.residual
        steps.append(Call(module=index))
        held, width, before = module.output, module.width, module.name
    steps += transitions(held, finish, mesh, "x", width, (before, "the output"))
    return Plan(mesh=mesh, steps=tuple(steps))


def fuse(made: Plan, chain: Sequence[Boundary]) -> Plan:
    """The same plan with every all-reduce in one step with the module that adds its result to the residual, where the
    one directly follows the other: no other collective is between them, on the residual or along another axis."""
    steps: list[Step] = []
    for step in made.steps:
        last = steps[-1] if steps else None
        if (
            isinstance(step, Call)
            and chain[step.module].sums
            and isinstance(last, Collective)
            and (last.kind, last.value) == ("all_reduce", "x")
        ):
            steps[-1] = SumCall(reduce=last, module=step.module)
        else:
            steps.append(step)
    return Plan(mesh=made.mesh, steps=tuple(steps))


def transitions(
    held: Layout, wanted: Layout, mesh: Mesh, value: Value, width: int, between: tuple[str, str]
) -> list[Collective]:
    """The collectives from one layout to another; none along an axis of one rank."""
    found: list[Collective] = []
    for axis in AXES:
        if mesh.extent(axis) == 1 or held.on(axis) == wanted.on(axis):
            continue
        if found and _same_dim_on_both(held, wanted):
            raise PlanError(
                f"{between[0]} gives {held} and {between[1]} takes {wanted}: both axes cut the same dim. "
                "Let one of the two modules take or give a replicated value."
            )
        kind, dim = _kind(held.on(axis), wanted.on(axis), axis, between)
        if kind in ("slice", "reduce_scatter", "all_gather") and dim != 0 and width % mesh.extent(axis):
            raise PlanError(
                f"{width} features between {between[0]} and {between[1]} do not divide by {mesh.extent(axis)} "
                f"{axis} ranks. Choose a mesh whose {axis} divides them."
            )
        sides = (held.on(axis), wanted.on(axis))
        owners = next((side for side in sides if isinstance(side, Owners)), None)
        found.append(
            Collective(kind=kind, axis=axis, value=value, dim=dim, width=width, between=between, owners=owners)
        )
    return found


def _kind(held: Placement, wanted: Placement, axis: Axis, between: tuple[str, str]) -> tuple[Kind, int]:
    """The transition table."""
    match held, wanted:
        case Partial(), Replicate():
            return "all_reduce", 0
        case Partial(), Shard(dim):
            return "reduce_scatter", dim
        case Shard(dim), Replicate():
            return "all_gather", dim
        case Replicate(), Shard(dim):
            return "slice", dim
        case Shard(dim), Owners() if dim == TOKENS:
            return "dispatch", dim
        case Owners(), Shard(dim) if dim == TOKENS:
            return "combine", dim
        case _:
            raise PlanError(
                f"{between[0]} gives {held} along {axis} and {between[1]} takes {wanted}: no transition does that. "
                f"Declare {between[1]} to take R, or {between[0]} to give P or R."
            )


def _same_dim_on_both(held: Layout, wanted: Layout) -> bool:
    cut = [
        side.dim
        for axis in AXES
        for side in (held.on(axis), wanted.on(axis))
        if isinstance(side, Shard) and held.on(axis) != wanted.on(axis)
    ]
    return len(cut) > 1 and len(set(cut)) < len(cut)

"""What a plan comes to on every rank, as values: shapes before and after each step, and what it sends. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

from agentspeed_engine.spmd.experts import Exchange
from agentspeed_engine.spmd.machine import MeshChoice
from agentspeed_engine.spmd.placement import AXES, TOKENS, Axis, Layout, Mesh, Owners, Placement, Replicate, Shard
from agentspeed_engine.spmd.plan import Call, Collective, Plan, SumCall, Value
from agentspeed_engine.spmd.spec import Boundary

Shape = tuple[int, ...]
SPARE_PART = 16
"""One part in so many of a memory is neither weights nor cache: what lies between and inside kernels needs some."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class StepLine:
    """One step of a plan on one rank."""

    kind: str
    """`call`, or the collective's kind."""
    name: str
    """The module that is called, or the two that a collective stands between."""
    value: Value
    axis: Axis | None
    """Of a collective."""
    before: Shape
    """Of the value on one rank. Token ids are [rows]."""
    after: Shape
    bytes_sent: int
    """By each rank: over a ring, or to the owners of its rows as many as are expected."""
    launches: int
    fused: bool = False
    """Of a collective: in one pass with the module behind it."""


def step_lines(
    plan: Plan, chain: Sequence[Boundary], *, rows: int, start: Layout, item_bytes: int
) -> tuple[StepLine, ...]:
    """Every step when each dp rank has `rows` tokens and all their logits are wanted. `plan` was made of `chain` from
    `start`; a value has `item_bytes` an element."""
    mesh = plan.mesh
    x, width = start, 0
    residual, residual_width = start, 0
    found: list[StepLine] = []
    for step, fused in _apart(plan):
        if isinstance(step, Call):
            module = chain[step.module]
            if module.residual is not None:
                residual, residual_width = module.residual, width if width else module.width
            before = local_shape(x, width, mesh, rows)
            x, width = module.output, module.width
            after = local_shape(x, width, mesh, rows)
            found.append(StepLine(kind="call", name=module.name, value="x", axis=None, before=before, after=after,
                                  bytes_sent=0, launches=0))  # fmt: skip
            continue
        held, wide = (x, width) if step.value == "x" else (residual, residual_width)
        moved = held.replaced(step.axis, _placed(step))
        before, after = local_shape(held, wide, mesh, rows), local_shape(moved, wide, mesh, rows)
        found.append(StepLine(kind=step.kind, name=" > ".join(step.between), value=step.value, axis=step.axis,
                              before=before, after=after, launches=step.launches, fused=fused,
                              bytes_sent=_bytes_sent(step, mesh, before, item_bytes)))  # fmt: skip
        if step.value == "x":
            x = moved
        else:
            residual = moved
    return tuple(found)


def _apart(plan: Plan) -> Iterator[tuple[Call | Collective, bool]]:
    """Every step, and whether it is fused with the next; those of a fused one by one."""
    for step in plan.steps:
        if isinstance(step, SumCall):
            yield step.reduce, True
            yield Call(module=step.module), False
        else:
            yield step, False


def local_shape(layout: Layout, width: int, mesh: Mesh, rows: int) -> Shape:
    """Of one rank's piece of a value of `width` features; 0 stands for token ids. `rows` are those of a dp rank."""
    tokens, features = rows * mesh.dp, width
    for axis in AXES:
        placement = layout.on(axis)
        if isinstance(placement, Shard):
            if placement.dim == TOKENS:
                tokens //= mesh.extent(axis)
            else:
                features //= mesh.extent(axis)
        elif isinstance(placement, Owners):  # as many as are expected
            tokens = math.ceil(tokens * placement.share)
    return (tokens, features) if width else (tokens,)


def _placed(step: Collective) -> Placement:
    if step.kind == "dispatch":
        assert step.owners is not None
        return step.owners
    return Shard(step.dim) if step.kind in ("slice", "reduce_scatter", "combine") else Replicate()


def _bytes_sent(step: Collective, mesh: Mesh, before: Shape, item_bytes: int) -> int:
    """A ring over what the ranks of one group hold together; rows to their owners, and what those give back."""
    extent = mesh.extent(step.axis)
    if step.owners is not None:
        rows, width = before
        if step.kind == "dispatch":
            return math.ceil(rows * step.owners.share * (extent - 1) * (width * item_bytes + step.owners.extra))
        return rows * width * item_bytes * (extent - 1) // extent
    whole = math.prod(before) * item_bytes * (extent if step.kind == "all_gather" else 1)
    return step.hops * whole * (extent - 1) // extent


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class AxisLimit:
    """How far one axis of a mesh can be doubled while the other stays as it is."""

    axis: Axis
    most: int
    """The largest extent that divides the model, of those doublings."""
    fails_at: int
    reason: str


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What a memory per GPU leaves for the cache."""

    memory: int
    cache: int
    """Bytes of a rank; negative where the weights alone are too large."""
    tokens: int
    """Whole pages of a rank's cache, in tokens; 0 where nothing fits."""
    largest_context: int
    """Of one session: what fits, at most the model's own limit."""
    session_tokens: int
    """The context that `sessions` are counted for."""
    sessions: int
    """So long, on all dp ranks together."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPlan:
    """One model on one mesh. All bytes are of one rank: of the first, and no other has more."""

    model_type: str
    dtype: str
    weights: str | None
    """Format of the matrices; None: `dtype`."""
    cache: str | None
    """Format of the KV cache; None: `dtype`."""
    tp: int
    dp: int
    experts: int
    """Routed ones of a layer, spare copies left out; 0 where there are none."""
    ep: int
    """Groups of ranks with experts of their own."""
    exchange: Exchange
    """How rows find their experts."""
    spare_experts: int
    rows: int
    """Of a dp rank in the step that the shapes are given for."""
    parameters: int
    """Of the model, layers for drafting left out."""
    active_parameters: int
    """That a token is multiplied with: of the routed experts those it visits, and no table of embeddings."""
    context_limit: int
    """The model's own."""
    weight_bytes: int
    cache_bytes_per_token: int
    workspace_bytes: int
    """Buffers between kernels in a step of `rows`; not what attention kernels take for themselves."""
    steps: tuple[StepLine, ...]
    bytes_per_token: int
    """That each rank sends for one token of its step."""
    launches: int
    """Of collectives, for one step and thus for one token of each session in it."""
    fused: int
    """Of the collectives: all-reduces that are one pass with the addition to the residual and the norm behind them."""
    limits: tuple[AxisLimit, ...]
    room: Room | None
    """None where no memory was named."""
    choice: MeshChoice | None
    """None where no machine was named."""

    @property
    def collectives(self) -> tuple[StepLine, ...]:
        """The steps that move something between ranks."""
        return tuple(step for step in self.steps if step.kind != "call")


def room_in(
    memory: int, *, weights: int, workspace: int, bytes_per_token: int, page_tokens: int, limit: int,
    session_tokens: int | None, dp: int,
) -> Room:  # fmt: skip
    """`session_tokens`: None counts sessions of the largest context."""
    cache = memory - memory // SPARE_PART - weights - workspace
    pages = max(0, cache) // (bytes_per_token * page_tokens)
    tokens = pages * page_tokens
    largest = min(limit, tokens)
    each = largest if session_tokens is None else session_tokens
    sessions = pages // -(-each // page_tokens) * dp if each else 0
    return Room(memory=memory, cache=cache, tokens=tokens, largest_context=largest, session_tokens=each,
                sessions=sessions)  # fmt: skip

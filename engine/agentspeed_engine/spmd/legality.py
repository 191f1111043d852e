"""Checks a finished plan stage by stage: every step is given its value as it takes it. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from agentspeed_engine.spmd.placement import AXES, Layout, Mesh, Owners, Partial, Placement, Replicate, Shard
from agentspeed_engine.spmd.plan import Call, Collective, Plan, PlanError, SumCall
from agentspeed_engine.spmd.spec import Boundary


def check_plan(plan: Plan, chain: Sequence[Boundary], *, start: Layout, finish: Layout) -> None:
    """Raises `PlanError` at the first step that is given its value otherwise than it takes it, for a module that is
    left out or called out of order, and for an end that is not `finish`."""
    held, residual, called = start, None, 0
    for step in plan.steps:
        moves = [step.reduce] if isinstance(step, SumCall) else [step] if isinstance(step, Collective) else []
        for move in moves:
            if move.value == "x":
                held = _moved(move, held)
            elif residual is None:
                raise PlanError(f"{move} moves a residual that nobody has begun")
            else:
                residual = _moved(move, residual)
        if isinstance(step, Call | SumCall):
            if step.module != called:
                raise PlanError(f"module {step.module} is called where {called} is due")
            called += 1
            module = chain[step.module]
            _same(held, module.input, plan.mesh, module.name)
            if module.residual is not None:
                if residual is not None:
                    _same(residual, module.residual, plan.mesh, f"{module.name} (residual)")
                residual = module.residual
            held = module.output
    if called != len(chain):
        raise PlanError(f"{len(chain) - called} modules are never called")
    _same(held, finish, plan.mesh, "the output")


def _same(held: Layout, wanted: Layout, mesh: Mesh, who: str) -> None:
    for axis in AXES:
        if mesh.extent(axis) > 1 and held.on(axis) != wanted.on(axis):
            raise PlanError(f"{who} takes {wanted} and is given {held}")


def _moved(step: Collective, held: Layout) -> Layout:
    before = held.on(step.axis)
    after: Placement
    match step.kind, before:
        case "all_reduce", Partial():
            after = Replicate()
        case "reduce_scatter", Partial():
            after = Shard(step.dim)
        case "all_gather", Shard(dim) if dim == step.dim:
            after = Replicate()
        case "slice", Replicate():
            after = Shard(step.dim)
        case "dispatch", Shard(dim) if dim == step.dim and step.owners is not None:
            after = step.owners
        case "combine", Owners():
            after = Shard(step.dim)
        case _:
            raise PlanError(f"{step} is given {held}")
    return held.replaced(step.axis, after)

"""The border to the engine's planner: how a model lies on several ranks, from its configuration alone."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, final

from agentspeed import errors
from agentspeed.transport.error_map import converted
from agentspeed_engine.spmd.experts import Exchange, ExpertSpread
from agentspeed_engine.spmd.machine import MACHINES, Candidate, Machine, MeshChoice
from agentspeed_engine.spmd.placement import Mesh
from agentspeed_engine.spmd.report import ModelPlan, StepLine

__all__ = ["MACHINES", "Candidate", "MeshChoice", "ModelPlan", "PlanRequest", "StepLine", "planned"]
_SHORT = 8192
"""Tokens of the sessions that a mesh is chosen for, where nobody said."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """What is asked of a plan."""

    tp: int | None = None
    dp: int | None = None
    """Both None: one rank, or the mesh that is chosen for the machine."""
    ep: int | None = None
    """Groups of ranks with experts of their own; None: every rank."""
    exchange: Exchange | None = None
    """None: the one that costs less."""
    spare_experts: int = 0
    dtype: Literal["float32", "float64", "bfloat16"] = "bfloat16"
    weights: Literal["fp8"] | None = None
    """Format of the matrices; None: `dtype`."""
    cache: Literal["fp8"] | None = None
    """Of the KV cache; None: `dtype`."""
    rows: int = 512
    memory: int | None = None
    """Bytes of a GPU; None: the machine's."""
    context: int | None = None
    machine: str | None = None
    """One of `MACHINES`."""
    gpus: int | None = None
    sessions: int = 64
    """That the mesh is chosen for."""


def planned(model: Path, request: PlanRequest) -> ModelPlan:
    """`model`: a model folder or a config.json; weights are not read, and need not be there.

    Raises `ModelUnsupported` and `ModelBroken` for a configuration that does not run, or that the mesh does not divide;
    `InvalidRequest` for what is no configuration, and where no mesh of the machine holds the model; `ExtraMissing`
    without PyTorch.
    """
    if importlib.util.find_spec("torch") is None:
        raise errors.ExtraMissing(
            "Planning builds the model's modules, which need PyTorch.", remedy="Install agentspeed[engine]."
        )
    from agentspeed_engine.models.catalog import RANDOM, read_source
    from agentspeed_engine.models.mesh_choice import cheaper_exchange, choose_mesh
    from agentspeed_engine.models.planning import plan_model

    if not model.exists():
        raise errors.InvalidRequest(
            f"{model} does not exist.", remedy="Give a model folder, or the config.json of a model."
        )
    machine = _machine(request)
    spread = ExpertSpread(groups=request.ep, spare=request.spare_experts, exchange=request.exchange or "sum")
    with converted():
        # With the prefix a configuration is enough, however the weights would be stored.
        source = read_source(f"{RANDOM}{model}")
        choice: MeshChoice | None = None
        if machine is not None:
            choice = choose_mesh(
                source,
                machine,
                dtype=request.dtype,
                context=request.context or min(_SHORT, source.config.context_limit),
                sessions=request.sessions,
                spread=spread,
                kept=request.weights,
                cache=request.cache,
            )
        if request.tp is None and request.dp is None and choice is not None:
            best = _best(choice)
            mesh = Mesh(dp=best.dp, tp=best.tp, experts=replace(spread, exchange=best.exchange))
        else:
            mesh = Mesh(dp=request.dp or 1, tp=request.tp or 1, experts=spread)
            if request.exchange is None:
                links = machine or MACHINES["h200"]
                way = cheaper_exchange(source, mesh, links, dtype=request.dtype, rows=request.rows)
                mesh = replace(mesh, experts=replace(spread, exchange=way))
        return plan_model(
            source,
            mesh,
            dtype=request.dtype,
            rows=request.rows,
            memory=request.memory or (machine.memory if machine is not None else None),
            session_tokens=request.context,
            choice=choice,
            weights=request.weights,
            cache=request.cache,
        )


def _machine(request: PlanRequest) -> Machine | None:
    if request.machine is None:
        return None
    found = MACHINES.get(request.machine)
    if found is None:
        raise errors.InvalidRequest(
            f"There is no machine {request.machine!r}.", remedy=f"Known: {', '.join(MACHINES)}."
        )
    return replace(found, gpus=request.gpus or found.gpus, memory=request.memory or found.memory)


def _best(choice: MeshChoice) -> Candidate:
    if choice.best is not None:
        return choice.best
    reasons = "; ".join(f"tp {one.tp}, dp {one.dp}: {one.refused.rstrip('.')}" for one in choice.candidates)
    raise errors.InvalidRequest(
        f"No mesh of {choice.machine.gpus} {choice.machine.name} runs this model ({reasons}).",
        remedy="Ask for more GPUs (--gpus), for shorter sessions (--context), or name tp and dp to see a plan.",
    )

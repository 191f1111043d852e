"""The border to the engine's planner: how a model lies on several ranks, from its configuration alone."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Literal

from agentspeed import errors
from agentspeed.transport.error_map import converted
from agentspeed_engine.spmd.placement import Mesh
from agentspeed_engine.spmd.report import ModelPlan, StepLine

__all__ = ["ModelPlan", "StepLine", "planned"]


def planned(
    model: Path,
    *,
    tp: int,
    dp: int,
    dtype: Literal["float32", "float64", "bfloat16"],
    rows: int,
    memory: int | None,
    context: int | None,
) -> ModelPlan:
    """`model`: a model folder or a config.json; weights are not read, and need not be there. `memory`: bytes of a GPU.

    Raises `ModelUnsupported` and `ModelBroken` for a configuration that does not run, or that the mesh does not divide;
    `InvalidRequest` for what is no configuration; `ExtraMissing` without PyTorch.
    """
    if importlib.util.find_spec("torch") is None:
        raise errors.ExtraMissing(
            "Planning builds the model's modules, which need PyTorch.", remedy="Install agentspeed[engine]."
        )
    from agentspeed_engine.models.catalog import RANDOM, read_source
    from agentspeed_engine.models.planning import plan_model

    if not model.exists():
        raise errors.InvalidRequest(
            f"{model} does not exist.", remedy="Give a model folder, or the config.json of a model."
        )
    with converted():
        # With the prefix a configuration is enough, however the weights would be stored.
        source = read_source(f"{RANDOM}{model}")
        return plan_model(source, Mesh(tp=tp, dp=dp), dtype=dtype, rows=rows, memory=memory, session_tokens=context)

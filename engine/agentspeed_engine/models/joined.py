"""Steps of few rows in fewer launches: a norm and the module behind it in one, where that has kernels for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol, final, runtime_checkable

from torch import Tensor

from agentspeed_engine.models.layers import AddNorm
from agentspeed_engine.models.state import StepState
from agentspeed_engine.spmd.lower import Comm, Compiled, Module, lower
from agentspeed_engine.spmd.placement import Mesh
from agentspeed_engine.spmd.plan import Call, Collective, Plan, Step, SumCall
from agentspeed_engine.spmd.spec import Boundary


@runtime_checkable
class AfterNorm(Protocol):
    """A module that can do the work of the norm before it."""

    def after_norm(
        self, norm: AddNorm, x: Tensor, residual: Tensor | None, state: StepState
    ) -> tuple[Tensor, Tensor | None]:
        """What `norm` and then the module give. Where it joins them the residual is left as it is, and what comes back
        is another tensor."""
        ...


def joined(
    chain: Sequence[Module[StepState]], made: Plan | None = None, comm: Comm | None = None
) -> tuple[Compiled, ...]:
    """The chain of one rank, each norm with the module behind it where that is an `AfterNorm` and nothing is moved
    between the two. `made`: its plan, and `comm` its collectives; None: it is the only one."""
    steps: list[Step] = []
    modules = list(chain)
    alone = Plan(mesh=Mesh(), steps=tuple(Call(module=index) for index in range(len(chain))))
    for step in (made or alone).steps:
        last = steps[-1] if steps else None
        norm = None if last is None or isinstance(last, Collective) else modules[last.module]
        after = modules[step.module] if isinstance(step, Call) else None
        if isinstance(norm, AddNorm) and isinstance(after, AfterNorm) and isinstance(last, (Call, SumCall)):
            modules.append(_Both(norm, after))
            steps[-1] = replace(last, module=len(modules) - 1)
        else:
            steps.append(step)
    return lower(replace(made or alone, steps=tuple(steps)), modules, comm)


@final
class _Both:
    def __init__(self, norm: AddNorm, after: AfterNorm) -> None:
        self._norm, self._after = norm, after

    @property
    def boundary(self) -> Boundary:
        return self._norm.boundary

    def __call__(self, x: Tensor, residual: Tensor | None, state: StepState) -> tuple[Tensor, Tensor | None]:
        return self._after.after_norm(self._norm, x, residual, state)

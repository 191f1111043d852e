"""Steps of few rows in fewer launches: a norm and the module behind it in one, where that has kernels for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from agentspeed_engine.models.layers import AddNorm
from agentspeed_engine.models.state import StepState
from agentspeed_engine.spmd.lower import Compiled, Module


@runtime_checkable
class AfterNorm(Protocol):
    """A module that can do the work of the norm before it."""

    def after_norm(
        self, norm: AddNorm, x: Tensor, residual: Tensor | None, state: StepState
    ) -> tuple[Tensor, Tensor | None]:
        """What `norm` and then the module give. Where it joins them the residual is left as it is, and what comes back
        is another tensor."""
        ...


def joined(chain: Sequence[Module[StepState]]) -> tuple[Compiled, ...]:
    """The chain of one rank, each norm with the module behind it where that is an `AfterNorm`."""
    steps: list[Compiled] = []
    norm: AddNorm | None = None
    for module in chain:
        if norm is not None and isinstance(module, AfterNorm):
            steps.append(_both(norm, module))
            norm = None
            continue
        if norm is not None:
            steps.append(_alone(norm))
        norm = module if isinstance(module, AddNorm) else None
        if norm is None:
            steps.append(_alone(module))
    return (*steps, *([_alone(norm)] if norm is not None else []))


def _both(norm: AddNorm, module: AfterNorm) -> Compiled:
    def step(x: Tensor, residual: Tensor, state: StepState, _: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        return module.after_norm(norm, x, residual, state)

    return step


def _alone(module: Module[StepState]) -> Compiled:
    def step(x: Tensor, residual: Tensor, state: StepState, _: Sequence[int]) -> tuple[Tensor, Tensor]:
        return module(x, residual, state)

    return step

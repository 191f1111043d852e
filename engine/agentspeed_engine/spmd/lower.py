"""Turns a plan and its modules into the flat list of callables a step runs. No torch here: ranks bring collectives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

from agentspeed_engine.spmd.plan import Call, Collective, Plan, SumCall
from agentspeed_engine.spmd.spec import Boundary

Tensor = Any
"""Opaque here: the pure part never looks inside a value."""
StateT_contra = TypeVar("StateT_contra", contravariant=True)


class Module(Protocol[StateT_contra]):
    """A local module: it sees its rank's piece of everything and never communicates."""

    @property
    def boundary(self) -> Boundary: ...

    def __call__(self, x: Tensor, residual: Tensor, state: StateT_contra, /) -> tuple[Tensor, Tensor]:
        """(output, residual); a module that declares no residual returns the one it was given."""
        ...


class Comm(Protocol):
    """One rank's side of the collectives."""

    def apply(self, step: Collective, value: Tensor, tokens_per_rank: Sequence[int]) -> Tensor: ...


@runtime_checkable
class Fusing(Protocol):
    """A rank's collectives that can sum a value and call the module that takes the sum in one pass."""

    def sum_call(
        self, step: Collective, module: Module[Any], x: Tensor, residual: Tensor, state: Any, sizes: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """What `apply` and then the module give. Memory of `x` may be written: nobody reads it afterwards."""
        ...


Compiled = Callable[[Tensor, Tensor, Any, Sequence[int]], tuple[Tensor, Tensor]]


def lower(plan: Plan, modules: Sequence[Module[Any]], comm: Comm | None) -> tuple[Compiled, ...]:
    """One callable per step. Without collectives `comm` may be None."""
    steps: list[Compiled] = []
    for step in plan.steps:
        if isinstance(step, Call):
            steps.append(_call(modules[step.module]))
        elif comm is None:
            raise ValueError(f"the plan has {step}, so a rank needs its collectives")
        elif isinstance(step, SumCall):
            steps.append(_sum_call(step, modules[step.module], comm))
        else:
            steps.append(_collective(step, comm))
    return tuple(steps)


def run(steps: Sequence[Compiled], x: Tensor, state: Any, tokens_per_rank: Sequence[int]) -> Tensor:
    residual: Tensor = None
    for step in steps:
        x, residual = step(x, residual, state, tokens_per_rank)
    return x


def _call(module: Module[Any]) -> Compiled:
    def step(x: Tensor, residual: Tensor, state: Any, _: Sequence[int]) -> tuple[Tensor, Tensor]:
        return module(x, residual, state)

    return step


def _sum_call(step: SumCall, module: Module[Any], comm: Comm) -> Compiled:
    if isinstance(comm, Fusing):
        fusing = comm

        def fused(x: Tensor, residual: Tensor, state: Any, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
            return fusing.sum_call(step.reduce, module, x, residual, state, sizes)

        return fused

    def defined(x: Tensor, residual: Tensor, state: Any, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
        return module(comm.apply(step.reduce, x, sizes), residual, state)

    return defined


def _collective(step: Collective, comm: Comm) -> Compiled:
    if step.value == "x":

        def moved(x: Tensor, residual: Tensor, _: Any, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
            return comm.apply(step, x, sizes), residual

        return moved

    def moved_residual(x: Tensor, residual: Tensor, _: Any, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
        return x, comm.apply(step, residual, sizes)

    return moved_residual

"""Which weights and pools modules hold, by their slots."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from agentspeed_kernels.fp8_blocks import Fp8Blocks
from agentspeed_kernels.packing import Packed, Weight
from agentspeed_kernels.quantised import Quantised


def held_by(value: object) -> Iterator[Weight]:
    """The weights and pools of modules, and of what they are made of; one that two of them hold comes twice."""
    if isinstance(value, Tensor | Packed | Quantised | Fp8Blocks):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from held_by(one)
    elif type(value).__module__.startswith("agentspeed_engine.models"):
        for kind in type(value).__mro__:
            for name in getattr(kind, "__slots__", ()):
                yield from held_by(getattr(value, name, None))


def numbers_of(weight: Weight) -> Tensor:
    """What most of a weight's bytes are in."""
    return weight if isinstance(weight, Tensor) else weight.data


def tensors_of(weight: Weight) -> tuple[Tensor, ...]:
    """All that a weight is kept in."""
    if isinstance(weight, Tensor):
        return (weight,)
    return (weight.data, weight.scales) if isinstance(weight, Quantised | Fp8Blocks) else (weight.data,)

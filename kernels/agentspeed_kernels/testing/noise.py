"""Numbers of a seed, drawn once for all cases that ask for the same shapes in the same order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor

_KEPT: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}
"""(Numbers, the generator's state after them) by the seed and all that was asked of it up to them."""
MOST_BYTES = 128 << 20


@final
class Noise:
    """Cases of a size ask for the same in each format and manner, and of each kernel of an op: drawing it anew was a
    third of the conformance suite."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._state = self._generator.get_state()
        self._asked: tuple[Any, ...] = (seed,)

    def normal(self, *shape: int) -> Tensor:
        """float64; not to be changed."""
        return self._next(torch.randn, shape)

    def uniform(self, *shape: int) -> Tensor:
        """float64 from 0 to 1; not to be changed."""
        return self._next(torch.rand, shape)

    def _next(self, draw: Callable[..., Tensor], shape: tuple[int, ...]) -> Tensor:
        self._asked = (*self._asked, (draw, shape))
        kept = _KEPT.get(self._asked)
        if kept is None:
            _ = self._generator.set_state(self._state)
            numbers = draw(*shape, generator=self._generator, dtype=torch.float64)
            if sum(held.nbytes for held, _ in _KEPT.values()) > MOST_BYTES:
                _KEPT.clear()
            kept = _KEPT[self._asked] = numbers, self._generator.get_state()
        numbers, self._state = kept
        return numbers

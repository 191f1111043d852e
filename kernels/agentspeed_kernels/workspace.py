"""Named scratch memory that grows once and is reused: page faults of fresh tensors cost more than small kernels."""

from __future__ import annotations

import math
from typing import final

import torch


@final
class Workspace:
    """Not thread-safe: one per worker. A name is one buffer: a second `take` of a name ends the first view's life."""

    __slots__ = ("_buffers", "device")

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised contiguous tensor."""
        count = math.prod(shape)
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < count:
            buffer = torch.empty(max(count, 1), dtype=dtype, device=self.device)
            self._buffers[(name, dtype)] = buffer
        return buffer[:count].view(shape)

    def clear(self) -> None:
        """Zeros everywhere, so that what no kernel writes is finite."""
        for buffer in self._buffers.values():
            buffer.zero_()

    @property
    def bytes(self) -> int:
        return sum(buffer.numel() * buffer.element_size() for buffer in self._buffers.values())

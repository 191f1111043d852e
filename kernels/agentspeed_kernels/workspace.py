"""Named scratch memory that grows once and is reused: page faults of fresh tensors cost more than small kernels."""

from __future__ import annotations

import math
from typing import final

import torch

MOST_VIEWS = 4096
"""Kept at once; steps have any number of rows."""


@final
class Workspace:
    """Not thread-safe: one per worker. A name is one buffer: a second `take` of a name ends the first view's life."""

    __slots__ = ("_buffers", "_constants", "_views", "device")

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}
        self._views: dict[tuple[str, tuple[int, ...], torch.dtype], torch.Tensor] = {}
        """What was taken: most steps take the same again, hundreds of times each."""
        self._constants: dict[tuple[int, torch.dtype], torch.Tensor] = {}

    def on(self, device: torch.device) -> Workspace:
        """This one, or an empty one where what is worked on lies on another kind of device than this."""
        return self if self.device.type == device.type else Workspace(device)

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised contiguous tensor."""
        key = name, shape, dtype
        view = self._views.get(key)
        if view is None:
            if len(self._views) >= MOST_VIEWS:
                self._views.clear()
            view = self._views[key] = self._made(name, shape, dtype)
        return view

    def _made(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        count = math.prod(shape)
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < count:
            buffer = torch.empty(max(count, 1), dtype=dtype, device=self.device)
            self._buffers[(name, dtype)] = buffer
            self._views.clear()  # some are of the smaller one
        return buffer[:count].view(shape)

    def constant(self, value: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor of one value, which nobody writes: it is filled when it is made, not once a call."""
        count = math.prod(shape)
        held = self._constants.get((value, dtype))
        if held is None or held.numel() < count:
            held = torch.full((max(count, 1),), value, dtype=dtype, device=self.device)
            self._constants[(value, dtype)] = held
        return held[:count].view(shape)

    def clear(self) -> None:
        """Zeros everywhere but in constants, so that what no kernel writes is finite."""
        for buffer in self._buffers.values():
            buffer.zero_()

    @property
    def buffers(self) -> tuple[torch.Tensor, ...]:
        """All there are now: who has their addresses keeps them, for a larger call takes another buffer of a name."""
        return (*self._buffers.values(), *self._constants.values())

    @property
    def bytes(self) -> int:
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers)

"""Weights in int8: symmetric, with a scale for each output, or for each group of 32 inputs of an output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeVar, final

import torch
from torch import Tensor

from agentspeed_kernels.signature import ByteFormat

GROUPS: dict[ByteFormat, int] = {"int8": 0, "int8-32": 32}
"""Of formats in int8: inputs that share a scale; 0: all of an output."""
OUTPUTS, INPUTS, DEEP = 16, 64, 4
"""Of a tile: 1 KB. DEEP inputs of an output are neighbours, as instructions that multiply bytes want them."""
MIDDLE = 128
"""Of a stored byte: it stands for weight 0."""
_MOST = 127
_AT_ONCE = 1 << 17
"""Numbers that are taken to int8 together: what is made on the way stays in a cache, and takes little memory."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class Quantised:
    """A weight [..., N, K] as bytes [..., N / 16, K / 64, 16, 16, 4], each `MIDDLE` above what it stands for: row i of
    a tile has inputs 4i to 4i + 3 of 16 outputs. N and K are padded with zeros to whole tiles."""

    data: Tensor
    scales: Tensor
    """float32 [..., G, N in whole tiles]: of each group of inputs; G is 1 where all share one."""
    group: int
    """Inputs that share a scale; 0: all."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    """Of the weight before, in which `rows` gives it back."""

    together: ClassVar[int] = OUTPUTS
    """A part of the outputs begins at a multiple of this."""

    def data_ptr(self) -> int:
        return self.data.data_ptr()

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.scales.nbytes

    def stacked(self, data: Tensor, scales: Tensor) -> Quantised:
        """Such matrices, which `data` and `scales` have one after the other."""
        return Quantised(data, scales, self.group, (len(data), *self.shape), self.dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows `ids` [T] of a weight [N, K], as [T, K]: a tied embedding is looked up in the head's own weight."""
        held = self.data[ids // OUTPUTS, :, :, ids % OUTPUTS].reshape(ids.shape[0], -1)
        scales = self.scales[:, ids].T
        return self._scaled(held, scales).to(self.dtype)

    def part(self, *at: int) -> Quantised:
        """One of the matrices that are stacked, in the same memory."""
        return Quantised(self.data[at], self.scales[at], self.group, self.shape[len(at) :], self.dtype)

    def outputs(self, first: int, last: int) -> Quantised:
        """Outputs `first`, which begins a tile, to `last` of a weight [N, K], in the same memory."""
        low, high = first // OUTPUTS, -(-last // OUTPUTS)
        scales = self.scales[:, low * OUTPUTS : high * OUTPUTS]
        return Quantised(self.data[low:high], scales, self.group, (last - first, self.shape[1]), self.dtype)

    def whole(self, dtype: torch.dtype | None = None) -> Tensor:
        """[..., N, K]: what the bytes stand for."""
        *front, tiles, steps, _, _, _ = self.data.shape
        held = self.data.movedim(-2, -4).reshape(*front, tiles * OUTPUTS, steps * INPUTS)
        rows = self._scaled(held, self.scales.transpose(-1, -2))
        return rows[..., : self.shape[-2], :].to(dtype or self.dtype).contiguous()

    def _scaled(self, held: Tensor, scales: Tensor) -> Tensor:
        """`held` [..., K in whole tiles] by `scales` [..., G]."""
        if self.group:
            scales = scales.repeat_interleave(self.group, -1)
        return (held[..., : self.shape[-1]].float() - MIDDLE) * scales[..., : self.shape[-1]]


B = TypeVar("B", bound="_Bytes")


class _Bytes(Protocol):
    """A matrix in 8 bits, whatever their format."""

    @property
    def data(self) -> Tensor: ...
    @property
    def scales(self) -> Tensor: ...
    def stacked(self: B, data: Tensor, scales: Tensor) -> B: ...


def stacked(count: int, made: Callable[[int], B]) -> B:
    """[count, ...] of what is made for each, all of one shape: one at a time is in memory beside the whole."""
    first = made(0)
    if count == 1:
        return first.stacked(first.data[None], first.scales[None])
    data, scales = (held.new_empty(count, *held.shape) for held in (first.data, first.scales))
    for i in range(count):
        one = made(i) if i else first
        data[i], scales[i] = one.data, one.scales
    return first.stacked(data, scales)


def quantise(weight: Tensor, group: int = 0, parts: int = 1) -> Quantised:
    """[..., N, K] in any format. `parts`: matrices of equal height that N joins (gate and up), each of which begins a
    tile of its own, as a dimension before N. A weight that is not finite gives what is not finite either."""
    if parts > 1:
        weight = weight.reshape(*weight.shape[:-2], parts, -1, weight.shape[-1])
    if weight.dim() > 2:  # one matrix after the other: floats of all experts at once would be twice the model
        return stacked(len(weight), lambda i: quantise(weight[i], group))
    outputs, inputs = weight.shape
    tiles, steps = -(-outputs // OUTPUTS), -(-inputs // INPUTS)
    data = torch.empty(tiles, steps, INPUTS // DEEP, OUTPUTS, DEEP, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(steps * INPUTS // group if group else 1, tiles * OUTPUTS, device=weight.device)
    many = max(_AT_ONCE // inputs // OUTPUTS, 1)
    for low in range(0, tiles, many):
        some = weight[low * OUTPUTS : (low + many) * OUTPUTS].float()
        padded = torch.nn.functional.pad(some, (0, steps * INPUTS - inputs, 0, -len(some) % OUTPUTS))
        groups = padded.view(len(padded), -1, group or steps * INPUTS)
        by = groups.abs().amax(-1, keepdim=True) / _MOST
        whole = (groups / by.where(by > 0, 1)).round_().add_(MIDDLE).nan_to_num_(MIDDLE).to(torch.uint8)
        high = low + len(padded) // OUTPUTS
        data[low:high] = whole.view(-1, OUTPUTS, steps, INPUTS // DEEP, DEEP).permute(0, 2, 3, 1, 4)
        scales[:, low * OUTPUTS : high * OUTPUTS] = by.squeeze(-1).T
    return Quantised(data, scales, group, tuple(weight.shape), weight.dtype)

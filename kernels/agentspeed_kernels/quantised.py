"""Weights in int8: symmetric, with a scale for each output, or for each group of 32 inputs of an output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import ClassVar, Protocol, final

import torch
from torch import Tensor

from agentspeed_kernels.signature import ByteFormat
from agentspeed_kernels.workspace import Workspace

GROUPS: dict[ByteFormat, int] = {"int8": 0, "int8-32": 32}
"""Of formats in int8: inputs that share a scale; 0: all of an output."""
OUTPUTS, INPUTS, DEEP = 16, 64, 4
"""Of a tile: 1 KB. DEEP inputs of an output are neighbours, as instructions that multiply bytes want them."""
MIDDLE = 128
"""Of a stored byte: it stands for weight 0."""
_MOST = 127
_AT_ONCE = 1 << 17
"""Numbers that are taken to int8 together: what is made on the way stays in a cache, and takes little memory."""


class Rows(Protocol):
    """A matrix [N, K] in another format, whose rows are written as floats."""

    @property
    def shape(self) -> torch.Size: ...
    def __getitem__(self, rows: slice, /) -> Rows: ...
    def write(self, out: Tensor) -> None: ...


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

    @staticmethod
    def empty(shape: Sequence[int], group: int, dtype: torch.dtype, device: torch.device) -> Quantised:
        """Memory of a weight [..., N, K], which `fill` writes."""
        *front, outputs, inputs = shape
        tiles, steps = -(-outputs // OUTPUTS), -(-inputs // INPUTS)
        data = torch.empty(*front, tiles, steps, INPUTS // DEEP, OUTPUTS, DEEP, dtype=torch.uint8, device=device)
        scales = torch.empty(*front, steps * INPUTS // group if group else 1, tiles * OUTPUTS, device=device)
        return Quantised(data, scales, group, tuple(shape), dtype)

    def fill(self, weight: Tensor | Rows, workspace: Workspace) -> None:
        """Of a weight [N, K]: some rows after the others, which go through `workspace`."""
        (outputs, inputs), (tiles, steps) = weight.shape, self.data.shape[:2]
        width, many = steps * INPUTS, min(max(_AT_ONCE // inputs // OUTPUTS, 1), tiles)
        workspace = workspace.on(self.data.device)
        floats = workspace.take("floats", (many * OUTPUTS, width), torch.float32)
        sizes = workspace.take("sizes", (many * OUTPUTS, width), torch.float32)
        whole = workspace.take("whole", (many * OUTPUTS, width), torch.uint8)
        for low in range(0, tiles, many):
            first, high = low * OUTPUTS, min(low + many, tiles)
            given, rows = min(high * OUTPUTS, outputs) - first, (high - low) * OUTPUTS
            if width > inputs:
                floats[:, inputs:].zero_()
            floats[given:rows].zero_()
            held, into = weight[first : first + given], floats[:given, :inputs]
            if isinstance(held, Tensor):
                into.copy_(held)
            else:
                held.write(into)
            groups = floats[:rows].view(rows, -1, self.group or width)
            by = torch.abs(groups, out=sizes[:rows].view(groups.shape)).amax(-1, keepdim=True) / _MOST
            groups.div_(by.where(by > 0, 1)).round_().add_(MIDDLE).nan_to_num_(MIDDLE)
            # DEEP bytes are moved as one number.
            moved = whole[:rows].copy_(floats[:rows]).view(torch.int32).view(-1, OUTPUTS, steps, INPUTS // DEEP)
            self.data[low:high].view(torch.int32).squeeze(-1).copy_(moved.permute(0, 2, 3, 1))
            self.scales[:, first : high * OUTPUTS] = by.squeeze(-1).T

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


def quantise(weight: Tensor, group: int = 0, parts: int = 1, workspace: Workspace | None = None) -> Quantised:
    """[..., N, K] in any format. `parts`: matrices of equal height that N joins (gate and up), each of which begins a
    tile of its own, as a dimension before N. A weight that is not finite gives what is not finite either."""
    if parts > 1:
        weight = weight.reshape(*weight.shape[:-2], parts, -1, weight.shape[-1])
    held = Quantised.empty(weight.shape, group, weight.dtype, weight.device)
    scratch = workspace or Workspace(weight.device)
    for at in product(*map(range, weight.shape[:-2])):
        held.part(*at).fill(weight[at], scratch)
    return held

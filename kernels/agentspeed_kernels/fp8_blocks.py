"""Weights in fp8 e4m3 with a scale for each block of 128 × 128, as DeepSeek-V3, Kimi and Qwen3-FP8 are published."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from agentspeed_kernels.quantised import stacked

BLOCK = 128
"""Outputs, and inputs, that share a scale."""
MOST = 448.0
"""The largest number of e4m3."""
_KIND = torch.float8_e4m3fn
_AT_ONCE = 1 << 17
"""Numbers that are taken to fp8 together: what is made on the way stays in a cache, and takes little memory."""
_NO_NUMBER = 0x7F
"""The bits of a byte, but for its sign, that are not a number."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class Fp8Blocks:
    """A weight [..., N, K]: `data`[n, k] times `scales`[n // 128, k // 128]. The last block of an axis may be cut."""

    data: Tensor
    """float8_e4m3fn [..., N, K], contiguous, the bytes as a checkpoint has them."""
    scales: Tensor
    """float32 [..., N / 128, K / 128], both rounded up, contiguous. Of a block with a byte that is not a number it is
    none either, so that kernels need not look for one."""

    together: ClassVar[int] = BLOCK
    """A part of the outputs begins at a multiple of this."""

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    def data_ptr(self) -> int:
        return self.data.data_ptr()

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.scales.nbytes

    def stacked(self, data: Tensor, scales: Tensor) -> Fp8Blocks:
        """Such matrices, which `data` and `scales` have one after the other."""
        return replace(self, data=data, scales=scales)

    def part(self, *at: int) -> Fp8Blocks:
        """One of the matrices that are stacked, in the same memory."""
        return replace(self, data=self.data[at], scales=self.scales[at])

    def outputs(self, first: int, last: int) -> Fp8Blocks:
        """Outputs `first`, which begins a block, to `last` of a weight [N, K], in the same memory."""
        return replace(self, data=self.data[first:last], scales=self.scales[first // BLOCK : -(-last // BLOCK)])

    def whole(self, dtype: torch.dtype) -> Tensor:
        """[..., N, K]: what it stands for, rounded once."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        by = _spread(_spread(self.scales.to(wide), -2, self.shape[-2]), -1, self.shape[-1])
        return self.data.to(wide).mul_(by).to(dtype)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Fp8Rows:
    """A matrix of a checkpoint on its way to `Fp8Blocks`: rows may still be joined, reordered and left out."""

    data: Tensor
    """float8_e4m3fn [N, K]."""
    scales: Tensor
    """float32 [N, K / 128 rounded up]: of each row, the same for all rows of a block."""

    @staticmethod
    def of(data: Tensor, scales: Tensor) -> Fp8Rows:
        """`scales` [N / 128, K / 128], both rounded up, in any format."""
        rows = _spread(scales.float(), 0, data.shape[0])
        odd = data.view(torch.uint8).bitwise_and(_NO_NUMBER) == _NO_NUMBER
        if bool(odd.any()):
            n, k = odd.nonzero(as_tuple=True)
            rows = rows.clone()
            rows[n, k // BLOCK] = float("nan")
        return Fp8Rows(data, rows)

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    def to(self, device: torch.device) -> Fp8Rows:
        return Fp8Rows(self.data.to(device), self.scales.to(device))

    def __getitem__(self, rows: Tensor | slice) -> Fp8Rows:
        return Fp8Rows(self.data.view(torch.uint8)[rows].view(_KIND), self.scales[rows])

    def float(self) -> Tensor:
        """float32 [N, K]."""
        return self.data.float().mul_(_spread(self.scales, 1, self.shape[1]))


Stored = Tensor | Fp8Rows
"""A matrix [N, K] as a source of weights gives it: in floats, or in the fp8 of its checkpoint."""


def joined(parts: Sequence[Stored]) -> Stored:
    """One under the other. In floats where one of them is."""
    if len(parts) == 1:
        return parts[0]
    held = [part for part in parts if isinstance(part, Fp8Rows)]
    if len(held) == len(parts):
        data = torch.cat([part.data.view(torch.uint8) for part in held]).view(_KIND)
        return Fp8Rows(data, torch.cat([part.scales for part in held]))
    return torch.cat([part.float() if isinstance(part, Fp8Rows) else part for part in parts])


def in_blocks(stored: Stored, parts: int = 1) -> Fp8Blocks:
    """Of a weight [..., N, K] in fp8 its own bytes. Of floats, and of fp8 where rows with scales of their own came into
    one block, the nearest bytes, with scales that make the largest number of a block `MOST`.

    `parts`: matrices of equal height that N joins (gate and up), each of which begins blocks of its own, as a dimension
    before N."""
    if isinstance(stored, Tensor) and stored.dim() > 2:
        return stacked(len(stored), lambda i: in_blocks(stored[i], parts))
    if parts > 1:
        height = stored.shape[0] // parts
        return stacked(parts, lambda at: in_blocks(stored[at * height : (at + 1) * height]))
    if isinstance(stored, Fp8Rows):
        first = stored.scales[::BLOCK]
        if torch.equal(_spread(first, 0, stored.shape[0]), stored.scales):
            return Fp8Blocks(stored.data.contiguous(), first.contiguous())
        return in_blocks(stored.float())
    return _nearest(stored)


def _nearest(weight: Tensor) -> Fp8Blocks:
    """[N, K] in any format, some rows after the others. A number that is not finite makes its block no number, and no
    other."""
    outputs, inputs = weight.shape
    data = torch.empty(outputs, inputs, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(-(-outputs // BLOCK), -(-inputs // BLOCK), device=weight.device)
    rows = max(_AT_ONCE // inputs // BLOCK, 1) * BLOCK
    for low in range(0, outputs, rows):
        some = weight[low : low + rows].float()
        blocks = torch.nn.functional.pad(some, (0, -inputs % BLOCK, 0, -len(some) % BLOCK))
        blocks = blocks.view(-1, BLOCK, scales.shape[1], BLOCK)
        most = torch.linalg.vector_norm(blocks, float("inf"), (1, 3)) / MOST
        by = most.where(most.isfinite() & (most > 0), 1)
        nearest = (blocks / by[:, None, :, None]).clamp_(-MOST, MOST).nan_to_num_().to(_KIND).view(torch.uint8)
        data[low : low + rows] = nearest.view(-1, scales.shape[1] * BLOCK)[: len(some), :inputs]
        scales[low // BLOCK : low // BLOCK + len(most)] = most.where(most.isfinite(), float("nan"))
    return Fp8Blocks(data.view(_KIND), scales)


def _spread(scales: Tensor, dim: int, extent: int) -> Tensor:
    """Each scale for all that share it, `extent` in all."""
    return scales.repeat_interleave(BLOCK, dim).narrow(dim, 0, extent)

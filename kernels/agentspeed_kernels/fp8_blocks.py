"""Weights in fp8 e4m3 with a scale for each block of 128 × 128, as DeepSeek-V3, Kimi and Qwen3-FP8 are published."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import ClassVar, final

import torch
from torch import Tensor

from agentspeed_kernels.workspace import Workspace

BLOCK = 128
"""Outputs, and inputs, that share a scale."""
MOST = 448.0
"""The largest number of e4m3."""
_KIND = torch.float8_e4m3fn
_NUMBERS = torch.arange(256, dtype=torch.uint8).view(_KIND).float()
"""Of each byte: looking them up takes a third of the time that torch takes to convert."""
_AT_ONCE = 1 << 17
"""Numbers that are taken to fp8 together: what is made on the way stays in a cache, and takes little memory."""
_A_FEW = 1 << 14
"""Numbers of which what is made on the way is so small that allocators have it at hand."""
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

    @staticmethod
    def empty(shape: Sequence[int], device: torch.device) -> Fp8Blocks:
        """Memory of a weight [..., N, K], which `fill` writes."""
        *front, outputs, inputs = shape
        scales = torch.empty(*front, -(-outputs // BLOCK), -(-inputs // BLOCK), device=device)
        return Fp8Blocks(torch.empty(*front, outputs, inputs, dtype=_KIND, device=device), scales)

    def fill(self, stored: Stored, workspace: Workspace) -> None:
        """Of a weight [N, K], as `in_blocks` says."""
        if isinstance(stored, Fp8Rows) and (blocks := stored.blocks()) is not None:
            self.data.view(torch.uint8).copy_(stored.data.view(torch.uint8))
            self.scales.copy_(blocks)
        else:
            self._nearest(stored, workspace)

    def _nearest(self, weight: Stored, workspace: Workspace) -> None:
        """[N, K] in any format, some rows after the others. A number that is not finite makes its block no number, and
        no other."""
        (outputs, inputs), across = weight.shape, self.scales.shape[1]
        width, many = across * BLOCK, min(max(_AT_ONCE // inputs // BLOCK, 1), self.scales.shape[0])
        workspace = workspace.on(self.data.device)
        floats = workspace.take("floats", (many * BLOCK, width), torch.float32)
        sizes = workspace.take("sizes", (many * BLOCK, width), torch.float32)
        for low in range(0, outputs, many * BLOCK):
            some = weight[low : low + many * BLOCK]
            given, high = some.shape[0], -(-some.shape[0] // BLOCK)
            if width > inputs:
                floats[:, inputs:].zero_()
            floats[given : high * BLOCK].zero_()
            if isinstance(some, Fp8Rows):
                some.write(floats[:given, :inputs])
            else:
                floats[:given, :inputs].copy_(some)
            blocks = floats[: high * BLOCK].view(high, BLOCK, across, BLOCK)
            most = torch.abs(blocks, out=sizes[: high * BLOCK].view(blocks.shape)).amax(3).amax(1) / MOST
            by = most.where(most.isfinite() & (most > 0), 1)
            blocks.div_(by[:, None, :, None]).clamp_(-MOST, MOST).nan_to_num_()
            self.data[low : low + given].copy_(floats[:given, :inputs])
            first = low // BLOCK
            self.scales[first : first + high] = most.where(most.isfinite(), float("nan"))

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
        many = max(4 * _A_FEW // max(data.shape[1], 1), 1)  # of bytes there may be more
        for low in range(0, data.shape[0], many):
            odd = data[low : low + many].view(torch.uint8).bitwise_and(_NO_NUMBER) == _NO_NUMBER
            if bool(odd.any()):
                n, k = odd.nonzero(as_tuple=True)
                rows[low + n, k // BLOCK] = float("nan")
        return Fp8Rows(data, rows)

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    @property
    def device(self) -> torch.device:
        return self.data.device

    def to(self, device: torch.device) -> Fp8Rows:
        return Fp8Rows(self.data.to(device), self.scales.to(device))

    def __getitem__(self, rows: Tensor | slice) -> Fp8Rows:
        return Fp8Rows(self.data.view(torch.uint8)[rows].view(_KIND), self.scales[rows])

    def blocks(self) -> Tensor | None:
        """Scales [N / 128, K / 128] of blocks; None where rows with scales of their own came into one."""
        first = self.scales[::BLOCK]
        return first if torch.equal(_spread(first, 0, self.shape[0]), self.scales) else None

    def float(self) -> Tensor:
        """float32 [N, K]."""
        numbers = self.data.view(torch.uint8).reshape(-1).int()
        wide = torch.index_select(_NUMBERS.to(self.device), 0, numbers).view(self.shape)
        if self.shape[1] % BLOCK:
            return wide.mul_(_spread(self.scales, 1, self.shape[1]))
        _ = wide.view(*self.scales.shape, BLOCK).mul_(self.scales[:, :, None])
        return wide

    def wide(self, dtype: torch.dtype) -> Tensor:
        """[N, K]: floats of a few rows at a time, for those of all would take four times what is stored."""
        held = torch.empty(self.shape, dtype=dtype, device=self.device)
        self.write(held)
        return held

    def write(self, out: Tensor) -> None:
        """`out` [N, K] of floats, as `wide`."""
        many = max(_A_FEW // max(self.shape[1], 1), 1)
        for low in range(0, self.shape[0], many):
            out[low : low + many] = self[low : low + many].float()


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


def in_blocks(stored: Stored, parts: int = 1, workspace: Workspace | None = None) -> Fp8Blocks:
    """Of a weight [..., N, K] in fp8 its own bytes. Of floats, and of fp8 where rows with scales of their own came into
    one block, the nearest bytes, with scales that make the largest number of a block `MOST`.

    `parts`: matrices of equal height that N joins (gate and up), each of which begins blocks of its own, as a dimension
    before N."""
    workspace = workspace or Workspace(stored.device)
    if isinstance(stored, Tensor):
        if parts > 1:
            stored = stored.reshape(*stored.shape[:-2], parts, -1, stored.shape[-1])
        held = Fp8Blocks.empty(stored.shape, stored.device)
        for at in product(*map(range, stored.shape[:-2])):
            held.part(*at).fill(stored[at], workspace)
        return held
    if parts == 1 and (blocks := stored.blocks()) is not None:
        return Fp8Blocks(stored.data.contiguous(), blocks.contiguous())
    height = stored.shape[0] // parts
    held = Fp8Blocks.empty((parts, height, stored.shape[1]), stored.device)
    for i in range(parts):
        held.part(i).fill(stored[i * height : (i + 1) * height], workspace)
    return held if parts > 1 else held.part(0)


def _spread(scales: Tensor, dim: int, extent: int) -> Tensor:
    """Each scale for all that share it, `extent` in all."""
    return scales.repeat_interleave(BLOCK, dim).narrow(dim, 0, extent)

"""Weights in the order in which matrix tiles read them: packed once when a model is loaded, instead of the original."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from agentspeed_kernels.fp8_blocks import Fp8Blocks, Stored, in_blocks
from agentspeed_kernels.quantised import GROUPS, Quantised, quantise, stacked
from agentspeed_kernels.signature import ByteFormat, WeightFormat

TILE_OUTPUTS, TILE_INPUTS = 16, 32
"""A tile holds 32 inputs of 16 outputs: 1 KB of bfloat16."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A bfloat16 weight [..., N, K] as [..., N / 16, K / 32, 16, 16, 2]: tile row i has inputs 2i and 2i + 1 of 16
    outputs. N and K are padded with zeros to whole tiles."""

    data: Tensor
    shape: tuple[int, ...]
    """Of the weight before it was packed."""

    def data_ptr(self) -> int:
        return self.data.data_ptr()

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def rows(self, ids: Tensor) -> Tensor:
        """Rows `ids` [T] of a weight [N, K], as [T, K]: a tied embedding is looked up in the head's own weight."""
        found = self.data[ids // TILE_OUTPUTS, :, :, ids % TILE_OUTPUTS]
        return found.reshape(ids.shape[0], -1)[:, : self.shape[-1]].contiguous()

    def whole(self) -> Tensor:
        """The weight [..., N, K] as it was before it was packed, of one part."""
        split = self.data.movedim(-2, -4)
        padded = split.reshape(*self.shape[:-2], split.shape[-5] * TILE_OUTPUTS, -1)
        return padded[..., : self.shape[-2], : self.shape[-1]].contiguous()


Weight = Tensor | Packed | Quantised | Fp8Blocks
"""What an op with weights is given: the layout its kernel asks for."""


def in_bytes(stored: Stored, kind: ByteFormat, parts: int = 1) -> Quantised | Fp8Blocks:
    """A matrix in 8 bits. `parts` as in `pack`."""
    if kind == "fp8":
        return in_blocks(stored, parts)
    assert isinstance(stored, Tensor), "only an engine of fp8 is given fp8"
    return quantise(stored, GROUPS[kind], parts)


def kept_in(weight: Tensor, kind: WeightFormat, parts: int = 1) -> Tensor | Quantised | Fp8Blocks:
    """A matrix in a format that rounds it, for comparisons of kernels. `parts` as in `pack`."""
    return weight.to(torch.bfloat16) if kind == "bfloat16" else in_bytes(weight, kind, parts)


def in_bytes_each(count: int, parts: Sequence[Callable[[int], Stored]], kind: ByteFormat) -> Quantised | Fp8Blocks:
    """As `in_bytes` gives [count, N of all parts, K] of what each part gives, one matrix at a time."""

    def made(i: int) -> Quantised | Fp8Blocks:
        if len(parts) == 1:
            return in_bytes(parts[0](i), kind)
        return stacked(len(parts), lambda part: in_bytes(parts[part](i), kind))

    return stacked(count, made)


def side_by_side(count: int, parts: Sequence[Callable[[int], Tensor]]) -> Tensor:
    """[count, N of all parts, K] of the matrices that each part gives. Few large calls: planning makes them for every
    expert of every layer."""
    held = [torch.stack([part(i) for i in range(count)]) for part in parts]
    return held[0] if len(held) == 1 else torch.cat(held, dim=1)


def gathered(count: int, made: Callable[[int], Tensor]) -> Tensor:
    """[count, ...] of what is made for each: no more than one of them is in memory beside the whole."""
    first = made(0)
    whole = first.new_empty(count, *first.shape)
    whole[0] = first
    for i in range(1, count):
        whole[i] = made(i)
    return whole


def pack_each(count: int, made: Callable[[int], Tensor], parts: int = 1) -> Packed:
    """As `pack` gives [count, N, K] of what is made for each, one at a time."""
    shape: tuple[int, ...] = ()

    def tiles(i: int) -> Tensor:
        nonlocal shape
        one = pack(made(i), parts)
        shape = one.shape
        return one.data

    data = gathered(count, tiles)
    return Packed(data, (count, *shape))


def pack(weight: Tensor, parts: int = 1) -> Packed:
    """[..., N, K] in bfloat16. `parts`: matrices of equal height that N joins (gate and up), each of which begins a
    tile of its own. The result is aligned as torch aligns: to 64 bytes, which tile rows need."""
    if parts > 1:
        weight = weight.reshape(*weight.shape[:-2], parts, -1, weight.shape[-1])
    outputs, inputs = weight.shape[-2:]
    tiles, steps = -(-outputs // TILE_OUTPUTS), -(-inputs // TILE_INPUTS)
    padding = (0, steps * TILE_INPUTS - inputs, 0, tiles * TILE_OUTPUTS - outputs)
    whole = torch.nn.functional.pad(weight, padding) if any(padding) else weight
    split = whole.reshape(-1, tiles, TILE_OUTPUTS, steps, TILE_INPUTS // 2, 2)
    data = split.permute(0, 1, 3, 4, 2, 5).contiguous()
    return Packed(data.view(*weight.shape[:-2], *data.shape[1:]), tuple(weight.shape))

"""Weights in the order in which matrix tiles read them: packed once when a model is loaded, instead of the original."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TypeVar, final

import torch
from torch import Tensor

from agentspeed_kernels.fp8_blocks import Fp8Blocks, Stored, in_blocks
from agentspeed_kernels.quantised import GROUPS, Quantised, quantise
from agentspeed_kernels.signature import ByteFormat, WeightFormat
from agentspeed_kernels.workspace import Workspace

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

    @staticmethod
    def empty(shape: Sequence[int], like: Tensor) -> Packed:
        """Memory of a weight [..., N, K] in the format of `like`, which `fill` writes."""
        *front, outputs, inputs = shape
        tiles, steps = -(-outputs // TILE_OUTPUTS), -(-inputs // TILE_INPUTS)
        return Packed(like.new_empty(*front, tiles, steps, TILE_INPUTS // 2, TILE_OUTPUTS, 2), tuple(shape))

    def fill(self, weight: Tensor) -> None:
        """Of a weight [N, K]."""
        (outputs, inputs), (tiles, steps) = weight.shape, self.data.shape[:2]
        if (tiles * TILE_OUTPUTS, steps * TILE_INPUTS) != (outputs, inputs):
            padding = (0, steps * TILE_INPUTS - inputs, 0, tiles * TILE_OUTPUTS - outputs)
            weight = torch.nn.functional.pad(weight, padding)
        split = weight.reshape(tiles, TILE_OUTPUTS, steps, TILE_INPUTS // 2, 2)
        self.data.copy_(split.permute(0, 2, 3, 1, 4))

    def part(self, *at: int) -> Packed:
        """One of the matrices that are stacked, in the same memory."""
        return Packed(self.data[at], self.shape[len(at) :])

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


def in_bytes(
    stored: Stored, kind: ByteFormat, parts: int = 1, workspace: Workspace | None = None
) -> Quantised | Fp8Blocks:
    """A matrix in 8 bits. `parts` as in `pack`; `workspace`: what is made on the way, for several in turn."""
    if kind == "fp8":
        return in_blocks(stored, parts, workspace)
    if isinstance(stored, Tensor):
        return quantise(stored, GROUPS[kind], parts, workspace)
    assert parts == 1, "what is published in fp8 is joined by `in_bytes_each`"
    held = Quantised.empty(stored.shape, GROUPS[kind], torch.float32, stored.device)
    held.fill(stored, workspace or Workspace(stored.device))
    return held


def kept_in(weight: Tensor, kind: WeightFormat, parts: int = 1) -> Tensor | Quantised | Fp8Blocks:
    """A matrix in a format that rounds it, for comparisons of kernels. `parts` as in `pack`."""
    return weight.to(torch.bfloat16) if kind == "bfloat16" else in_bytes(weight, kind, parts)


Part = Callable[[int], Stored]
"""Gives a matrix [N, K] of each of several, one after the other, whenever it is asked."""


def in_bytes_each(count: int, parts: Sequence[Part], kind: ByteFormat, workspace: Workspace) -> Quantised | Fp8Blocks:
    """As `in_bytes` gives [count, N of all parts, K] of what each part gives. One matrix at a time is in memory beside
    the whole."""

    def empty(front: tuple[int, ...], like: Stored) -> Quantised | Fp8Blocks:
        shape = (*front, *like.shape)
        if kind == "fp8":
            return Fp8Blocks.empty(shape, like.device)
        dtype = like.dtype if isinstance(like, Tensor) else torch.float32
        return Quantised.empty(shape, GROUPS[kind], dtype, like.device)

    return _filled(count, parts, empty, lambda held, at, stored: held.part(*at).fill(stored, workspace))


def pack_each(count: int, parts: Sequence[Part]) -> Packed:
    """As `pack` gives [count, N of all parts, K] of what each part gives, one matrix at a time."""

    def fill(held: Packed, at: tuple[int, ...], stored: Stored) -> None:
        held.part(*at).fill(_floats(stored))

    return _filled(count, parts, lambda front, like: Packed.empty((*front, *like.shape), _floats(like)), fill)


def gathered(count: int, parts: Sequence[Part]) -> Tensor:
    """[count, N of all parts, K] of what each part gives, one matrix at a time; of one matrix that itself."""
    if count == len(parts) == 1:
        return _floats(parts[0](0))[None]

    def fill(held: Tensor, at: tuple[int, ...], stored: Stored) -> None:
        held[at] = _floats(stored)

    whole = _filled(count, parts, lambda front, like: _floats(like).new_empty(*front, *like.shape), fill)
    return whole if len(parts) == 1 else whole.flatten(1, 2)


W = TypeVar("W")


def _filled(
    count: int,
    parts: Sequence[Part],
    empty: Callable[[tuple[int, ...], Stored], W],
    fill: Callable[[W, tuple[int, ...], Stored], None],
) -> W:
    """What `empty` gives for the numbers of matrices in front of one, filled with each."""
    held: W | None = None
    for i, j in product(range(count), range(len(parts))):
        stored = parts[j](i)
        if held is None:
            held = empty((count,) if len(parts) == 1 else (count, len(parts)), stored)
        fill(held, (i,) if len(parts) == 1 else (i, j), stored)
        del stored  # before the next one is read
    assert held is not None, "nothing is made of no matrix"
    return held


def _floats(stored: Stored) -> Tensor:
    assert isinstance(stored, Tensor), "only kernels of 8 bits are given fp8"
    return stored


def side_by_side(count: int, parts: Sequence[Callable[[int], Tensor]]) -> Tensor:
    """[count, N of all parts, K] of the matrices that each part gives. Few large calls: planning makes them for every
    expert of every layer."""
    held = [torch.stack([part(i) for i in range(count)]) for part in parts]
    return held[0] if len(held) == 1 else torch.cat(held, dim=1)


def pack(weight: Tensor, parts: int = 1) -> Packed:
    """[..., N, K] in bfloat16. `parts`: matrices of equal height that N joins (gate and up), each of which begins a
    tile of its own. The result is aligned as torch aligns: to 64 bytes, which tile rows need."""
    if parts > 1:
        weight = weight.reshape(*weight.shape[:-2], parts, -1, weight.shape[-1])
    held = Packed.empty(weight.shape, weight)
    for at in product(*map(range, weight.shape[:-2])):
        held.part(*at).fill(weight[at])
    return held

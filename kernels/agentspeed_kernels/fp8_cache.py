"""Rows of a KV cache in 8 bits: numbers in fp8 e4m3 with a scale for each head, and turned coordinates in bfloat16.

Importing it loads no tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ALIGN = 16
"""Bytes at a multiple of which each section of a row begins, and a row ends: what copies of tiles ask for."""

LEAST_HEAD = ALIGN
"""How wide a head of keys or values is at least: below it rows of several numbers of heads take the same bytes."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class CacheRow:
    """The bytes of one token in one layer of one pool: `heads` times `width` numbers of e4m3, a float32 scale for each
    head, and `plain` numbers in bfloat16.

    Of latents there is one head, as wide as their rank, and the turned coordinates are plain: their size changes with
    the position, and they are a ninth of the numbers. Of keys, and of values, nothing is plain."""

    heads: int
    width: int
    plain: int = 0

    @property
    def numbers(self) -> int:
        """That a row stands for."""
        return self.heads * self.width + self.plain

    @property
    def scales_at(self) -> int:
        """Bytes before the scales."""
        return _aligned(self.heads * self.width)

    @property
    def plain_at(self) -> int:
        """Bytes before the plain numbers."""
        return self.scales_at + _aligned(4 * self.heads)

    @property
    def nbytes(self) -> int:
        return self.plain_at + _aligned(2 * self.plain)

    def coded(self, rows: Tensor) -> Tensor:
        """uint8 [..., nbytes]: the nearest bytes of rows [..., numbers] in any format, rounded from float32. A scale
        makes the largest number of its head `MOST`; it is 1 where that would be no normal float32 number, so that every
        scale has a reciprocal, and not a number where one of its head is not finite."""
        # Imported late: describing a model loads no tensors.
        import torch

        from agentspeed_kernels.fp8_blocks import MOST

        lead = rows.shape[:-1]
        held = rows.new_zeros(*lead, self.nbytes, dtype=torch.uint8)
        heads = rows[..., : self.heads * self.width].float().reshape(*lead, self.heads, self.width)
        largest = heads.abs().amax(-1) / MOST
        by = largest.where(largest.isfinite() & (largest >= torch.finfo(largest.dtype).tiny), 1)
        nearest = (heads / by[..., None]).clamp_(-MOST, MOST).nan_to_num_().to(torch.float8_e4m3fn)
        scales = by.where(largest.isfinite(), float("nan")).contiguous()
        held[..., : self.heads * self.width] = nearest.flatten(-2).view(torch.uint8)
        held[..., self.scales_at : self.scales_at + 4 * self.heads] = scales.view(torch.uint8)
        if self.plain:
            turned = rows[..., self.heads * self.width :].to(torch.bfloat16).contiguous()
            held[..., self.plain_at : self.plain_at + 2 * self.plain] = turned.view(torch.uint8)
        return held

    def decoded(self, held: Tensor, dtype: torch.dtype) -> Tensor:
        """[..., numbers] of uint8 [..., nbytes]: what the bytes stand for, rounded once."""
        # Imported late: as above.
        import torch

        wide = torch.float64 if dtype == torch.float64 else torch.float32
        lead = held.shape[:-1]
        data = held[..., : self.heads * self.width].contiguous().view(torch.float8_e4m3fn).to(wide)
        scales = held[..., self.scales_at : self.scales_at + 4 * self.heads].contiguous().view(torch.float32)
        numbers = data.view(*lead, self.heads, self.width) * scales[..., None].to(wide)
        turned = held[..., self.plain_at : self.plain_at + 2 * self.plain].contiguous().view(torch.bfloat16)
        return torch.cat([numbers.flatten(-2).to(dtype), turned.to(dtype)], dim=-1)


def latent_row(rank: int, rope: int) -> CacheRow:
    """Of latents, whose first `rank` numbers are values too."""
    return CacheRow(heads=1, width=rank, plain=rope)


def heads_row(heads: int, width: int) -> CacheRow:
    """Of keys, or of values, of grouped-query attention."""
    return CacheRow(heads=heads, width=width)


def heads_in(nbytes: int, width: int) -> CacheRow:
    """The row of keys, or of values, of heads `width` wide, which is `LEAST_HEAD` at least, that takes so many bytes.
    Raises `ValueError` where none does."""
    heads = nbytes // width
    while heads > 1 and heads_row(heads, width).nbytes > nbytes:
        heads -= 1
    found = heads_row(heads, width)
    if width < LEAST_HEAD or found.nbytes != nbytes:
        raise ValueError(f"no number of heads of {width} takes {nbytes} bytes")
    return found


def _aligned(count: int) -> int:
    return -(-count // ALIGN) * ALIGN

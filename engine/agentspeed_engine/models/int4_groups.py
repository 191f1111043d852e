"""Matrices in 4 bits as compressed-tensors packs them: what of them a checkpoint has, and their values.

`X.weight` [N, K] is stored as `X.weight_packed`, int32 [N, K / 8], `X.weight_scale` [N, K / G] and `X.weight_shape`.
Bits 4 i to 4 i + 3 of a word are its i-th value plus 8; a value times the scale of its group of G inputs is the weight.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from agentspeed_engine.models.tensor_shapes import Shape

PACKED, SCALE, SHAPE = "_packed", "_scale", "_shape"
"""What follows the weight's name."""
IN_WORD: Final = 8
"""Values of one packed word."""
_BITS, _MIDDLE = 4, 8


def group_of(packed: Shape, scales: Shape, wanted: Shape) -> int | None:
    """How many inputs share a scale; None where the parts do not make a matrix of that shape."""
    if len(wanted) != 2 or len(scales) != 2 or not scales[1] or wanted[1] % IN_WORD or wanted[1] % scales[1]:
        return None
    group = wanted[1] // scales[1]
    whole = packed == (wanted[0], wanted[1] // IN_WORD) and scales[0] == wanted[0]
    return group if whole and group % IN_WORD == 0 else None


def unpacked(packed: Tensor, scales: Tensor) -> Tensor:
    """The matrix, or the rows or columns of it that both are of, as float32 [N, K]."""
    rows, words = packed.shape
    shifts = torch.arange(0, _BITS * IN_WORD, _BITS, dtype=torch.int32)
    values = (packed[:, :, None] >> shifts).bitwise_and_(2**_BITS - 1).sub_(_MIDDLE)
    grouped = values.view(rows, scales.shape[1], -1).float()
    return grouped.mul_(scales.float()[:, :, None]).view(rows, words * IN_WORD)

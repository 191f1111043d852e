"""Memory for pages, taken from the machine where it is written and not before."""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor


def zeros_on_demand(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that take memory only where they are written: a pool may be large, most sessions are not."""
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    return torch.frombuffer(memory, dtype=dtype).view(shape)

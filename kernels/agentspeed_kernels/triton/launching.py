"""How kernels are launched: in blocks that hold enough, and early, where the chip can, while another one ends."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def early(given: Tensor) -> bool:
    """Whether launches beside this tensor need not wait for the kernel before them (`device.products`)."""
    return given.is_cuda and _capable(given.device)


def options(early: bool) -> dict[str, bool]:
    """What such a launch is told."""
    return {"launch_pdl": True} if early else {}


def block_of(number: int) -> int:
    """How many numbers a program holds to have room for `number`: a power of two, for Triton has no other blocks."""
    return 1 << max(number - 1, 0).bit_length()


@cache
def _capable(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9

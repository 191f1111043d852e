"""How the kernels of a decode step are launched: early, where the chip can, so that one begins while another ends."""

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


@cache
def _capable(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9

"""Arrays on a device without a wait: what a step's kernels are told changes with every step."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def unwaited(numbers: NDArray[Any], device: torch.device) -> Tensor:
    """`numbers` on the device, by a copy that the host does not wait for: one from ordinary memory would make it wait
    until the device has done all it was given before."""
    here = torch.from_numpy(np.ascontiguousarray(numbers))
    if device.type == "cpu":
        return here
    flat = torch.empty(here.shape, dtype=here.dtype, pin_memory=True)
    flat.copy_(here)
    return flat.to(device, non_blocking=True)

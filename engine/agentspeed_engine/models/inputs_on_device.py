"""A step's arrays on a device: one copy from pinned memory for all of them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from agentspeed_engine.models.inputs import FlatBatch


def upload(batch: FlatBatch, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(ids, positions, slots, select) of `batch`, int64."""
    parts = (batch.ids, batch.positions, batch.slots, batch.select)
    if device.type == "cpu":
        ids, positions, slots, select = (torch.from_numpy(np.ascontiguousarray(part)) for part in parts)
        return ids, positions, slots, select
    # Each begins at a multiple of 16 bytes: compiled kernels rely on where an array begins.
    starts = np.concatenate([[0], np.cumsum([len(part) + len(part) % 2 for part in parts])]).tolist()
    flat = torch.empty(starts[-1], dtype=torch.int64, pin_memory=True)
    view = flat.numpy()
    for start, part in zip(starts, parts, strict=False):
        view[start : start + len(part)] = part
    block = flat.to(device, non_blocking=True)
    ids, positions, slots, select = (
        block[start : start + len(part)] for start, part in zip(starts, parts, strict=False)
    )
    return ids, positions, slots, select

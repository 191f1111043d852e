"""Scratch memory that is reused, and values that nobody writes."""

from __future__ import annotations

import torch

from agentspeed_kernels.workspace import Workspace


def test_a_constant_keeps_its_value_when_scratch_memory_is_cleared() -> None:
    workspace = Workspace()
    scratch, ones = workspace.take("sums", (3,), torch.float32).fill_(5), workspace.constant(1, (3, 1), torch.float32)
    workspace.clear()
    assert not scratch.any() and (ones == 1).all()
    assert workspace.constant(1, (2, 1), torch.float32).data_ptr() == ones.data_ptr()


def test_whoever_keeps_the_buffers_has_the_constants_at_their_addresses_after_these_grew() -> None:
    workspace = Workspace()
    few = workspace.constant(1, (3,), torch.int64)
    kept = workspace.buffers
    many = workspace.constant(1, (300,), torch.int64)
    assert few.data_ptr() in {buffer.data_ptr() for buffer in kept}
    assert many.numel() == 300 and (many == 1).all() and many.data_ptr() != few.data_ptr()

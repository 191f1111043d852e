"""A rank keeps the choices of its own experts; those of other ranks weigh nothing."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from agentspeed_kernels.platform import detect
from agentspeed_kernels.registry import standard
from agentspeed_kernels.selection import Kernels


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_choices_of_own_experts_are_numbered_from_0_and_others_weigh_nothing(
    dtype: Literal["float32", "bfloat16", "float64"],
) -> None:
    """By the C library and, in float64, without it."""
    kernels = Kernels(standard(), detect(), dtype, ("linear",))
    ids = torch.tensor([[0, 3, 7], [4, 5, 2]])
    weights = torch.tensor([[0.5, 0.25, 0.125], [1.0, 2.0, 3.0]], dtype=torch.float64 if dtype == "float64" else None)
    kernels.own(ids, weights, 3, 3)
    assert weights.tolist() == [[0.0, 0.25, 0.0], [1.0, 2.0, 0.0]]
    assert ids[weights > 0].tolist() == [0, 1, 2]
    assert int(ids.min()) >= 0 and int(ids.max()) < 3

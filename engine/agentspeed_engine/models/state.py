"""What every module of a chain is handed in one step: read-only tables, the attention plans, scratch memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from agentspeed_kernels.attention import AttentionStep
from agentspeed_kernels.workspace import Workspace


@final
@dataclass(frozen=True, slots=True, eq=False)
class StepState:
    """One rank's view of one step."""

    cos: Tensor
    sin: Tensor
    slots: Tensor
    """[T] pool rows the new latents go to."""
    attention: AttentionStep
    """Plans for the rows that attend in the latent space and for those of long extends."""
    select: Tensor
    """Indices on the token axis whose logits are wanted."""
    workspace: Workspace


def other_sum(residual: Tensor, state: StepState) -> Tensor:
    """Scratch memory for a new residual: one of two buffers, not the one that `residual` is."""
    shape = (residual.shape[0], residual.shape[1])
    one, other = (state.workspace.take(name, shape, residual.dtype) for name in ("sum", "other_sum"))
    return other if residual.data_ptr() == one.data_ptr() else one

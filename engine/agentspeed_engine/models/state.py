"""What every module of a chain is handed in one step: read-only tables, the attention plans, scratch memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from agentspeed_kernels.tiles import TilePlan
from agentspeed_kernels.workspace import Workspace


@final
@dataclass(frozen=True, slots=True, eq=False)
class StepState:
    """One rank's view of one step."""

    cos: Tensor
    sin: Tensor
    slots: Tensor
    """[T] pool rows the new latents go to."""
    few: TilePlan | None
    """Rows that attend in the latent space (decode, short extends)."""
    many: TilePlan | None
    """Rows of long extends, for which the context is decompressed."""
    select: Tensor
    """Indices on the token axis whose logits are wanted."""
    workspace: Workspace

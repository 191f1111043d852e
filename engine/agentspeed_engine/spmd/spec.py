"""What a module declares at its border: the layouts it takes, gives and caches. No module is built without it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from agentspeed_engine.spmd.placement import TOKENS, Layout, Partial, Replicate, Shard


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Boundary:
    """One module of a chain, seen from outside."""

    name: str
    input: Layout
    output: Layout
    width: int
    """Features of the output, all shards together: what a transition after it moves per token."""
    residual: Layout | None = None
    """Set when the module adds its input to the residual, hands both on, and needs the residual so."""
    cache: Layout | None = None
    sums: bool = False
    """The module adds its input to the residual row by row, so that the sum over ranks of that input can be made in
    the same pass."""


TOKEN_SHARD = Layout(dp=Shard(TOKENS), tp=Replicate())
"""Every dp rank has its own branches; tp ranks agree: what norms and attention take."""
TOKEN_SHARD_PARTIAL = Layout(dp=Shard(TOKENS), tp=Partial())
"""What attention and dense feed-forward give before their sum over tp."""
EVERYWHERE = Layout(dp=Replicate(), tp=Replicate())
PARTIAL_EVERYWHERE = Layout(dp=Partial(), tp=Partial())
"""What experts that are spread over all ranks give."""

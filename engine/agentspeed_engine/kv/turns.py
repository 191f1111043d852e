"""One call to generate, as the machines carry it: what was asked and what it cost so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from agentspeed_engine.kv.runs import TurnSpec
from agentspeed_engine.wire import FinishReason


@final
@dataclass(slots=True, kw_only=True, eq=False)
class Turn:
    """A turn from `enqueue` to its end; kept over preemption."""

    spec: TurnSpec
    age: int
    """Arrival order; never changes (L5)."""
    max_tokens: int
    """Tokens to draw; 0 only prefills."""
    bound: str = ""
    """What makes `max_tokens` less than was asked; empty: nothing does."""
    queued_at: float
    drawn: int = 0
    end: FinishReason | None = None
    """Set when the turn is to leave `hold` or `close`."""
    message: str = ""
    admitted: bool = False
    """Its usage was reported: what was resumed is counted once, at the first admission."""
    new: int = 0
    shared: int = 0
    resumed_device: int = 0
    resumed_host: int = 0
    recomputed: int = 0
    preempted: int = 0
    why: str = ""
    started_at: float = 0.0
    filled_at: float | None = None

    def stopped_at(self, rows: int) -> None:
        """It ended before its prompt was computed: what was not is no cost of it."""
        computed = max(0, rows - self.resumed_device - self.resumed_host)
        self.recomputed = min(self.recomputed, computed)
        self.new = min(self.new, computed - self.recomputed)
        self.shared = min(self.shared, self.new)

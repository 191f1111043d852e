"""One call to generate, as the machines carry it: what was asked and what it cost so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from agentspeed_engine.kv.views import TurnSpec
from agentspeed_engine.protocol.messages import FinishReason


@final
@dataclass(slots=True, kw_only=True, eq=False)
class Turn:
    """A turn from `enqueue` to its end; kept over preemption."""

    spec: TurnSpec
    age: int
    """Arrival order, of its session where sessions keep their places; never changes (L5)."""
    enters: bool = False
    """It is the first of a session at its place (`sched.places`)."""
    max_tokens: int
    """Tokens to draw; 0 only prefills."""
    bound: str = ""
    """What makes `max_tokens` less than was asked; empty: nothing does."""
    queued_at: float
    drawn: int = 0
    end: FinishReason | None = None
    """Set when the turn is to leave `hold` or `close`."""
    message: str = ""
    spoilt: bool = False
    """Its model computed logits that are no finite numbers: any of the rows that it read may be at fault, and its
    branch gives them up when it comes to rest."""
    waits: bool = False
    """The executor is making ready what its sampling needs: it is in no queue yet."""
    prepared: bool = False
    """The executor has: it must hear of the turn's end."""
    admitted: bool = False
    """Its usage was reported: what was resumed is counted once, at the first admission."""
    new: int = 0
    shared: int = 0
    resumed_device: int = 0
    resumed_host: int = 0
    recomputed: int = 0
    rows_new: int = 0
    """Rows of the prompt that came back from steps for the first time, and once more: what it cost if it ends before
    its prompt is computed."""
    rows_again: int = 0
    preempted: int = 0
    why: str = ""
    started_at: float = 0.0
    filled_at: float | None = None

    @property
    def added(self) -> int:
        """Tokens by which it makes its session larger. One that enters adds none: a session of one turn gives back
        all that it had, and room kept for its growth would be kept from others for nothing."""
        return 0 if self.enters else self.drawn + self.new - self.shared

    def computed(self, start: int, end: int, known: int) -> None:
        """Rows [start, end) of the prompt came back; the first `known` of the log had been computed before."""
        again = max(0, min(end, known) - start)
        self.rows_again += again
        self.rows_new += end - start - again

"""What every executor has beside its model: the automata of turns, and the seconds that steps took."""

from __future__ import annotations

from agentspeed_engine.exec.automata import Automata
from agentspeed_engine.exec.vocabulary import Vocabulary
from agentspeed_engine.kv.views import TurnSpec


class TurnsOnHost:
    """The part of `exec.executor.Executor` that no device decides."""

    def __init__(self, vocabulary: Vocabulary, page_tokens: int) -> None:
        self._automata = Automata(vocabulary)
        self.page_tokens = page_tokens
        self.model_seconds = 0.0
        self.sampling_seconds = 0.0

    def prepare(self, spec: TurnSpec) -> str | None:
        return self._automata.prepare(spec)

    def discard(self, turn: int) -> None:
        self._automata.discard(turn)

    @property
    def turns(self) -> frozenset[int]:
        """The turns of which something is kept."""
        return self._automata.turns

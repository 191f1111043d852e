"""What running turns hold on the host beside the model: matchers of grammars, watches for stop strings, penalties."""

from __future__ import annotations

from typing import final

import numpy as np
from numpy.typing import NDArray

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.exec.executor import Refusal
from agentspeed_engine.exec.grammar import GrammarRefused, Matchers
from agentspeed_engine.exec.penalties import Adjustment, Penalties, penalises
from agentspeed_engine.exec.sampler import NotFinite
from agentspeed_engine.exec.step_input import Sample
from agentspeed_engine.exec.stops import StopWatch
from agentspeed_engine.exec.vocabulary import Vocabulary
from agentspeed_engine.kv.views import TurnSpec
from agentspeed_engine.sched.plan import DrawnEnd

REFUSALS: tuple[type[Exception], ...] = (GrammarRefused, EngineFault)
"""What a turn ends with that cannot be served; its text is the reason."""


def refusal(reason: Exception) -> Refusal:
    """One of `REFUSALS` as the outcome of a sample."""
    return Refusal(str(reason), spoilt=isinstance(reason, NotFinite))


@final
class Automata:
    """By turn. `prepare` and `discard` may be called beside the rest, for turns that no step has sampled yet."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._matchers = Matchers(vocabulary)
        self._stops: dict[int, StopWatch] = {}
        self._penalties: dict[int, Penalties] = {}

    @property
    def turns(self) -> frozenset[int]:
        """The turns of which something is kept."""
        return frozenset(self._matchers.turns | self._stops.keys() | self._penalties.keys())

    def prepare(self, spec: TurnSpec) -> str | None:
        """Why the turn cannot be served, or None."""
        try:
            if spec.stop_strings:
                _ = self._vocabulary.token_bytes
            if spec.grammar is not None:
                self._matchers.prepare(spec, spec.grammar)
        except REFUSALS as reason:
            return str(reason)
        return None

    def discard(self, turn: int) -> None:
        self._matchers.forget((turn,))

    def forget(self, turns: tuple[int, ...]) -> None:
        self._matchers.forget(turns)
        for turn in turns:
            self._stops.pop(turn, None)
            self._penalties.pop(turn, None)

    def allowed(self, sample: Sample) -> NDArray[np.bool_] | None:
        """[vocab] of the ids that may be drawn; None: all. Raises one of `REFUSALS`."""
        spec = sample.spec
        if spec.grammar is None:
            return None
        return self._matchers.allowed(spec, spec.grammar, sample.position - spec.prompt_tokens)

    def adjustment(self, sample: Sample) -> Adjustment | None:
        """What the turn's penalties and bias make of its logits; None: it has none."""
        spec = sample.spec
        if not penalises(spec):
            return None
        penalties = self._penalties.get(spec.turn)
        if penalties is None:
            penalties = self._penalties[spec.turn] = Penalties(spec, self._vocabulary.vocab_size)
        return penalties.at(sample.position - spec.prompt_tokens)

    def end(self, sample: Sample, token: int) -> DrawnEnd | None:
        """Why the turn ends with the token drawn for `sample`, if it does. Raises one of `REFUSALS`."""
        spec = sample.spec
        if (penalties := self._penalties.get(spec.turn)) is not None:
            penalties.drew(token)
        complete = spec.grammar is not None and self._matchers.consume(spec, token)
        if self._completes_stop_string(spec, sample.position - spec.prompt_tokens, token):
            return "stop_string"
        return "grammar_end" if complete else None

    def _completes_stop_string(self, spec: TurnSpec, earlier: int, token: int) -> bool:
        if not spec.stop_strings or token in spec.stop_ids:
            return False
        watch = self._stops.get(spec.turn)
        if watch is None:
            begun = b"".join(self._vocabulary.token_bytes[number] for number in spec.consumed_ids)
            watch = self._stops[spec.turn] = StopWatch(spec.stop_strings, begun)
        return watch.saw(earlier, self._vocabulary.token_bytes[token])

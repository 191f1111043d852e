"""Carries out step plans: page copies, one forward pass, one draw per sampling row. It cannot move any state."""

from __future__ import annotations

import time
from typing import Protocol, final

import numpy as np
from numpy.typing import NDArray

from agentspeed_engine.kv.runs import TurnSpec
from agentspeed_engine.models.inputs import FlatBatch
from agentspeed_engine.run.batch import flatten
from agentspeed_engine.run.grammar import GrammarRefused, Matchers
from agentspeed_engine.run.sampler import draw
from agentspeed_engine.run.stops import StopAutomaton
from agentspeed_engine.run.vocabulary import Vocabulary
from agentspeed_engine.sched.plan import Drawn, Row, StepPlan, StepResult


class Model(Protocol):
    """What the worker needs of a model; `models.loaded.LoadedModel` and `run.noop.NoopModel` are ones."""

    page_tokens: int

    def logits(self, batch: FlatBatch) -> NDArray[np.float64]:
        """[S, vocab] of `batch.select`."""

    def copy_rows(self, src_page: int, dst_page: int, rows: int) -> None:
        """The first `rows` rows of a page, in every layer."""


@final
class Worker:
    """Driven by one thread."""

    def __init__(self, model: Model, vocabulary: Vocabulary) -> None:
        self._model = model
        self._vocabulary = vocabulary
        self._matchers = Matchers(vocabulary)
        self._stops: dict[int, StopAutomaton] = {}
        self.model_seconds = 0.0
        self.draw_seconds = 0.0

    def execute(self, plan: StepPlan) -> StepResult:
        """One step. An exception is our bug and stops the engine; what a turn cannot do is `refused`."""
        started = time.perf_counter()
        self._matchers.forget(plan.ended)
        for turn in plan.ended:
            self._stops.pop(turn, None)
        for copy in plan.copies:
            self._model.copy_rows(copy.src, copy.dst, copy.rows)
        logits = self._model.logits(flatten(plan, self._model.page_tokens))
        computed = time.perf_counter()
        drawn: list[Drawn] = []
        refused = []
        for index, row in enumerate(row for row in plan.rows if row.sample is not None):
            try:
                drawn.append(self._draw(row, logits[index]))
            except GrammarRefused as reason:
                refused.append((row.branch, row.epoch, str(reason)))
        ended = time.perf_counter()
        self.model_seconds += computed - started
        self.draw_seconds += ended - computed
        return StepResult(plan.seq, tuple(drawn), tuple(refused), ended - started)

    def _draw(self, row: Row, logits: NDArray[np.float64]) -> Drawn:
        spec = row.sample
        assert spec is not None
        allowed = self._matchers.allowed(spec)
        chosen = draw(logits, spec.sampling, spec.draw_key, row.position + len(row.ids), allowed)
        complete = self._matchers.consume(spec, chosen.id)
        stopped = self._stop_string_ended(spec, chosen.id)
        return Drawn(row.branch, row.epoch, chosen.id, chosen.logprob, chosen.top,
                     "stop_string" if stopped else "grammar_end" if complete else None)

    def _stop_string_ended(self, spec: TurnSpec, token: int) -> bool:
        if not spec.stop_strings or token in spec.stop_ids:
            return False
        automaton = self._stops.get(spec.turn)
        if automaton is None:
            automaton = self._stops[spec.turn] = StopAutomaton(spec.stop_strings)
        return automaton.feed(self._vocabulary.token_bytes[token])

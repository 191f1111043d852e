"""Carries out step plans: page copies, one forward pass, one draw per sampling row. It cannot move any state."""

from __future__ import annotations

import time
from typing import Any, final

from numpy.typing import NDArray

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.ids import BranchId
from agentspeed_engine.kv.runs import TurnSpec
from agentspeed_engine.run.batch import Batcher
from agentspeed_engine.run.grammar import GrammarRefused, Matchers
from agentspeed_engine.run.model import Model
from agentspeed_engine.run.sampler import draw
from agentspeed_engine.run.stops import StopWatch
from agentspeed_engine.run.vocabulary import Vocabulary
from agentspeed_engine.sched.plan import Drawn, Row, StepPlan, StepResult


@final
class Worker:
    """Driven by one thread."""

    def __init__(self, model: Model, vocabulary: Vocabulary) -> None:
        self._model = model
        self._vocabulary = vocabulary
        self._batcher = Batcher(model.page_tokens)
        self._matchers = Matchers(vocabulary)
        self._stops: dict[int, StopWatch] = {}
        self.model_seconds = 0.0
        self.sampling_seconds = 0.0

    def execute(self, plan: StepPlan) -> StepResult:
        """One step. An exception is our bug and stops the engine; what a turn cannot do is `refused`."""
        started = time.perf_counter()
        self._forget(plan.ended)
        for copy in plan.copies:
            self._model.copy_rows(copy.src, copy.dst, copy.rows)
        logits = self._model.logits(self._batcher.flatten(plan))
        computed = time.perf_counter()
        drawn: list[Drawn] = []
        refused: list[tuple[BranchId, int, str]] = []
        for row, row_logits in zip([row for row in plan.rows if row.sample is not None], logits, strict=True):
            try:
                drawn.append(self._draw(row, row_logits))
            except (GrammarRefused, EngineFault) as reason:
                refused.append((row.branch, row.epoch, str(reason)))
        ended = time.perf_counter()
        self.model_seconds += computed - started
        self.sampling_seconds += ended - computed
        return StepResult(plan.seq, tuple(drawn), tuple(refused), ended - started)

    def _forget(self, turns: tuple[int, ...]) -> None:
        self._matchers.forget(turns)
        for turn in turns:
            self._stops.pop(turn, None)

    def _draw(self, row: Row, logits: NDArray[Any]) -> Drawn:
        spec = row.sample
        assert spec is not None
        position = row.position + len(row.ids)
        earlier = position - spec.prompt_tokens
        allowed = None if spec.grammar is None else self._matchers.allowed(spec, spec.grammar, earlier)
        chosen = draw(logits, spec.sampling, spec.draw_key, position, allowed)
        complete = spec.grammar is not None and self._matchers.consume(spec, chosen.id)
        stopped = self._completes_stop_string(spec, earlier, chosen.id)
        return Drawn(row.branch, row.epoch, chosen.id, chosen.logprob, chosen.top,
                     "stop_string" if stopped else "grammar_end" if complete else None)

    def _completes_stop_string(self, spec: TurnSpec, earlier: int, token: int) -> bool:
        if not spec.stop_strings or token in spec.stop_ids:
            return False
        watch = self._stops.get(spec.turn)
        if watch is None:
            begun = b"".join(self._vocabulary.token_bytes[number] for number in spec.consumed_ids)
            watch = self._stops[spec.turn] = StopWatch(spec.stop_strings, begun)
        return watch.saw(earlier, self._vocabulary.token_bytes[token])

"""The executor that waits: a forward pass, then one draw per sample on the CPU, both when the step is launched.

The model may lie on a GPU: what `exec.cuda` has no kernels for (float64) runs so.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from numpy.typing import NDArray

from agentspeed_engine.errors import BrokenInvariant
from agentspeed_engine.exec.automata import REFUSALS, refusal
from agentspeed_engine.exec.executor import Pending, Refusal, Sampled, Token
from agentspeed_engine.exec.model import Model
from agentspeed_engine.exec.recent_tokens import RecentTokens
from agentspeed_engine.exec.sampler import draw
from agentspeed_engine.exec.step_input import Sample, StepInput
from agentspeed_engine.exec.turns_on_host import TurnsOnHost
from agentspeed_engine.exec.vocabulary import Vocabulary


@final
@dataclass(frozen=True, slots=True)
class Computed:
    """A step that is through."""

    step: int
    sampled: Sampled

    def done(self) -> bool:
        return True


@final
class CpuExecutor(TurnsOnHost):
    """`exec.executor.Executor` over a model in this process. A launched step is computed when `launch` returns."""

    def __init__(self, model: Model, vocabulary: Vocabulary, *, depth: int = 0) -> None:
        """`depth`: steps that are planned before an earlier one was collected (`CoreConfig.depth`)."""
        super().__init__(vocabulary, model.page_tokens)
        self._model = model
        self._tokens = RecentTokens(depth)

    def launch(self, step: StepInput) -> Computed:
        started = time.perf_counter()
        self._automata.forget(step.ended)
        for copy in step.copies:
            self._model.copy_rows(copy.src, copy.dst, copy.rows)
        logits = self._model.logits(self._tokens.known(step))
        computed = time.perf_counter()
        sampled = tuple(self._sample(one, row) for one, row in zip(step.samples, logits, strict=True))
        self._tokens.keep(step.step, sampled)
        self.model_seconds += computed - started
        self.sampling_seconds += time.perf_counter() - computed
        return Computed(step.step, sampled)

    def collect(self, pending: Pending) -> Sampled:
        if not isinstance(pending, Computed):
            raise BrokenInvariant(f"step {pending.step} was not launched here")
        return pending.sampled

    def save(self, pages: Sequence[int], slots: Sequence[int]) -> None:
        self._model.save(pages, slots)

    def load(self, slots: Sequence[int], pages: Sequence[int]) -> None:
        self._model.load(slots, pages)

    # ---- sampling -------------------------------------------------------------------------------------------------
    def _sample(self, sample: Sample, logits: NDArray[Any]) -> Token | Refusal:
        spec = sample.spec
        try:
            allowed, adjustment = self._automata.allowed(sample), self._automata.adjustment(sample)
            chosen = draw(logits, spec.sampling, spec.draw_key, sample.position, allowed, adjustment)
            end = self._automata.end(sample, chosen.id)
            return Token(chosen.id, chosen.logprob, chosen.top, end, chosen.draw_logprob)
        except REFUSALS as reason:
            return refusal(reason)

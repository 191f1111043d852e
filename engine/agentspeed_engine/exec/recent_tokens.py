"""What the latest steps sampled, for an executor whose tokens are on the host when a step is launched."""

from __future__ import annotations

from dataclasses import replace
from typing import final

import numpy as np

from agentspeed_engine.errors import BrokenInvariant
from agentspeed_engine.exec.executor import Sampled, Token
from agentspeed_engine.exec.step_input import StepInput
from agentspeed_engine.models.inputs import FlatBatch, Int64s

_REFUSED = 0
"""Stands for the token of a sample that was refused: the row that is fed with it is dead."""


@final
class RecentTokens:
    def __init__(self, depth: int) -> None:
        """`depth`: steps that are planned before an earlier one was collected (`CoreConfig.depth`)."""
        self._depth = depth
        self._of: dict[int, Int64s] = {}

    def known(self, step: StepInput) -> FlatBatch:
        """The step's batch with every id in it."""
        unknown = step.unknown
        if not len(unknown.at):
            return step.batch
        ids = step.batch.ids.copy()
        for at, earlier, place in zip(unknown.at, unknown.step.tolist(), unknown.place, strict=True):
            if earlier not in self._of:
                raise BrokenInvariant(f"step {step.step} names a token of step {earlier}, which is not kept any more")
            ids[at] = self._of[earlier][place]
        return replace(step.batch, ids=ids)

    def keep(self, step: int, sampled: Sampled) -> None:
        """A step is named only by those that were planned while it was in flight: at most `depth` later ones."""
        if self._depth:
            ids = (one.id if isinstance(one, Token) else _REFUSED for one in sampled)
            self._of[step] = np.fromiter(ids, np.int64, len(sampled))
            for old in [old for old in self._of if old <= step - self._depth]:
                del self._of[old]

"""What an executor is given: everything that the ranks of a group must know of one step, and nothing else.

These are plain values. There is no branch in them and no state of the scheduler: a rank that gets the same orders in
the same sequence computes the same rows and draws the same tokens, so they are what a leader broadcasts to its group.
Copies between device and host are orders of their own (`HostCopy`), because no step waits for one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias, final

import numpy as np

from agentspeed_engine.kv.views import PageCopy, TurnSpec
from agentspeed_engine.models.inputs import FlatBatch, Int64s
from agentspeed_engine.sched.plan import HostCopy


def _none() -> Int64s:
    return np.zeros(0, dtype=np.int64)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Unknown:
    """The tokens of a step that are not known when it is launched. All arrays are [U]; usually U is 0."""

    at: Int64s = field(default_factory=_none)
    """Indices on the step's token axis; `FlatBatch.ids` holds 0 there."""
    step: Int64s = field(default_factory=_none)
    """The earlier step that samples the token. It was in flight when this step was planned."""
    place: Int64s = field(default_factory=_none)
    """Which of that step's samples it is."""


@final
@dataclass(frozen=True, slots=True)
class Sample:
    """One token to be drawn, from one row of the logits."""

    spec: TurnSpec
    """How its turn draws. The noise is a function of (spec.draw_key, position, vocabulary id) alone."""
    position: int
    """Of the token drawn."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class StepInput:
    """One step. It is carried out in this order: `ended`, `copies`, the forward pass, the samples."""

    step: int
    """Its number; steps are launched in the order of their numbers."""
    batch: FlatBatch
    """The tokens, where their rows are written, what they read, and which rows of logits are wanted."""
    unknown: Unknown = field(default_factory=Unknown)
    copies: tuple[PageCopy, ...] = ()
    """Between device pages, before anything is computed."""
    samples: tuple[Sample, ...] = ()
    """One for each entry of `batch.select`, in its order."""
    ended: tuple[int, ...] = ()
    """Turns (`TurnSpec.turn`) that sample no more: what is kept of them may go."""


Order: TypeAlias = StepInput | HostCopy
"""Everything that reaches an executor while an engine runs."""

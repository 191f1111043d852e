"""Steps of one GPU as they are enqueued: page copies, the forward pass, and the draws, whose tokens stay there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agentspeed_engine.errors import BrokenInvariant
from agentspeed_engine.exec.penalties import Adjustment
from agentspeed_engine.exec.sampling_rows import RepeatedRows, asked_of
from agentspeed_engine.exec.step_input import StepInput
from agentspeed_engine.exec.torch_model import TorchModel
from agentspeed_engine.models.inputs import Int64s
from agentspeed_kernels.triton.sampling import sample
from agentspeed_kernels.uploads import unwaited
from agentspeed_kernels.workspace import Workspace


@final
@dataclass(frozen=True, slots=True, eq=False)
class LogitRules:
    """What turns ask of logits on the host, by place among the samples of a step."""

    masks: Mapping[int, NDArray[np.bool_]] = field(default_factory=dict)
    """[vocab] of the ids that may be drawn."""
    adjustments: Mapping[int, Adjustment] = field(default_factory=dict)
    refused: Mapping[int, str] = field(default_factory=dict)
    """Why there will be no token."""


@final
class DeviceSteps:
    """One thread drives it. On several ranks each has one, is given the same steps, and draws the same tokens."""

    def __init__(self, model: TorchModel, *, depth: int) -> None:
        """`depth`: steps that are planned before an earlier one was collected (`CoreConfig.depth`)."""
        self._model, self._loaded, self._depth = model, model.loaded, depth
        self.device = model.loaded.device
        self._workspace = Workspace(self.device)
        self._rows = RepeatedRows()
        self._tokens: dict[int, Tensor] = {}
        """What the latest steps sampled: later steps may name it."""

    def run(self, step: StepInput, asked: Callable[[], LogitRules]) -> tuple[Tensor, ...]:
        """(Ids, faults) of the samples on the device and, where any turn asked for them, log-probabilities as
        `triton.sampling.Sampled` has them; nothing is waited for. `asked` is called once the pass is on its way."""
        with torch.inference_mode():
            for copy in step.copies:
                self._model.copy_rows(copy.src, copy.dst, copy.rows)
            logits = self._loaded.forward(step.batch, lambda ids: self._name(step, ids))
            held = self._drawn(step, logits, asked())
        self._keep(step.step, held[0])
        return held

    def _name(self, step: StepInput, ids: Tensor) -> None:
        """Puts tokens that the host does not know yet into the step's ids."""
        unknown = step.unknown
        for earlier in sorted(set(unknown.step.tolist())):
            if earlier not in self._tokens:
                raise BrokenInvariant(f"step {step.step} names a token of step {earlier}, which is not kept any more")
            mine = unknown.step == earlier
            put(ids, unknown.at[mine], self._tokens[earlier], unknown.place[mine])

    def _drawn(self, step: StepInput, logits: Tensor, asked: LogitRules) -> tuple[Tensor, ...]:
        if not step.samples:
            none = torch.zeros(0, dtype=torch.int64, device=self.device)
            return none, none
        rows = self._rows.on_device(step.samples, asked.masks, asked.adjustments, logits)
        drawn = sample(logits, rows, self._workspace)
        ids = torch.where(drawn.faulty == 0, drawn.ids, 0)
        if all(asked_of(one) < 0 for one in step.samples):
            return ids, drawn.faulty
        return ids, drawn.faulty, drawn.logprob, drawn.draw_logprob, drawn.top_ids, drawn.top_logprobs

    def _keep(self, step: int, ids: Tensor) -> None:
        """A step is named only by those that were planned while it was in flight: at most `depth` later ones."""
        if self._depth:
            self._tokens[step] = ids
            for old in [old for old in self._tokens if old <= step - self._depth]:
                del self._tokens[old]


def put(ids: Tensor, at: Int64s, tokens: Tensor, place: Int64s) -> None:
    """ids[at] = tokens[place], on the device of both. Where all follow one another, as in most decode steps, no index
    is copied there."""
    if (np.diff(at) == 1).all() and (np.diff(place) == 1).all():
        ids[int(at[0]) : int(at[0]) + at.size] = tokens[int(place[0]) : int(place[0]) + place.size]
        return
    where = unwaited(np.stack([at, place]), ids.device)
    ids[where[0]] = tokens[where[1]]

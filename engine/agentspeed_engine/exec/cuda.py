"""The executor on one GPU: a launched step is enqueued, from the upload to the copy of its tokens to the host."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from agentspeed_engine.errors import BrokenInvariant, EngineFault
from agentspeed_engine.exec.automata import REFUSALS, refusal
from agentspeed_engine.exec.executor import Pending, Refusal, Sampled, Token
from agentspeed_engine.exec.penalties import Adjustment
from agentspeed_engine.exec.sampler import not_finite, ruled_out
from agentspeed_engine.exec.sampling_rows import RepeatedRows, asked_of
from agentspeed_engine.exec.step_input import Sample, StepInput
from agentspeed_engine.exec.torch_model import TorchModel
from agentspeed_engine.exec.turns_on_host import TurnsOnHost
from agentspeed_engine.exec.vocabulary import Vocabulary
from agentspeed_engine.models.inputs import Int64s
from agentspeed_engine.models.loaded import out_of_memory
from agentspeed_kernels.triton.sampling import sample
from agentspeed_kernels.uploads import unwaited
from agentspeed_kernels.workspace import Workspace

_cuda: Any = torch.cuda
"""torch gives these no types."""
_FAULTS = {1: not_finite, 2: ruled_out}


@final
@dataclass(frozen=True, slots=True, eq=False)
class Enqueued:
    """A step on its way. Tensors are in pinned memory and hold what they shall once `event` has passed."""

    step: int
    event: Any
    samples: tuple[Sample, ...]
    refused: dict[int, str]
    """By place among the samples: why there is no token."""
    ids: Tensor
    faulty: Tensor
    logprob: Tensor
    draw_logprob: Tensor
    top_ids: Tensor
    top_logprobs: Tensor

    def done(self) -> bool:
        return bool(self.event.query())


@final
class CudaExecutor(TurnsOnHost):
    """`exec.executor.Executor` over a model on a GPU, in bfloat16 or float32. Needs Triton.

    `model_seconds`: from a launch to the end of the wait for its tokens, sampling included, for the device does both in
    one go. `sampling_seconds`: of the host, for masks before a launch and automata after it."""

    def __init__(self, model: TorchModel, vocabulary: Vocabulary, *, depth: int = 0) -> None:
        """`depth`: steps that are planned before an earlier one was collected (`CoreConfig.depth`)."""
        super().__init__(vocabulary, model.page_tokens)
        self._model = model
        self._loaded = model.loaded
        self._device = model.loaded.device
        self._depth = depth
        self._workspace = Workspace(self._device)
        self._rows = RepeatedRows()
        self._tokens: dict[int, Tensor] = {}
        """What the latest steps sampled, on the device: later steps may name it."""

    def launch(self, step: StepInput) -> Enqueued:
        started = time.perf_counter()
        with _named_faults(), torch.inference_mode():
            self._automata.forget(step.ended)
            for copy in step.copies:
                self._model.copy_rows(copy.src, copy.dst, copy.rows)
            logits = self._loaded.forward(step.batch, lambda ids: self._name(step, ids))
            enqueued = self._sample(step, logits)
        self.model_seconds += time.perf_counter() - started
        return enqueued

    def collect(self, pending: Pending) -> Sampled:
        if not isinstance(pending, Enqueued):
            raise BrokenInvariant(f"step {pending.step} was not launched here")
        started = time.perf_counter()
        with _named_faults():
            pending.event.synchronize()
        arrived = time.perf_counter()
        ids, faulty = pending.ids.tolist(), pending.faulty.tolist()
        logprobs = list(zip(pending.logprob.tolist(), pending.draw_logprob.tolist(), strict=True))
        sampled = tuple(
            self._token(pending, place, one, ids[place], faulty[place], logprobs[place])
            for place, one in enumerate(pending.samples)
        )
        self.model_seconds += arrived - started
        self.sampling_seconds += time.perf_counter() - arrived
        return sampled

    def save(self, pages: Sequence[int], slots: Sequence[int]) -> None:
        self._model.save(pages, slots)

    def load(self, slots: Sequence[int], pages: Sequence[int]) -> None:
        self._model.load(slots, pages)

    # ---- on the device --------------------------------------------------------------------------------------------
    def _name(self, step: StepInput, ids: Tensor) -> None:
        """Puts tokens that the host does not know yet into the step's ids."""
        unknown = step.unknown
        for earlier in sorted(set(unknown.step.tolist())):
            if earlier not in self._tokens:
                raise BrokenInvariant(f"step {step.step} names a token of step {earlier}, which is not kept any more")
            mine = unknown.step == earlier
            put(ids, unknown.at[mine], self._tokens[earlier], unknown.place[mine])

    def _sample(self, step: StepInput, logits: Tensor) -> Enqueued:
        started = time.perf_counter()
        masks: dict[int, Any] = {}
        adjustments: dict[int, Adjustment] = {}
        refused: dict[int, str] = {}
        for place, one in enumerate(step.samples):
            try:
                if (allowed := self._automata.allowed(one)) is not None:
                    masks[place] = allowed
                if (adjustment := self._automata.adjustment(one)) is not None:
                    adjustments[place] = adjustment
            except REFUSALS as reason:
                refused[place] = str(reason)
        self.sampling_seconds += time.perf_counter() - started
        if step.samples:
            drawn = sample(logits, self._rows.on_device(step.samples, masks, adjustments, logits), self._workspace)
            ids = torch.where(drawn.faulty == 0, drawn.ids, 0)
            asked = any(asked_of(one) >= 0 for one in step.samples)
            reported = (drawn.logprob, drawn.draw_logprob, drawn.top_ids, drawn.top_logprobs)
            held = (ids, drawn.faulty, *(reported if asked else ()))
        else:
            ids = torch.zeros(0, dtype=torch.int64, device=self._device)
            held = (ids, ids)
        self._keep(step.step, ids)
        host = [torch.empty(part.shape, dtype=part.dtype, pin_memory=True) for part in held]
        for target, source in zip(host, held, strict=True):
            target.copy_(source, non_blocking=True)
        event = _cuda.Event(blocking=True)
        event.record()
        none, zeros = torch.zeros(len(step.samples), 0), torch.zeros(len(step.samples))
        told = host[2:] if len(host) > 2 else (zeros, zeros, none, none)
        return Enqueued(step.step, event, step.samples, refused, host[0], host[1], *told)

    def _keep(self, step: int, ids: Tensor) -> None:
        """A step is named only by those that were planned while it was in flight: at most `depth` later ones."""
        if self._depth:
            self._tokens[step] = ids
            for old in [old for old in self._tokens if old <= step - self._depth]:
                del self._tokens[old]

    # ---- on the host ----------------------------------------------------------------------------------------------
    def _token(
        self, pending: Enqueued, place: int, one: Sample, token: int, faulty: int, logprobs: tuple[float, float]
    ) -> Token | Refusal:
        """`logprobs`: of the model's own distribution, and of the one that the token was drawn from."""
        if place in pending.refused:
            return Refusal(pending.refused[place])
        if faulty:
            return refusal(_FAULTS[faulty]())
        try:
            end = self._automata.end(one, token)
        except REFUSALS as reason:
            return refusal(reason)
        asked = asked_of(one)
        if asked < 0:
            return Token(token, None, (), end)
        best = pending.top_ids[place, :asked].tolist(), pending.top_logprobs[place, :asked].tolist()
        return Token(token, logprobs[0], tuple(zip(*best, strict=True)), end, logprobs[1])


def put(ids: Tensor, at: Int64s, tokens: Tensor, place: Int64s) -> None:
    """ids[at] = tokens[place], on the device of both. Where all follow one another, as in most decode steps, no index
    is copied there."""
    if (np.diff(at) == 1).all() and (np.diff(place) == 1).all():
        ids[int(at[0]) : int(at[0]) + at.size] = tokens[int(place[0]) : int(place[0]) + place.size]
        return
    where = unwaited(np.stack([at, place]), ids.device)
    ids[where[0]] = tokens[where[1]]


@contextmanager
def _named_faults() -> Iterator[None]:
    """What a GPU refuses ends the engine by its name: no room for a step, or a device that is gone.

    Sessions live on in the recording of the engine and in their clients' logs, from which another engine restores
    them."""
    try:
        with out_of_memory("a step"):
            yield
    except torch.AcceleratorError as error:
        said = str(error).splitlines()[0]
        raise EngineFault(
            "device_lost",
            f"The GPU faulted and is lost to this process: {said}.",
            "Start another engine; see what the driver says (dmesg, nvidia-smi).",
        ) from error

"""The executor on one GPU: a launched step is enqueued, from the upload to the copy of its tokens to the host."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agentspeed_engine.errors import BrokenInvariant, EngineFault
from agentspeed_engine.exec.automata import REFUSALS, refusal
from agentspeed_engine.exec.device_steps import DeviceSteps, LogitRules
from agentspeed_engine.exec.executor import Pending, Refusal, Sampled, Token
from agentspeed_engine.exec.penalties import Adjustment
from agentspeed_engine.exec.sampler import not_finite, ruled_out
from agentspeed_engine.exec.sampling_rows import asked_of
from agentspeed_engine.exec.step_input import Sample, StepInput
from agentspeed_engine.exec.torch_model import TorchModel
from agentspeed_engine.exec.turns_on_host import TurnsOnHost
from agentspeed_engine.exec.vocabulary import Vocabulary
from agentspeed_engine.models.inputs import FlatBatch
from agentspeed_engine.models.loaded import out_of_memory

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
    refused: Mapping[int, str]
    """By place among the samples: why there is no token."""
    until: float
    """Of `time.monotonic`: when it must be done, where other ranks have a part in it."""
    ids: Tensor
    faulty: Tensor
    logprob: Tensor
    draw_logprob: Tensor
    top_ids: Tensor
    top_logprobs: Tensor

    def done(self) -> bool:
        """Whether there is nothing to wait for, also where it is overdue: `collect` says so then."""
        return bool(self.event.query()) or time.monotonic() > self.until


class OtherRanks(Protocol):
    """Those that carry out the same steps beside this one (`exec.ranks.device_leader`)."""

    def tell(self, step: StepInput, asked: LogitRules) -> None:
        """Each is told a step before it is launched here."""
        ...

    @property
    def seconds(self) -> float:
        """How long a step may take from its launch on."""
        ...

    def arrive(self, event: Any, until: float) -> None:
        """Returns when `event` has passed and what was computed before it counts; at `until` it is overdue. Raises what
        `named` names."""
        ...

    def copy(
        self, direction: Literal["save", "load"], pages: Sequence[int], slots: Sequence[int], mine: Callable[[], None]
    ) -> None:
        """Carries out `mine` while the others do the same. Raises `CopyFailed` where one could not."""
        ...

    def named(self) -> AbstractContextManager[None]:
        """Raises `EngineFault` (rank_lost, or what another rank said) for what goes wrong because of one."""
        ...


@final
class CudaExecutor(TurnsOnHost):
    """`exec.executor.Executor` over a model on a GPU, in bfloat16 or float32. Needs Triton.

    `model_seconds`: from a launch to the end of the wait for its tokens, sampling included, for the device does both in
    one go. `sampling_seconds`: of the host, for masks before a launch and automata after it."""

    def __init__(
        self, model: TorchModel, vocabulary: Vocabulary, *, depth: int = 0, others: OtherRanks | None = None
    ) -> None:
        """`depth`: steps that are planned before an earlier one was collected (`CoreConfig.depth`). `others`: None
        where this is the only rank."""
        super().__init__(vocabulary, model.page_tokens)
        self._model, self._others = model, others
        self._steps = DeviceSteps(model, depth=depth)

    def launch(self, step: StepInput) -> Enqueued:
        started = time.perf_counter()
        self._automata.forget(step.ended)
        asked: LogitRules | None = None
        if self._others is not None:
            asked = self._asked(step)
            self._others.tell(step, asked)

        def ask() -> LogitRules:
            nonlocal asked
            asked = asked or self._asked(step)
            return asked

        with self._named():
            held = self._steps.run(step, ask)
            until = math.inf if self._others is None else time.monotonic() + self._others.seconds
            enqueued = _enqueued(step, held, {} if asked is None else asked.refused, until)
        self.model_seconds += time.perf_counter() - started
        return enqueued

    def collect(self, pending: Pending) -> Sampled:
        if not isinstance(pending, Enqueued):
            raise BrokenInvariant(f"step {pending.step} was not launched here")
        started = time.perf_counter()
        with self._named():
            if self._others is None:
                pending.event.synchronize()
            else:
                self._others.arrive(pending.event, pending.until)
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
        if self._others is None:
            self._model.save(pages, slots)
        else:
            self._others.copy("save", pages, slots, lambda: self._model.save(pages, slots))

    def load(self, slots: Sequence[int], pages: Sequence[int]) -> None:
        if self._others is None:
            self._model.load(slots, pages)
        else:
            self._others.copy("load", pages, slots, lambda: self._model.load(slots, pages))

    def run(self, batch: FlatBatch) -> None:
        """One pass of which nothing is drawn: what it costs is measured so."""
        _ = self.collect(self.launch(StepInput(step=-1, batch=batch)))

    @contextmanager
    def _named(self) -> Iterator[None]:
        """What a GPU refuses, or another rank breaks, ends the engine by its name."""
        if self._others is None:
            with _named_faults():
                yield
        else:
            with self._others.named(), _named_faults():
                yield

    def _asked(self, step: StepInput) -> LogitRules:
        started = time.perf_counter()
        masks: dict[int, NDArray[np.bool_]] = {}
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
        return LogitRules(masks, adjustments, refused)

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


def _enqueued(step: StepInput, held: Sequence[Tensor], refused: Mapping[int, str], until: float) -> Enqueued:
    """On its way to pinned memory."""
    host = [torch.empty(part.shape, dtype=part.dtype, pin_memory=True) for part in held]
    for target, source in zip(host, held, strict=True):
        target.copy_(source, non_blocking=True)
    event = _cuda.Event(blocking=True)
    event.record()
    none, zeros = torch.zeros(len(step.samples), 0), torch.zeros(len(step.samples))
    told = host[2:] if len(host) > 2 else (zeros, zeros, none, none)
    return Enqueued(step.step, event, step.samples, refused, until, host[0], host[1], *told)


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

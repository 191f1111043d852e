"""Steps that every rank enqueues on a GPU of its own and draws by itself: how they are told, and who carries them out.

All ranks have the same logits and the same noise, so they draw the same tokens, and a step may name tokens of one that
is in flight: each finds them on its GPU. Nobody tells what was drawn.
"""

from __future__ import annotations

import math
import time
from collections import deque
from operator import is_not
from typing import Any, Final, final

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from agentspeed_engine.exec.device_steps import DeviceSteps, LogitRules
from agentspeed_engine.exec.penalties import Adjustment
from agentspeed_engine.exec.ranks.group import Group, GroupBroken
from agentspeed_engine.exec.ranks.orders import SampleOrder, StepOrder, batch_of, sample_order, shard_sample, step_order
from agentspeed_engine.exec.step_input import Sample, StepInput, Unknown
from agentspeed_engine.exec.torch_model import TorchModel
from agentspeed_engine.ids import BranchId
from agentspeed_engine.kv.views import PageCopy, TurnSpec

_cuda: Any = torch.cuda
"""torch gives these no types."""
_LOOKS: Final = 5e-5
"""Seconds between two looks at a step that is waited for."""
_ENDING: Final = 5.0
"""Seconds that a step has to end in once a rank is given up. Sums in shared memory end at once; NCCL's may never."""
_OVERDUE: Final = "a step did not end in time"
_GIVEN_UP: Final = "a rank gave up"


@final
class LaunchOrder(msgspec.Struct, frozen=True, array_like=True):
    """One step."""

    step: int
    order: StepOrder
    """Its ids are 0 where `unknown` says so; its samples are empty where `again`."""
    unknown: bytearray
    """int64 [3, U]: `step_input.Unknown`."""
    again: bool
    """The turns of the order before draw, in the same places, and nothing is masked or changed."""
    positions: bytearray
    """int64: of the tokens that are drawn."""


@final
class LaunchOrders:
    """What is told of one step after the other: what turns ask for is told again only where other turns draw."""

    def __init__(self) -> None:
        self._specs: tuple[TurnSpec, ...] = ()

    def of(self, step: StepInput, asked: LogitRules) -> LaunchOrder:
        specs = tuple(one.spec for one in step.samples)
        same = len(specs) == len(self._specs) and not any(map(is_not, specs, self._specs))
        again = same and bool(specs) and not asked.masks and not asked.adjustments
        self._specs = specs
        samples: tuple[SampleOrder, ...] = ()
        if not again:
            samples = tuple(
                sample_order(
                    one.spec.sampling, one.spec.draw_key, one.position, asked.masks.get(place),
                    asked.adjustments.get(place),
                )
                for place, one in enumerate(step.samples)
            )  # fmt: skip
        unknown = step.unknown
        return LaunchOrder(
            step=step.step,
            order=step_order(step.batch, step.copies, samples),
            unknown=_bytes(np.stack([unknown.at, unknown.step, unknown.place])),
            again=again,
            positions=_bytes(np.array([one.position for one in step.samples], np.int64)),
        )


@final
class HeardOrders:
    """`LaunchOrders` on the other side."""

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._specs: tuple[TurnSpec, ...] = ()

    def step(self, told: LaunchOrder) -> tuple[StepInput, LogitRules]:
        masks: dict[int, NDArray[np.bool_]] = {}
        adjustments: dict[int, Adjustment] = {}
        if not told.again:
            self._specs = tuple(_turn(one) for one in told.order.samples)
            for place, one in enumerate(told.order.samples):
                whole = shard_sample(one, 0, self._vocabulary)
                if whole.allowed is not None:
                    masks[place] = whole.allowed
                if whole.adjustment is not None:
                    adjustments[place] = whole.adjustment
        positions = np.frombuffer(told.positions, np.int64).tolist()
        at, step, place_of = np.frombuffer(told.unknown, np.int64).reshape(3, -1)
        given = StepInput(
            step=told.step,
            batch=batch_of(told.order),
            unknown=Unknown(at=at, step=step, place=place_of),
            copies=tuple(PageCopy(*copy) for copy in told.order.copies),
            samples=tuple(Sample(spec, position) for spec, position in zip(self._specs, positions, strict=True)),
        )
        return given, LogitRules(masks, adjustments)


@final
class Launcher:
    """One rank that is told what to enqueue."""

    def __init__(self, model: TorchModel, group: Group, *, depth: int, seconds: float) -> None:
        """`seconds`: how long a step may take from its launch on."""
        self._steps, self._group, self._seconds = DeviceSteps(model, depth=depth), group, seconds
        self._orders = HeardOrders(model.loaded.info.vocab_size)
        self._decoder = msgspec.msgpack.Decoder(LaunchOrder)
        self._depth = depth
        self._flights: deque[tuple[Any, float]] = deque()
        """Events at the ends of steps, and when those must be done."""

    def carry_out(self, frame: bytearray) -> None:
        """Returns when the step is on its way, and all but the latest are done. Raises `GroupBroken`."""
        step, asked = self._orders.step(self._decoder.decode(frame))
        _ = self._steps.run(step, lambda: asked)
        event = _cuda.Event()
        event.record()
        self._flights.append((event, time.monotonic() + self._seconds))
        while len(self._flights) > self._depth + 1:
            oldest, until = self._flights.popleft()
            arrive(oldest, self._group, until)


def arrive(event: Any, group: Group, until: float, *, ending: float = _ENDING) -> None:
    """Returns when `event` has passed and what was computed before it counts. Raises `GroupBroken` where a rank did not
    come to a sum, which is said of all that is not done at `until`, of `time.monotonic`; then the step has `ending`
    seconds more."""
    overdue, last = False, math.inf
    while not event.query():
        now = time.monotonic()
        if now > until and not group.given_up:
            overdue = True
            group.abandon()
            if not group.given_up:  # its sums are made by others, who hear of no end
                raise GroupBroken(_OVERDUE, group.late)
        if group.given_up:
            last = min(last, now + ending)
            if now >= last:  # nor is it asked who was late: the GPU would have to say, and is busy
                raise GroupBroken(_OVERDUE if overdue else _GIVEN_UP)
        time.sleep(_LOOKS)
    if group.given_up:  # whoever else gave up knows why
        raise GroupBroken(_OVERDUE, group.late) if overdue else GroupBroken(_GIVEN_UP)


def _turn(order: SampleOrder) -> TurnSpec:
    """As far as drawing needs it."""
    return TurnSpec(
        turn=0, branch=BranchId(0), sampling=order.sampling, draw_key=order.key, stop_strings=(), grammar=None,
        consumed_ids=(), prompt_tokens=0,
    )  # fmt: skip


def _bytes(numbers: NDArray[np.int64]) -> bytearray:
    return bytearray(np.ascontiguousarray(numbers).data)

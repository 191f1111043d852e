"""Rank 0's side of steps that every rank launches by itself: it tells each before it launches its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, final

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.exec.device_steps import LogitRules
from agentspeed_engine.exec.ranks.group import Group, GroupBroken
from agentspeed_engine.exec.ranks.launches import LaunchOrders, arrive
from agentspeed_engine.exec.ranks.leader import Losses
from agentspeed_engine.exec.ranks.orders import CopyOrder
from agentspeed_engine.exec.ranks.sides import Followers
from agentspeed_engine.exec.step_input import StepInput


@final
class DeviceLeader:
    """`exec.cuda.OtherRanks` of one dp rank."""

    def __init__(self, followers: Followers, group: Group, losses: Losses, *, seconds: float) -> None:
        """`seconds`: how long a step may take from its launch on."""
        self._followers, self._group, self._losses, self.seconds = followers, group, losses, seconds
        self._orders = LaunchOrders()

    def tell(self, step: StepInput, asked: LogitRules) -> None:
        with self.named():
            self._followers.step(self._orders.of(step, asked))

    def arrive(self, event: Any, until: float) -> None:
        arrive(event, self._group, until)

    def copy(
        self, direction: Literal["save", "load"], pages: Sequence[int], slots: Sequence[int], mine: Callable[[], None]
    ) -> None:
        with self.named():
            self._followers.copy(CopyOrder(direction, tuple(pages), tuple(slots)), mine)

    @contextmanager
    def named(self) -> Iterator[None]:
        try:
            yield
        except (GroupBroken, OSError, RuntimeError, EngineFault) as error:
            if isinstance(error, EngineFault) and error.code != "device_lost":
                raise
            if (fault := self._losses.fault(error)) is not None:
                raise fault from error
            raise

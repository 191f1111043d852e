"""Carries out host copies in a thread of their own, so that neither a step nor a command waits for one."""

from __future__ import annotations

import contextlib
import math
import queue
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, final

from agentspeed_engine.clock import Clock, MonotonicClock
from agentspeed_engine.exec.executor import CopyFailed
from agentspeed_engine.ids import TicketId
from agentspeed_engine.sched.plan import HostCopy


@final
@dataclass(frozen=True, slots=True)
class Copied:
    """How one ticket ended."""

    ticket: TicketId
    ok: bool


class Transfers(Protocol):
    """What the copier needs of an executor (`exec.executor.Executor`)."""

    def save(self, pages: Sequence[int], slots: Sequence[int]) -> None: ...

    def load(self, slots: Sequence[int], pages: Sequence[int]) -> None: ...


@final
class Copier:
    """One thread, one copy after the other. `report` is called from that thread."""

    def __init__(
        self, executor: Transfers, report: Callable[[Copied | Exception], None], clock: Clock | None = None
    ) -> None:
        self._executor = executor
        self._clock = MonotonicClock() if clock is None else clock
        self._report = report
        self._progress = -math.inf
        """When a copy last ended that did not take too long."""
        self._begun: queue.SimpleQueue[TicketId] = queue.SimpleQueue()
        self._orders: queue.SimpleQueue[HostCopy | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="agentspeed-copies", daemon=True)

    def start(self, copy: HostCopy) -> None:
        """Returns at once. The thread begins with the first copy: most engines never make one."""
        if not self._thread.is_alive():
            self._thread.start()
        self._orders.put(copy)

    def begun(self) -> list[TicketId]:
        """Tickets that began, or looked at the clock in order to, since this was last asked."""
        found: list[TicketId] = []
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self._begun.get_nowait())
        return found

    def close(self, seconds: float) -> None:
        """Ends after the copies that were ordered, waiting at most so long."""
        self._orders.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout=seconds)

    def _run(self) -> None:
        while (copy := self._orders.get()) is not None:
            try:
                done: Copied | Exception = Copied(copy.ticket, self._carry_out(copy))
            except Exception as error:  # noqa: BLE001 - our bug: handed to the loop thread, which raises it
                done = error
            self._report(done)

    def _carry_out(self, copy: HostCopy) -> bool:
        self._begun.put(copy.ticket)  # before the clock is read: who reads a later time has heard of it
        if not copy.may_begin(self._clock.now(), self._progress):
            print(f"host copy {copy.ticket} ({copy.direction}) came too late to begin", file=sys.stderr)
            return False
        try:
            if copy.direction == "save":
                self._executor.save(copy.pages, copy.slots)
            else:
                self._executor.load(copy.slots, copy.pages)
        except CopyFailed as reason:
            print(f"host copy {copy.ticket} ({copy.direction}) failed: {reason}", file=sys.stderr)
            return False
        finally:
            # Before it is reported: who hears of it reads a later time.
            self._progress = copy.progress(self._clock.now(), self._progress)
        return True

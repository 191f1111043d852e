"""Carries out host copies in a thread of their own, so that neither a step nor a command waits for one."""

from __future__ import annotations

import contextlib
import math
import queue
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, final

from agentspeed_engine.clock import Clock, MonotonicClock
from agentspeed_engine.exec.executor import CopyFailed
from agentspeed_engine.ids import TicketId
from agentspeed_engine.sched.plan import HostCopy

MOST_PAGES = 64
"""Of copies that are carried out as one: who waits for the first waits for all."""


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
    """One thread, in the order of tickets; those that follow one another and go the same way are one copy. `report` is
    called from that thread."""

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
        self._behind: deque[HostCopy | None] = deque()
        """The order that was found behind others and is not carried out with them; None: there are no more."""
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
        while (first := self._next()) is not None:
            batch = self._alike(first)
            try:
                done: list[Copied] | Exception = self._carry_out(batch)
            except Exception as error:  # noqa: BLE001 - our bug: handed to the loop thread, which raises it
                done = error
            for one in [done] if isinstance(done, Exception) else done:
                self._report(one)

    def _next(self) -> HostCopy | None:
        return self._behind.popleft() if self._behind else self._orders.get()

    def _alike(self, first: HostCopy) -> list[HostCopy]:
        """`first` with those behind it that are there already and go the same way: what a copy costs beside its bytes
        is paid once for all."""
        batch, pages = [first], len(first.pages)
        while not self._behind:
            try:
                order = self._orders.get_nowait()
            except queue.Empty:
                break
            if order is None or order.direction != first.direction or pages + len(order.pages) > MOST_PAGES:
                self._behind.append(order)
                break
            batch.append(order)
            pages += len(order.pages)
        return batch

    def _carry_out(self, batch: list[HostCopy]) -> list[Copied]:
        for copy in batch:  # before the clock is read: who reads a later time has heard of it
            self._begun.put(copy.ticket)
        now, done = self._clock.now(), list[Copied]()
        timely = [copy for copy in batch if copy.may_begin(now, self._progress)]
        for copy in batch:
            if copy not in timely:
                print(f"host copy {copy.ticket} ({copy.direction}) came too late to begin", file=sys.stderr)
                done.append(Copied(copy.ticket, False))
        try:
            failed = self._moved(timely)
        finally:
            # Before it is reported: who hears of it reads a later time.
            ended = self._clock.now()
            self._progress = max([copy.progress(ended, self._progress) for copy in timely], default=self._progress)
        return [*done, *(Copied(copy.ticket, copy.ticket not in failed) for copy in timely)]

    def _moved(self, copies: list[HostCopy]) -> set[TicketId]:
        """The tickets of those that failed. Of several that fail together each is tried by itself."""
        if not copies:
            return set()
        pages, slots = (
            [page for copy in copies for page in copy.pages],
            [slot for copy in copies for slot in copy.slots],
        )
        try:
            if copies[0].direction == "save":
                self._executor.save(pages, slots)
            else:
                self._executor.load(slots, pages)
        except CopyFailed as reason:
            if len(copies) > 1:
                return set[TicketId]().union(*(self._moved([copy]) for copy in copies))
            print(f"host copy {copies[0].ticket} ({copies[0].direction}) failed: {reason}", file=sys.stderr)
            return {copies[0].ticket}
        return set()

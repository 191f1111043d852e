"""The loop and the copier's thread, step by step in any order and at any time: what has begun is never given up."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

from agentspeed_engine.ids import TicketId
from agentspeed_engine.sched.plan import HostCopy
from tests.support.any_command import any_command
from tests.support.scheduled import Scheduled

DEADLINE = 2.0


class Race:
    """Each step of either side is as small as another thread may see it; their order is that of `run`."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.world = Scheduled(
            pages=self.chance.choice((18, 30)), host_slots=80, max_sessions=8, ticket_deadline=DEADLINE
        )
        self.world.host = None
        self.clock = 0.0
        self.orders: list[HostCopy] = []
        self.said: list[TicketId] = []
        self.reports: list[tuple[TicketId, bool]] = []
        self.began = self.refused = 0

    def now(self) -> float:
        """Machines stand still: a moment may last longer than the deadline."""
        if self.chance.random() < 0.3:
            self.clock += self.chance.choice((1e-3, 0.1, 0.7, 3.0))
        return self.clock

    def run(self, steps: int) -> None:
        sides = (self.copier(), self.loop())
        for _ in range(steps):
            next(sides[self.chance.random() < self.chance.choice((0.2, 0.5, 0.8))])

    def copier(self) -> Iterator[None]:
        progress = -math.inf
        while True:
            yield
            if not self.orders:
                continue
            order = self.orders.pop(0)
            yield
            self.said.append(order.ticket)
            yield
            ok = order.may_begin(self.now(), progress)
            yield
            if ok:
                yield from self.carried_out(order)
                progress = order.progress(self.now(), progress)
                yield
            self.refused += not ok
            self.reports.append((order.ticket, ok))

    def carried_out(self, order: HostCopy) -> Iterator[None]:
        self.began += 1
        for _ in range(self.chance.randrange(1, 7)):
            assert order.ticket in self.world.core.world.tickets, f"{order} was given up, and writes"
            _ = self.now()
            yield
        self.world.device.copy(order)

    def loop(self) -> Iterator[None]:
        world = self.world
        while True:
            world.now = self.now()
            if self.chance.random() < 0.5:
                any_command(world, self.chance)
            yield
            while self.reports:
                ticket, ok = self.reports.pop(0)
                yield
                world.now = self.now()
                world.hear(world.core.copied(ticket, ok, world.now))
                yield
            now = self.now()
            yield
            while self.said:
                world.core.begun(self.said.pop(0))
                yield
            world.now = now
            while world.step():
                pass
            made, world.copies = world.copies, []
            for order in made:
                yield
                self.orders.append(order)


def test_no_copy_that_began_is_given_up_however_the_two_threads_take_turns() -> None:
    began = refused = late = 0
    for seed in range(24):
        race = Race(seed)
        race.run(1500)
        began, refused = began + race.began, refused + race.refused
        late += race.world.core.counts()["tickets_late"]
    assert min(began, refused, late) > 5, "copies begin, come too late, and are given up"

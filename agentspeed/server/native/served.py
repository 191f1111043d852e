"""Sessions that a server holds for its clients: by tenant and id, with the events of their turns, for a bounded time.

A turn belongs to the server, not to the connection that asked for it: a client that lost its connection reads on from
the last event that it has. Nobody who comes back within `grace` seconds loses anything; after that the turn is
cancelled, as leaving its block does.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, Final, final

import anyio
from anyio.abc import TaskGroup

from agentspeed import errors
from agentspeed._base.wording import counted
from agentspeed.server.native.bodies import event_json, reply_json
from agentspeed.server.problems import Problem, RequestProblem, problem_of, refused
from agentspeed.server.saved_sessions import SavedSessions
from agentspeed.server.snapshot_files import BrokenSnapshot
from agentspeed.session import Session
from agentspeed.turn import Turn

MOST_EVENTS: Final = 65_536
"""Events of one session that can still be read; older ones are gone, and a reader of them is told so."""
_LAST: Final = ("Reply", "Error", "Cancelled")
"""What a turn ends with."""


@final
class Served:
    """One session of one tenant."""

    def __init__(self, session: Session, tenant: str) -> None:
        self.session = session
        self.tenant = tenant
        self.used_at = time.monotonic()
        self.readers = 0
        self.left_at: float | None = None
        """Since when a running turn has no reader; None while it has one, or none runs."""
        self.turn: anyio.CancelScope | None = None
        self._events: deque[dict[str, Any]] = deque(maxlen=MOST_EVENTS)
        self._last = 0
        self._more = anyio.Event()

    def tell(self, event: dict[str, Any]) -> None:
        """One event, numbered in the order in which readers get them."""
        self._last += 1
        self._events.append({**event, "seq": self._last})
        self._wake()

    def _wake(self) -> None:
        self._more.set()
        self._more = anyio.Event()

    def go_on_from(self, last: int) -> None:
        """Numbers of events go on where those of an earlier server ended; its events are gone."""
        self._last = last

    @property
    def last(self) -> int:
        """Number of the newest event; 0 before the first."""
        return self._last

    def newest(self, most: int) -> list[dict[str, Any]]:
        """The last `most` events."""
        return list(self._events)[-most:]

    async def read(self, after: int, *, one_turn: bool = False) -> AsyncIterator[dict[str, Any]]:
        """Events after number `after`, until the turn that runs (if one does) has ended, or `one_turn` has. Raises
        `RequestProblem` when some of them are gone."""
        if after < (gone := self._last - len(self._events)):
            raise refused(f"Events up to {gone} are gone.", status=410, param="after", code="events_gone")
        while True:
            fresh = max(0, min(self._last - after, len(self._events)))
            for event in [self._events[place] for place in range(-fresh, 0)]:  # their numbers have no gaps
                after = event["seq"]
                yield event
                if one_turn and event["type"] in _LAST:
                    return
            if not fresh:
                if self.turn is None:
                    return
                await self._more.wait()

    def came_to_nothing(self, after: int) -> bool:
        """Whether the turn whose events follow number `after` ended without a reply. False while it runs, and when its
        events are gone."""
        place = after - (self._last - len(self._events))
        if place < 0:
            return False
        ends = (event["type"] for event in islice(self._events, place, None) if event["type"] in _LAST)
        return next(ends, "Reply") != "Reply"

    @contextmanager
    def reading(self) -> Iterator[None]:
        """While it has a reader, a turn is not given up."""
        self.readers += 1
        self.left_at = None
        try:
            yield
        finally:
            self.readers -= 1
            self.used_at = time.monotonic()
            if not self.readers:
                self.left_at = self.used_at

    async def run(self, turn: Turn[Any]) -> None:
        """The turn to its end; what goes wrong is an event too."""
        scope = self.turn or anyio.CancelScope()
        with scope:
            try:
                async with turn:
                    async for event in turn:
                        self.tell(event_json(event))
                    self.tell({"type": "Reply", "reply": reply_json(turn.result())})
            except errors.AgentspeedError as error:
                self.tell({"type": "Error", **_error_of(problem_of(error))})
            finally:
                self.turn = None
                self.used_at = time.monotonic()
                if scope.cancelled_caught or scope.cancel_called:
                    self.tell({"type": "Cancelled"})
                self._wake()

    async def ended(self) -> None:
        """Returns once no turn runs."""
        while self.turn is not None:
            await self._more.wait()


def _exists(number: str) -> RequestProblem:
    return refused(f"There is a session {number!r} already.", status=409, code="session_exists")


def _error_of(problem: Problem) -> dict[str, Any]:
    return {"status": problem.status, "code": problem.code, "message": problem.message}


@final
class Sessions:
    """All of them. `group` runs their turns; `saved` has those of earlier servers."""

    def __init__(
        self,
        group: TaskGroup,
        *,
        most: int,
        idle_seconds: float,
        grace: float,
        saved: SavedSessions | None = None,
    ) -> None:
        self._group = group
        self._saved = saved
        self._restoring = anyio.Lock()
        self._most = most
        self._idle_seconds = idle_seconds
        self._grace = grace
        self._served: dict[tuple[str, str], Served] = {}
        self._coming: set[tuple[str, str]] = set()
        """Sessions that are being opened: nobody else may have their ids."""

    def __len__(self) -> int:
        return len(self._served)

    def of(self, tenant: str) -> list[Served]:
        """Those of one tenant."""
        return [served for served in self._served.values() if served.tenant == tenant]

    async def find(self, tenant: str, number: str) -> Served:
        """As `get`, and a session that an earlier server saved is opened again. Raises `RequestProblem` (410) for one
        whose file is broken, and what entering a session raises."""
        if (tenant, number) not in self._served and self._saved is not None:
            async with self._restoring:  # whoever asks meanwhile finds it open
                if not self._is_taken(tenant, number):
                    with self._opening(tenant, number):
                        await self._restore(self._saved, tenant, number)
        return self.get(tenant, number)

    async def forget_saved(self, tenant: str, number: str) -> bool:
        """Whether an earlier server had saved this session and it was not opened again: then it is gone, its file too,
        which may be broken."""
        async with self._restoring:
            if self._saved is None or self._is_taken(tenant, number):
                return False
            return await self._saved.remove(tenant, number)

    async def _restore(self, among: SavedSessions, tenant: str, number: str) -> None:
        try:
            async with among.restoring("sessions", tenant, [number]) as found:
                if found is not None:
                    saved, session = found
                    self._room(0)  # it is among those that are opened
                    _ = await session.__aenter__()
                    self._keep(session, tenant).go_on_from(saved.last_event)
        except BrokenSnapshot as error:
            raise refused(
                f"Session {number!r} was saved, and its file {error}.", status=410, code="snapshot_broken"
            ) from error

    def get(self, tenant: str, number: str) -> Served:
        """Raises `RequestProblem` (404) for what is not there or is another tenant's."""
        served = self._served.get((tenant, number))
        if served is None:
            raise refused(f"There is no session {number!r}.", status=404, code="session_not_found")
        served.used_at = time.monotonic()
        return served

    async def add(self, session: Session, tenant: str) -> Served:
        """Enters the session. Raises what entering does, and `EngineOverloaded` when there are too many."""
        self._room(1)
        if self._is_taken(tenant, session.id):
            raise _exists(session.id)
        with self._opening(tenant, session.id):
            if self._saved is not None and await self._saved.has(tenant, session.id):
                raise _exists(session.id)
            _ = await session.__aenter__()
            return self._keep(session, tenant)

    async def fork(self, served: Served, n: int, at: str | int | None) -> list[Served]:
        """Children by their own ids; each lives until it is closed, adopted, or its parent ends. Raises
        `RequestProblem` (409) where a session that is no child of it has the id of one."""
        self._room(n)
        fork = served.session.fork(n, at=at)
        children = await fork.__aenter__()
        if other := next((child.id for child in children if self._is_taken(served.tenant, child.id)), None):
            await fork.__aexit__(None, None, None)
            raise _exists(other)
        return [self._keep(child, served.tenant) for child in children]

    async def adopt(self, served: Served, child: Served) -> None:
        """The child's context becomes the session's; the child ends."""
        await served.session.adopt(child.session)
        self._forget(child)

    async def close(self, served: Served) -> None:
        """Ends the session, its turn and its children."""
        if served.turn is not None:
            served.turn.cancel()
        self._forget(served)
        for child in [one for one in self._served.values() if one.session.parent is served.session]:
            await self.close(child)
        await served.session.close()

    def start(self, served: Served, turn: Turn[Any]) -> None:
        """Begins a turn whose events are read with `Served.read`."""
        served.left_at = time.monotonic()
        served.turn = anyio.CancelScope()
        self._group.start_soon(served.run, turn)

    async def sweep(self, now: Callable[[], float] = time.monotonic) -> None:
        """Cancels turns that nobody reads any more, and closes sessions that nobody used for long."""
        at = now()
        for served in list(self._served.values()):
            if served.turn is not None:
                if served.left_at is not None and at - served.left_at > self._grace:
                    served.turn.cancel()
            elif at - served.used_at > self._idle_seconds and (served.tenant, served.session.id) in self._served:
                await self.close(served)

    async def end_turns(self, seconds: float) -> None:
        """Waits for the turns that run; after so many seconds they are cancelled. Their readers hear it."""
        running = [served for served in self._served.values() if served.turn is not None]
        with anyio.move_on_after(seconds):
            for served in running:
                await served.ended()
        for served in running:
            if served.turn is not None:
                served.turn.cancel()
        for served in running:
            await served.ended()

    async def close_all(self) -> None:
        """At the end of the server. What has no turn is saved before, where there is a folder."""
        if self._saved is not None:
            for served in list(self._served.values()):
                await self._saved.save_session(served.session, served.tenant, served.last)
        for served in list(self._served.values()):
            await self.close(served)

    def _is_taken(self, tenant: str, number: str) -> bool:
        return (tenant, number) in self._served or (tenant, number) in self._coming

    @contextmanager
    def _opening(self, tenant: str, number: str) -> Iterator[None]:
        """While a session is opened its id and its place among `most` are its own."""
        self._coming.add((tenant, number))
        try:
            yield
        finally:
            self._coming.discard((tenant, number))

    def _room(self, wanted: int) -> None:
        if (there := len(self._served) + len(self._coming)) + wanted > self._most:
            raise errors.EngineOverloaded(
                f"{counted(there, 'session')} open, and the server keeps at most {self._most}.",
                remedy="Close some, or try again later.",
            )

    def _keep(self, session: Session, tenant: str) -> Served:
        served = self._served[tenant, session.id] = Served(session, tenant)
        return served

    def _forget(self, served: Served) -> None:
        _ = self._served.pop((served.tenant, served.session.id), None)

"""One branch of an engine, seen from the front: its mirror here, its number there, and the way back after a death.

Whatever is sent is answered before anything else happens to the branch: a verb is carried out to its end whatever
cancels it, and what it changes in the mirror changes in the order in which the engine did it. A verb that raises has
changed nothing, unless it says otherwise.
"""

from __future__ import annotations

import contextlib
import logging
import zlib
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol, TypeVar, final

import anyio
from msgspec.structs import replace

from agentspeed import errors
from agentspeed._base.completion import run_to_completion
from agentspeed._core.engine_handle import EngineHandle
from agentspeed._core.opening import Opening
from agentspeed._core.wire_values import inspection_of, lease_of, residence_of
from agentspeed.chat.token_log import Checkpoint, TokenLog
from agentspeed.transport.base import Connection, Sink, Then, pack_ids, unpack_ids, wire
from agentspeed.usage import Inspection, Lease, Residence

T = TypeVar("T")
_LOG = logging.getLogger("agentspeed.session")
_MOST_LABEL = 64
"""Characters of a session's id that the engine is told."""
_SOON_SECONDS = 0.5
"""An engine answers between two steps: for an answer that is only worth this much."""
_SILENT_SECONDS = 1.0
"""Silence of the engine after which a turn is left behind that is cancelled, or whose timeout is not longer."""


class Make(Protocol):
    """A command, given its request number and the branch's number."""

    def __call__(self, request: int, branch: int, /) -> wire.Command: ...


@final
class Branch:
    """Belongs to one event loop. `mirror` is the truth about its ids whatever happens to the engine."""

    def __init__(self, engine: EngineHandle, opening: Opening, mirror: TokenLog) -> None:
        self.engine = engine
        self.opening = opening
        self.mirror = mirror
        self.residence = Residence(device=0, host=0, lost=len(mirror))
        self.lease: Lease | None = None
        self.on_lease: Callable[[Lease], None] | None = None
        """Told when the engine changes a lease; on the event loop, so it must not raise."""
        self.death: errors.AgentspeedError | None = None
        """What the engine said before it ended, if it said anything."""
        self._link: Connection | None = None
        self._number = 0
        self._born: tuple[Connection, int] | None = None
        """The link and the parent's number at birth: while both hold, the engine knows the kinship too."""
        self._attaching = anyio.Lock()
        self._closed = False
        """For good: who is on the way back after a death meanwhile opens nothing that nobody would close."""
        self._opened = 0
        self._sink: Sink | None = None
        self._base: Checkpoint | None = None
        """Where the running turn began: what the engine's death leaves of it."""
        self._whole = False
        """The turn's end was heard: its reader ends it or takes it back, whatever happens to the engine meanwhile."""

    @property
    def attached(self) -> bool:
        """Whether an engine that lives has this branch."""
        return self._link is not None and self._link.alive

    # ---- the way to the engine ------------------------------------------------------------------------------------
    async def attach(self, patience: float | None = None) -> Connection:
        """The living link with this branch open on it; after a death a new branch with the mirrored ids. `patience`:
        seconds of the engine's silence after which this is given up and the link kept; None waits for `close_timeout`
        and gives up the link. Raises `SessionClosed` when the branch is closed meanwhile."""
        async with self._attaching:
            link = await self.engine.link()
            if self._link is not link and not self._closed:
                await run_to_completion(lambda: self._reopen(link, patience))
            if self._closed:
                raise errors.SessionClosed(
                    "The session was closed while its branch was being opened.",
                    remedy="Let what it does end before its block does.",
                )
            return link

    async def _reopen(self, link: Connection, patience: float | None) -> None:
        await self._open(link, patience)
        if self._closed:
            await self._leave()

    async def _open(self, link: Connection, patience: float | None) -> None:
        # Draws are keyed by the engine's count of turns, which starts anew: another seed keeps them from repeating.
        again = f"{self.opening.seed}/{self._opened}".encode()
        seed = self.opening.seed if not self._opened else zlib.crc32(again)

        def opened(reply: wire.Reply) -> None:
            if isinstance(reply, wire.Opened):
                self._settle(link, reply.branch)
                self.residence = residence_of(reply.residence)
                self._opened += 1

        _ = await self._call(
            link,
            lambda request: wire.Open(
                request=request,
                ids=pack_ids(self.mirror.ids),
                tenant=self.opening.tenant,
                private=self.opening.private,
                seed=seed,
                computed=self.mirror.computed,
                label=self._label(),
            ),
            opened,
            patience,
        )

    def _label(self) -> str:
        """A name may be of any length, and hold what the engine takes for the end of one."""
        return self.opening.label.replace("\0", "")[:_MOST_LABEL]

    def _settle(self, link: Connection, number: int) -> None:
        self._link, self._number = link, number
        link.listen(number, self._heard)

    async def command(self, make: Make, then: Then | None = None) -> wire.Reply:
        """One command, answered. Raises the public error of a refusal; done all the same when it was cancelled."""
        return await self._again(lambda: self._attempt(make, then))

    async def _again(self, once: Callable[[], Awaitable[T]]) -> T:
        """An engine that died while nothing ran is started again and asked once more."""
        try:
            return await once()
        except errors.EngineDied as death:
            _LOG.info("asking again after: %s", death)
            return await once()

    async def _attempt(self, make: Make, then: Then | None) -> wire.Reply:
        link = await self.attach()
        return await run_to_completion(lambda: self._call(link, lambda request: make(request, self._number), then))

    def _call(
        self,
        link: Connection,
        make: Callable[[int], wire.Command],
        then: Then | None = None,
        patience: float | None = None,
    ) -> Coroutine[Any, Any, wire.Reply]:
        """Sends a command; the caller awaits the result inside of `run_to_completion`. An engine that answers other
        calls is waited for, however long its step takes; one that answers none for `close_timeout` seconds is given
        up, with its link. `patience`: give up this call alone, after fewer seconds."""
        most = self.opening.close_timeout
        if patience is None or patience >= most:
            return link.call(make, then, patience=most)
        return link.call(make, then, patience=patience, keep_link=True)

    def _heard(self, event: wire.Event | None) -> None:
        """On the event loop, in the engine's order: the mirror first, so that a live fork finds every committed id."""
        if event is None:
            self.death = None if self._link is None else self._link.why_dead
            self._link = None
            self._born = None
            self._drop_turn()
        elif isinstance(event, wire.TurnEnded):
            self._whole = True
        elif isinstance(event, wire.Tokens):
            self.mirror.drew(unpack_ids(event.ids), event.logprobs, event.draw_logprobs)
        elif isinstance(event, wire.LeaseChanged):
            self._leased(event.lease)
            if self.on_lease is not None and self.lease is not None:
                self.on_lease(self.lease)
        sink = self._sink
        if event is None:
            self._sink = None
        if sink is not None:
            sink(event)

    def _drop_turn(self) -> None:
        """Of a turn that will not end any more the log has nothing."""
        if self._base is not None and not self._whole:
            self.mirror.back_to(self._base)
            self._base = None

    def after(self, call: Callable[[], None]) -> None:
        """In a sink: runs `call`, which must not raise, once everything that came together was heard."""
        if self._link is not None:
            self._link.after(call)
        else:
            call()

    # ---- at rest --------------------------------------------------------------------------------------------------
    async def append(self, write: Callable[[], Awaitable[None]]) -> None:
        """`write` appends to the mirror; the engine follows. Nothing is appended when this raises."""

        async def appended(link: Connection) -> Checkpoint:
            point = self.mirror.checkpoint()
            try:
                await write()
                ids = pack_ids(self.mirror.ids[point.tokens :])
                _ = await self._call(link, lambda request: wire.Append(request=request, branch=self._number, ids=ids))
            except BaseException:
                self.mirror.back_to(point)
                raise
            return point

        async def once() -> None:
            link = await self.attach()
            _ = await run_to_completion(lambda: appended(link), undo=self.rewind)

        await self._again(once)

    async def rewind(self, point: Checkpoint) -> None:
        """Engine and mirror go back to `point`; they have when this was cancelled."""
        _ = await self.command(
            lambda request, branch: wire.Rewind(request=request, branch=branch, tokens=point.tokens),
            lambda _: self.mirror.back_to(point),
        )

    async def revise(self, point: Checkpoint, write: Callable[[], None]) -> None:
        """Engine and mirror go back to `point` and on with what `write` appends, in one step: they have when this was
        cancelled."""

        async def revised(link: Connection) -> None:
            def written(_: wire.Reply) -> None:
                self.mirror.back_to(point)
                write()

            _ = await self._call(
                link, lambda request: wire.Rewind(request=request, branch=self._number, tokens=point.tokens), written
            )
            ids = pack_ids(self.mirror.ids[point.tokens :])
            if ids:
                _ = await self._call(link, lambda request: wire.Append(request=request, branch=self._number, ids=ids))

        async def once() -> None:
            link = await self.attach()
            await run_to_completion(lambda: revised(link))

        await self._again(once)

    async def restart(self, mirror: TokenLog) -> None:
        """Goes on over another log: a branch is opened with its ids, which shares what the engine has of them, and then
        the one before ends. Nothing has changed when this raises."""

        async def restarted(link: Connection) -> None:
            before, number = self.mirror, self._number
            self.mirror = mirror
            try:
                await self._open(link, None)
            except BaseException:
                self.mirror = before
                raise
            self._born = self.lease = None
            link.unlisten(number)
            try:
                _ = await self._call(link, lambda request: wire.Close(request=request, branch=number))
            except errors.AgentspeedError as error:
                _LOG.info("closing a branch: %s", error)

        async def once() -> None:
            link = await self.attach()
            await run_to_completion(lambda: restarted(link))

        await self._again(once)

    async def fork(self, n: int, at: Checkpoint | None) -> list[Branch]:
        """Children of what is committed when the engine forks, which a running turn goes on beyond."""

        def forked(reply: wire.Reply) -> None:
            if isinstance(reply, wire.Forked) and self._link is not None:
                for number in reply.branches:
                    child = Branch(self.engine, self.opening.of_child(number), self.mirror.copy(reply.known, at))
                    child._settle(self._link, number)
                    child._opened = 1
                    child._born = (self._link, self._number)
                    child.residence = self.residence
                    born.append(child)

        tokens = None if at is None else at.tokens

        async def bear(link: Connection) -> list[Branch]:
            born.clear()
            _ = await self._call(
                link, lambda request: wire.Fork(request=request, branch=self._number, n=n, at=tokens), forked
            )
            return born

        async def undo(children: list[Branch]) -> None:
            for child in children:
                await child.close()

        async def once() -> list[Branch]:
            link = await self.attach()
            return await run_to_completion(lambda: bear(link), undo)

        born: list[Branch] = []
        return await self._again(once)

    async def adopt(self, child: Branch) -> None:
        """This branch takes the child's log; the child ends. To be awaited inside of `run_to_completion`."""
        await self._again(lambda: self._adopt(child))
        self.mirror = child.mirror
        self.residence = child.residence

    async def _adopt(self, child: Branch) -> None:
        link = await self.attach()
        _ = await child.attach()
        ended = child._number
        if child._born == (link, self._number):
            _ = await self._call(link, lambda request: wire.Adopt(request=request, branch=self._number, child=ended))
            link.unlisten(ended)
        else:  # a child of an adopted child, or an engine that was started anew: it does not know the kinship
            await self._leave()
            self._settle(link, ended)
            self._born = None  # to the engine this is the child's branch, and no child of whose this one was
        child._link = None

    async def expect(self, seconds: float | None, keep: wire.Keep, tool: str) -> Lease:
        def answered(reply: wire.Reply) -> None:
            if isinstance(reply, wire.LeaseAnswer):
                self._leased(reply.lease)

        reply = await self.command(
            lambda request, branch: wire.Expect(request=request, branch=branch, seconds=seconds, keep=keep, tool=tool),
            answered,
        )
        if not isinstance(reply, wire.LeaseAnswer):
            raise errors.InternalError(f"The engine answered Expect with {type(reply).__name__}.")
        return lease_of(reply.lease)

    def _leased(self, lease: wire.Lease) -> None:
        self.lease = lease_of(lease)
        self.residence = self.lease.residence

    async def inspect(self) -> Inspection:
        reply = await self.command(lambda request, branch: wire.Inspect(request=request, branch=branch))
        if not isinstance(reply, wire.Inspected):
            raise errors.InternalError(f"The engine answered Inspect with {type(reply).__name__}.")
        seen = inspection_of(reply)
        self.residence = seen.residence
        return seen

    async def waits_for(self) -> str:
        """What a turn that was not admitted yet waits for; empty when it was, or the engine does not say soon."""
        link = self._link
        if link is not None:
            with contextlib.suppress(errors.AgentspeedError), anyio.move_on_after(_SOON_SECONDS):
                seen = await link.call(lambda request: wire.Inspect(request=request, branch=self._number))
                if isinstance(seen, wire.Inspected) and seen.state in ("Queued", "Promoting"):
                    return seen.waiting_for
        return ""

    async def close(self) -> None:
        """Silent about an engine that is gone: it holds nothing any more. One that is busy for longer than
        `close_timeout` closes the branch once it can. A turn that still runs ends: its sink hears None, and the log is
        as before it."""
        self._closed = True
        await run_to_completion(self._leave)

    async def _leave(self) -> None:
        link, self._link = self._link, None
        if link is not None and link.alive:
            link.unlisten(self._number)
            try:
                with anyio.move_on_after(self.opening.close_timeout):
                    _ = await link.call(lambda request: wire.Close(request=request, branch=self._number))
            except errors.AgentspeedError as error:
                _LOG.info("closing a branch: %s", error)
        sink, self._sink = self._sink, None
        if sink is not None:  # the engine's events no longer come, so the turn that waits for them is told here
            self._drop_turn()
            sink(None)

    # ---- turns ----------------------------------------------------------------------------------------------------
    async def begin(
        self, plan: Callable[[], Awaitable[wire.Generate]], sink: Sink, timeout: float | None = None
    ) -> None:
        """Queues a turn whose events go to `sink`. `plan` appends to the mirror and gives the command; its request,
        branch and ids are filled in here. `timeout`: the turn's; an engine that is silent is not waited for much
        longer. Nothing has changed when this raises."""
        patience = None if timeout is None else max(timeout, _SILENT_SECONDS)

        async def queue(link: Connection) -> None:
            self._base, self._whole = (point := self.mirror.checkpoint()), False
            try:
                turn = await plan()
                ids = pack_ids(self.mirror.ids[point.tokens :])
                _ = await self._call(
                    link,
                    lambda request: replace(turn, request=request, branch=self._number, ids=ids),
                    queued,
                    patience,
                )
            except BaseException as error:
                self._base = self._sink = None
                self.mirror.back_to(point)
                if isinstance(error, errors.EngineDied):
                    self._leave_behind(link)
                raise

        async def once() -> None:
            link = await self.attach(patience)
            await run_to_completion(lambda: queue(link), undo=lambda _: self.stop(keep=False))

        def queued(_: wire.Reply) -> None:
            self._sink = sink  # only now: the end of an engine that never queued the turn is not the turn's end

        await self._again(once)
        self.lease = None

    async def prefill(self, spent: Callable[[wire.TurnUsage], None]) -> None:
        """Computes the rows of what was appended, while nobody waits. `spent` hears what it cost, also when it is
        cancelled; not when the engine went meanwhile."""
        done = anyio.Event()

        def sink(event: wire.Event | None) -> None:
            if isinstance(event, wire.TurnEnded):
                spent(event.usage)
            if event is None or isinstance(event, wire.TurnEnded):
                done.set()

        async def plan() -> wire.Generate:
            return wire.Generate(request=0, branch=0, max_tokens=0)

        await self.begin(plan, sink)
        try:
            await done.wait()
        except BaseException:
            _ = await self.stop(keep=True)
            raise
        if self.attached:
            self.ended()
        else:
            self._base = self._sink = None

    def ended(self) -> None:
        """The turn's last event was read: what it drew is committed."""
        self._base = self._sink = None
        known = len(self.mirror)
        self.mirror.computed = max(0, known - 1)
        kept = self.mirror.computed if self.attached else 0
        self.residence = Residence(device=kept, host=0, lost=known - kept)

    async def stop(self, *, keep: bool) -> bool:
        """Ends a running turn. True when what it drew stayed, as `keep` asked; else the log is as before it. It has
        ended when this was cancelled."""
        return await run_to_completion(lambda: self._stop(keep))

    async def _stop(self, keep: bool) -> bool:
        link, base = self._link, self._base
        if link is not None and base is not None:
            cut = None if keep else base.tokens
            try:
                _ = await self._call(
                    link,
                    lambda request: wire.Cancel(request=request, branch=self._number, cut=cut),
                    None if keep else lambda _: self.mirror.back_to(base),
                    _SILENT_SECONDS,
                )
            except errors.AgentspeedError as error:
                if isinstance(error, errors.InternalError):
                    raise
                _LOG.info("cancelling a turn: %s", error)
                self._leave_behind(link)
        kept = keep and self._base is not None and self.attached
        if not kept and self._base is not None:
            self.mirror.back_to(self._base)
        self._base = self._sink = None
        if link is not None and base is not None and self.attached:
            await self._look(link)
        return kept

    def _leave_behind(self, link: Connection) -> None:
        """Nobody knows whether the engine still runs the turn: it ends the branch when it can, and the next use opens
        another with the ids of here."""
        link.unlisten(self._number)
        link.post(lambda request: wire.Close(request=request, branch=self._number))
        self._link = self._born = None

    async def _look(self, link: Connection) -> None:
        """A turn that was stopped may have computed anything between nothing and all of its rows."""
        try:
            seen = await self._call(link, lambda request: wire.Inspect(request=request, branch=self._number))
        except errors.AgentspeedError as error:
            if isinstance(error, errors.InternalError):
                raise
            _LOG.info("looking at a stopped turn's branch: %s", error)
        else:
            if isinstance(seen, wire.Inspected):
                self.residence = residence_of(seen.residence)
                self.mirror.computed = max(self.mirror.computed, seen.known - seen.residence.lost)

"""Sessions that outlive a server: saved to its folder when it ends, and opened again when somebody asks for one."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar, final

import anyio
import anyio.to_thread
import msgspec

from agentspeed import errors, snapshot
from agentspeed._base.completion import run_to_completion
from agentspeed.engine import Engine
from agentspeed.history import Conversation, History
from agentspeed.message_formats.tools import declared
from agentspeed.server.snapshot_files import BrokenSnapshot, Claim, Kind, Saved, SnapshotFiles
from agentspeed.session import Session

_LOG = logging.getLogger("agentspeed.server")
T = TypeVar("T")


def session_of(data: bytes, engine: Engine, tenant: str) -> Session:
    """A session that was not entered yet; its tools are the ones it had, which its client runs. Raises
    `InvalidRequest`."""
    tools = declared(snapshot.load(data).definitions)
    return Session.restore(data, engine, tenant=tenant or None, tools=tools)


@final
class SavedSessions:
    """Those of one folder, on one engine. A snapshot that cannot be restored is named in the log and left there."""

    def __init__(self, files: SnapshotFiles, engine: Engine) -> None:
        self._files = files
        self._engine = engine
        self._refused: set[str] = set()

    async def save(self, kind: Kind, saved: Saved) -> None:
        """What cannot be written is named in the log; the others are saved all the same."""
        try:
            await anyio.to_thread.run_sync(self._files.save, kind, saved)
        except OSError as error:
            _LOG.warning("%r of %s is lost, it cannot be written: %s", saved.name, kind, error)

    async def save_session(self, session: Session, tenant: str, last_event: int) -> None:
        """A session of `/v1/sessions`, between two turns. Private ones leave nothing behind."""
        if session.private:
            return
        try:
            data = await session.snapshot()
        except errors.AgentspeedError as error:
            _LOG.warning("session %r is lost, it gave no snapshot: %s", session.id, error)
            return
        await self.save("sessions", Saved(tenant=tenant, name=session.id, data=data, last_event=last_event))

    async def save_history(self, history: History) -> None:
        """The conversations that wait to go on, each under the state that it is in."""
        try:
            async for kept in history.kept(lambda hint: True, {}):
                await self.save("history", Saved(tenant=kept.tenant, name=kept.state, data=kept.data))
        except errors.AgentspeedError as error:
            _LOG.warning("conversations are lost, they gave no snapshot: %s", error)

    async def has(self, tenant: str, number: str) -> bool:
        """Whether a session of `/v1/sessions` of this id is saved."""
        return await anyio.to_thread.run_sync(self._files.has, "sessions", tenant, number)

    async def remove(self, tenant: str, number: str) -> bool:
        """Forgets a session of `/v1/sessions` that is saved, whole or broken; whether it was. Raises `OSError`."""
        return await anyio.to_thread.run_sync(self._files.remove, "sessions", tenant, number)

    @asynccontextmanager
    async def restoring(
        self, kind: Kind, tenant: str, names: Sequence[str]
    ) -> AsyncIterator[tuple[Saved, Session] | None]:
        """The first of `names` that is saved, claimed and not entered yet; None without one. When the block ends well
        its file is gone; otherwise it is there again. Raises `BrokenSnapshot` for a file that cannot be read, also when
        the block raises `InvalidRequest`: a snapshot of another model does."""
        claim = await self._claim(kind, tenant, names)
        if claim is None:
            yield None
            return
        try:
            yield claim.saved, session_of(claim.saved.data, self._engine, tenant)
        except errors.InvalidRequest as error:
            await _shielded(claim, restored=False)
            place, name = claim.home.relative_to(self._files.folder), claim.saved.name
            raise BrokenSnapshot(f"{place} cannot be restored: {error}", name) from error
        except BaseException:
            await _shielded(claim, restored=False)
            raise
        await _shielded(claim, restored=True)

    async def _claim(self, kind: Kind, tenant: str, names: Sequence[str]) -> Claim | None:
        """Nobody is left with a file claimed who was cancelled meanwhile, by `Task.cancel` too."""

        async def undo(claim: Claim | None) -> None:
            if claim is not None:
                await anyio.to_thread.run_sync(claim.give_back)

        return await run_to_completion(lambda: anyio.to_thread.run_sync(self._files.claim, kind, tenant, names), undo)

    async def taken(self, kind: Kind, tenant: str, name: str, of: type[T]) -> T | None:
        """A value that was saved as JSON; this server has it from now on. None when it is not there, or cannot be
        read, which the log tells."""
        try:
            claim = await self._claim(kind, tenant, [name])
            if claim is None:
                return None
            try:
                found = msgspec.json.decode(claim.saved.data, type=of)
            except msgspec.DecodeError as error:
                await _shielded(claim, restored=False)
                place = claim.home.relative_to(self._files.folder)
                raise BrokenSnapshot(f"{place} is damaged: {error}", name) from error
            await _shielded(claim, restored=True)
            return found
        except (BrokenSnapshot, OSError) as error:
            _LOG.warning("%r of %s cannot be taken: %s", name, kind, error)
            return None

    async def recall(self, history: History, conversation: Conversation, states: Sequence[str]) -> None:
        """Puts the saved session of the longest of these states that can be restored into the pool; see `History`.
        Without one the conversation is computed anew."""
        while True:
            wanted = [state for state in states if state not in self._refused]
            try:
                async with self.restoring("history", conversation.tenant, wanted) as found:
                    if found is not None:
                        await history.put(found[1], conversation)
                return
            except BrokenSnapshot as error:
                self._refused.add(error.name)
                _LOG.warning("a state of a conversation is not restored: %s", error)
            except OSError as error:
                _LOG.warning("a conversation is computed anew, the folder of snapshots cannot be read: %s", error)
                return


async def _shielded(claim: Claim, *, restored: bool) -> None:
    await run_to_completion(lambda: anyio.to_thread.run_sync(claim.drop if restored else claim.give_back))

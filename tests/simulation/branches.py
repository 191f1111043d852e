"""The open branches as their fronts know them, held against everything that the engine says and plans about them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import final

from agentspeed_engine.ids import BranchId, LinkId
from agentspeed_engine.protocol import messages as wire
from agentspeed_engine.protocol.token_ids import unpack_ids
from agentspeed_engine.sched.plan import Row
from tests.simulation.checkers import Checkers, Sight, Violation
from tests.simulation.front import Handle
from tests.simulation.workload import VOCABULARY


@final
class Branches:
    """The handle of each branch that is open in the engine. Whatever contradicts one raises `Violation`."""

    def __init__(self, checkers: Checkers) -> None:
        self._checkers = checkers
        self._handles: dict[BranchId, Handle] = {}

    def __iter__(self) -> Iterator[Handle]:
        return iter(self._handles.values())

    def forget(self) -> None:
        """The engine died: none is open any more."""
        for handle in self._handles.values():
            handle.number, handle.running = None, False
        self._handles.clear()

    def drop(self, link: LinkId) -> None:
        """The link is gone, and with it its branches."""
        for branch, handle in list(self._handles.items()):
            if handle.link == link:
                handle.number, handle.running = None, False
                del self._handles[branch]

    def rows_of(self, row: Row) -> list[int] | None:
        """What a branch must find and make on the device; None when no device is looked at."""
        if self._checkers.sight is Sight.USER:
            return None
        mirror = self._handles[row.branch].mirror
        if row.token_of is not None:
            if len(mirror.ids) != row.position:
                raise Violation(f"wrong ids: branch {row.branch} is fed a token as unknown that its front has heard")
            return mirror.ahead(VOCABULARY)
        if list(row.ids) != mirror.ids[row.position : row.end]:
            raise Violation(f"wrong ids: branch {row.branch} is fed ids that its front does not know")
        return mirror.rows[: row.end]

    def drawn(self, message: wire.Tokens) -> None:
        """Tokens of a turn; an undisturbed model draws the same."""
        mirror = self._handles[BranchId(message.branch)].mirror
        for token in unpack_ids(message.ids):
            if token != mirror.following(VOCABULARY):
                raise Violation(
                    f"wrong token: branch {message.branch} was given {token} at {len(mirror.ids)}, "
                    "which an undisturbed model does not draw there"
                )
            mirror.extend((token,))

    def turn_ended(self, message: wire.TurnEnded) -> Handle:
        """The branch whose turn it was."""
        handle = self._handles[BranchId(message.branch)]
        handle.mirror.cut(message.known)
        if not handle.running:
            raise Violation(f"a turn of branch {message.branch} ended twice")
        handle.running, handle.ended = False, message
        return handle

    def take_effect(self, handle: Handle, command: wire.Command, reply: wire.Outgoing, now: float) -> None:
        """What the reply to a command, heard at `now`, means for the front's mirror."""
        match command, reply:
            case _, wire.Failed():
                pass
            case wire.Open(), wire.Opened(branch=branch):
                handle.number = BranchId(branch)
                self._handles[handle.number] = handle
            case wire.Generate(ids=ids), wire.Done(known=known):
                handle.before, handle.ended, handle.running = handle.known, None, True
                handle.started_at = now
                handle.mirror.extend(unpack_ids(ids))
                _same_length(handle, known)
            case wire.Rewind() | wire.Cancel(), wire.Done(known=known):
                handle.mirror.cut(known)
                _same_length(handle, known)
            case wire.Fork(), wire.Forked(branches=branches, known=known):
                handle.born = [
                    Handle(handle.link, handle.mirror.copy(known), BranchId(number), handle.private, handle.tenant)
                    for number in branches
                ]
                self._handles.update((child.number, child) for child in handle.born if child.number is not None)
            case wire.Adopt(child=number), wire.Done(known=known):
                child = self._handles.pop(BranchId(number))
                handle.mirror, child.number = child.mirror, None
                _same_length(handle, known)
            case wire.Close(branch=number), wire.Done():
                _ = self._handles.pop(BranchId(number), None)
                handle.number = None
            case wire.Expect(branch=number), wire.LeaseAnswer(lease=lease):
                self._checkers.leased(number, lease)
            case _:
                raise Violation(f"{type(command).__name__} was answered by {type(reply).__name__}")


def _same_length(handle: Handle, known: int) -> None:
    if handle.known != known:
        raise Violation(f"branch {handle.number} knows {known} ids, its front {handle.known}")

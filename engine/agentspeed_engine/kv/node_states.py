"""Where the rows of a node are: one final class per state, and the class body is its row of the table.

A state owns device pages, host slots, or both while a copy between them is in flight. A verb is called on it and
returns the successor, which owns what it owned (`linear.Linear`), and what is free again. Which verbs are legal is
static: a step may read rows in `Device`, `Saving` and `Both`, and only what no copy is writing can be dropped. The
callers are `Tree`, which files the successor (`Tree.change`), and `KvCache`, which gives pages and slots back to their
pools.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias, final

from agentspeed_engine.ids import PageId, SlotId, TicketId
from agentspeed_engine.kv.linear import HELD, Linear

Pages: TypeAlias = tuple[PageId, ...]
Slots: TypeAlias = tuple[SlotId, ...]


@final
class Gone:
    """What a dropped node gives back."""

    __slots__ = ("pages", "slots")

    def __init__(self, pages: Pages, slots: Slots) -> None:
        self.pages = pages
        self.slots = slots


class _OnDevice(Linear[Pages]):
    """Owns device pages."""

    __slots__ = ()

    if TYPE_CHECKING:

        @property
        def pages(self) -> Pages: ...

    else:
        pages = HELD


class _InCopy(_OnDevice):
    """Owns device pages and host slots, between which a ticket copies."""

    __slots__ = ("slots", "ticket")

    def __init__(self, pages: Pages, slots: Slots, ticket: TicketId) -> None:
        super().__init__(pages)
        self.slots = slots
        self.ticket = ticket


@final
class Device(_OnDevice):
    """Rows on the device only."""

    __slots__ = ()

    def save(self, slots: Slots, ticket: TicketId) -> Saving:
        return Saving(self._take(), slots, ticket)

    def drop(self) -> Gone:
        return Gone(self._take(), ())

    def split(self, upper_pages: int) -> tuple[Device, Device]:
        """The first `upper_pages` pages and the rest. Not a transition: rows stay where they are."""
        pages = self._take()
        return Device(pages[:upper_pages]), Device(pages[upper_pages:])

    def shrink(self, pages: int) -> tuple[Device, Pages]:
        """Without its last `pages` pages, which are free again. Not a transition: the rest stays where it is."""
        kept = self._take()
        return Device(kept[:-pages]), kept[-pages:]

    def joined(self, below: Device) -> Device:
        """The inverse of `split`."""
        return Device(self._take() + below._take())


@final
class Saving(_InCopy):
    """A copy to the host is in flight; the device rows stay readable."""

    __slots__ = ()

    def acked(self) -> Both:
        return Both(self._take(), self.slots)

    def failed(self) -> tuple[Device, Slots]:
        """Back to the device copy alone, and the slots that are free again."""
        return Device(self._take()), self.slots

    def split(self, upper_pages: int) -> tuple[Saving, Saving]:
        """Both halves wait for the same ticket. Not a transition."""
        pages = self._take()
        return (
            Saving(pages[:upper_pages], self.slots[:upper_pages], self.ticket),
            Saving(pages[upper_pages:], self.slots[upper_pages:], self.ticket),
        )


@final
class Both(_OnDevice):
    """Rows on device and host alike: either copy may go for free."""

    __slots__ = ("slots",)

    def __init__(self, pages: Pages, slots: Slots) -> None:
        super().__init__(pages)
        self.slots = slots

    def evict(self) -> tuple[Host, Pages]:
        """The host copy alone, and the pages that are free again, at once."""
        return Host(self.slots), self._take()

    def forget(self) -> tuple[Device, Slots]:
        """The device copy alone, and the slots that are free again."""
        return Device(self._take()), self.slots

    def drop(self) -> Gone:
        return Gone(self._take(), self.slots)

    def split(self, upper_pages: int) -> tuple[Both, Both]:
        """The first `upper_pages` pages and the rest. Not a transition."""
        pages = self._take()
        return (
            Both(pages[:upper_pages], self.slots[:upper_pages]),
            Both(pages[upper_pages:], self.slots[upper_pages:]),
        )

    def joined(self, below: Both) -> Both:
        """The inverse of `split`."""
        return Both(self._take() + below._take(), self.slots + below.slots)


@final
class Host(Linear[Slots]):
    """Rows on the host only: no step may read them."""

    __slots__ = ()

    if TYPE_CHECKING:

        @property
        def slots(self) -> Slots: ...

    else:
        slots = HELD

    def load(self, pages: Pages, ticket: TicketId) -> Loading:
        return Loading(pages, self._take(), ticket)

    def drop(self) -> Gone:
        return Gone((), self._take())

    def split(self, upper_pages: int) -> tuple[Host, Host]:
        """The first `upper_pages` slots and the rest. Not a transition."""
        slots = self._take()
        return Host(slots[:upper_pages]), Host(slots[upper_pages:])


@final
class Loading(_InCopy):
    """A copy to the device is in flight; no step may read it yet."""

    __slots__ = ()

    def acked(self) -> Both:
        return Both(self._take(), self.slots)

    def failed(self) -> tuple[Host, Pages]:
        """Back to the host copy alone, and the pages that are free again."""
        return Host(self.slots), self._take()

    def split(self, upper_pages: int) -> tuple[Loading, Loading]:
        """Both halves wait for the same ticket. Not a transition."""
        pages = self._take()
        return (
            Loading(pages[:upper_pages], self.slots[:upper_pages], self.ticket),
            Loading(pages[upper_pages:], self.slots[upper_pages:], self.ticket),
        )


NodeState: TypeAlias = Device | Saving | Both | Host | Loading
"""What a node's rows are; a node exists exactly while it has one."""

"""Where the rows of a node are: one final class per state, and the class body is its row of the table.

A verb consumes the object it is called on: what it owned moves into the successor, and the old object refuses every
further use. Legality is static (an illegal verb is not an attribute); second use is refused at run time.
"""

from __future__ import annotations

from typing import NoReturn, TypeAlias, final

from agentspeed_engine.errors import BrokenInvariant
from agentspeed_engine.ids import PageId, SlotId, TicketId

Pages: TypeAlias = tuple[PageId, ...]
Slots: TypeAlias = tuple[SlotId, ...]


class UseAfterMove(BrokenInvariant):
    """A state object was used after a verb had consumed it."""


def refuse_copy(self: object, *_: object) -> NoReturn:
    """`__copy__`, `__deepcopy__` and `__reduce__` of everything that owns pages."""
    raise BrokenInvariant(f"{type(self).__name__} owns pages and cannot be copied")


@final
class Gone:
    """What a dropped node gives back."""

    __slots__ = ("pages", "slots")

    def __init__(self, pages: Pages, slots: Slots) -> None:
        self.pages = pages
        self.slots = slots


@final
class Device:
    """Rows on the device only."""

    __slots__ = ("_pages",)
    __copy__ = __deepcopy__ = __reduce__ = refuse_copy

    def __init__(self, pages: Pages) -> None:
        self._pages: Pages | None = pages

    @property
    def pages(self) -> Pages:
        if self._pages is None:
            raise UseAfterMove("Device")
        return self._pages

    def save(self, slots: Slots, ticket: TicketId) -> Saving:
        pages, self._pages = self.pages, None
        return Saving(pages, slots, ticket)

    def drop(self) -> Gone:
        pages, self._pages = self.pages, None
        return Gone(pages, ())

    def split(self, upper_pages: int) -> tuple[Device, Device]:
        """The first `upper_pages` pages and the rest. Not a transition: rows stay where they are."""
        pages, self._pages = self.pages, None
        return Device(pages[:upper_pages]), Device(pages[upper_pages:])

    def shrink(self, pages: int) -> tuple[Device, Pages]:
        """Without its last `pages` pages, which are free again. Not a transition: the rest stays where it is."""
        kept, self._pages = self.pages, None
        return Device(kept[:-pages]), kept[-pages:]

    def joined(self, below: Device) -> Device:
        """The inverse of `split`."""
        pages, self._pages = self.pages, None
        lower, below._pages = below.pages, None
        return Device(pages + lower)


@final
class Saving:
    """A copy to the host is in flight; the device rows stay readable."""

    __slots__ = ("_pages", "slots", "ticket")
    __copy__ = __deepcopy__ = __reduce__ = refuse_copy

    def __init__(self, pages: Pages, slots: Slots, ticket: TicketId) -> None:
        self._pages: Pages | None = pages
        self.slots = slots
        self.ticket = ticket

    @property
    def pages(self) -> Pages:
        if self._pages is None:
            raise UseAfterMove("Saving")
        return self._pages

    def acked(self) -> Both:
        pages, self._pages = self.pages, None
        return Both(pages, self.slots)

    def failed(self) -> tuple[Device, Slots]:
        """Back to the device copy alone, and the slots that are free again."""
        pages, self._pages = self.pages, None
        return Device(pages), self.slots

    def split(self, upper_pages: int) -> tuple[Saving, Saving]:
        """Both halves wait for the same ticket. Not a transition."""
        pages, self._pages = self.pages, None
        return (
            Saving(pages[:upper_pages], self.slots[:upper_pages], self.ticket),
            Saving(pages[upper_pages:], self.slots[upper_pages:], self.ticket),
        )


@final
class Both:
    """Rows on device and host alike: either copy may go for free."""

    __slots__ = ("_pages", "slots")
    __copy__ = __deepcopy__ = __reduce__ = refuse_copy

    def __init__(self, pages: Pages, slots: Slots) -> None:
        self._pages: Pages | None = pages
        self.slots = slots

    @property
    def pages(self) -> Pages:
        if self._pages is None:
            raise UseAfterMove("Both")
        return self._pages

    def evict(self) -> tuple[Host, Pages]:
        """The host copy alone, and the pages that are free again, at once."""
        pages, self._pages = self.pages, None
        return Host(self.slots), pages

    def forget(self) -> tuple[Device, Slots]:
        """The device copy alone, and the slots that are free again."""
        pages, self._pages = self.pages, None
        return Device(pages), self.slots

    def drop(self) -> Gone:
        pages, self._pages = self.pages, None
        return Gone(pages, self.slots)

    def split(self, upper_pages: int) -> tuple[Both, Both]:
        """The first `upper_pages` pages and the rest. Not a transition."""
        pages, self._pages = self.pages, None
        return (
            Both(pages[:upper_pages], self.slots[:upper_pages]),
            Both(pages[upper_pages:], self.slots[upper_pages:]),
        )

    def joined(self, below: Both) -> Both:
        """The inverse of `split`."""
        pages, self._pages = self.pages, None
        lower, below._pages = below.pages, None
        return Both(pages + lower, self.slots + below.slots)


@final
class Host:
    """Rows on the host only: no step may read them."""

    __slots__ = ("_slots",)
    __copy__ = __deepcopy__ = __reduce__ = refuse_copy

    def __init__(self, slots: Slots) -> None:
        self._slots: Slots | None = slots

    @property
    def slots(self) -> Slots:
        if self._slots is None:
            raise UseAfterMove("Host")
        return self._slots

    def load(self, pages: Pages, ticket: TicketId) -> Loading:
        slots, self._slots = self.slots, None
        return Loading(pages, slots, ticket)

    def drop(self) -> Gone:
        slots, self._slots = self.slots, None
        return Gone((), slots)

    def split(self, upper_pages: int) -> tuple[Host, Host]:
        """The first `upper_pages` slots and the rest. Not a transition."""
        slots, self._slots = self.slots, None
        return Host(slots[:upper_pages]), Host(slots[upper_pages:])


@final
class Loading:
    """A copy to the device is in flight; no step may read it yet."""

    __slots__ = ("_pages", "slots", "ticket")
    __copy__ = __deepcopy__ = __reduce__ = refuse_copy

    def __init__(self, pages: Pages, slots: Slots, ticket: TicketId) -> None:
        self._pages: Pages | None = pages
        self.slots = slots
        self.ticket = ticket

    @property
    def pages(self) -> Pages:
        if self._pages is None:
            raise UseAfterMove("Loading")
        return self._pages

    def acked(self) -> Both:
        pages, self._pages = self.pages, None
        return Both(pages, self.slots)

    def failed(self) -> tuple[Host, Pages]:
        """Back to the host copy alone, and the pages that are free again."""
        pages, self._pages = self.pages, None
        return Host(self.slots), pages

    def split(self, upper_pages: int) -> tuple[Loading, Loading]:
        """Both halves wait for the same ticket. Not a transition."""
        pages, self._pages = self.pages, None
        return (
            Loading(pages[:upper_pages], self.slots[:upper_pages], self.ticket),
            Loading(pages[upper_pages:], self.slots[upper_pages:], self.ticket),
        )


NodeState: TypeAlias = Device | Saving | Both | Host | Loading
"""What a node's rows are; a node exists exactly while it has one."""

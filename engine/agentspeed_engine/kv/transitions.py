"""The two state machines once more, as data: diagrams, the reference and the generated type matrix come from here.

Legality itself is decided by the classes in `branches` and `nodes`; a test holds these tables and those classes against
each other with two type checkers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, final


@final
@dataclass(frozen=True, slots=True)
class Verb:
    """One cell: a verb that is legal in a state."""

    name: str
    to: tuple[str, ...]
    """States the object may be in afterwards. Its own state alone: the verb works in place."""
    arguments: str
    """An argument list for the type matrix, over the names that the matrix declares."""
    returns: str
    """The static type of the call."""
    note: str = ""


_THEN = "Settling | AtRest"

BRANCHES: Final[dict[str, tuple[Verb, ...]]] = {
    "Held": (
        Verb("append", ("Held",), "ids", "Held", "ids at the end; nothing is computed"),
        Verb("enqueue", ("Queued",), "turn", "Queued", "a turn begins, at its age"),
        Verb("fork", ("Held",), "kv, numbers", "tuple[Held, tuple[Held, ...]]", "plus n children, Held"),
        Verb("rewind", ("Held",), "kv, 0", "Held", "the log goes back; nothing is copied"),
        Verb("adopt", ("Held",), "kv, held, now", "tuple[Held, Closed]", "takes a child's log and leaf"),
        Verb("close", ("Closed",), "kv, now", "Closed"),
    ),
    "Queued": (
        Verb("admit", ("Promoting", "Prefilling"), "kv, room", "Promoting | Prefilling", "all or nothing (L2)"),
        Verb("fork", ("Queued",), "kv, numbers", "tuple[Queued, tuple[Held, ...]]", "plus n children, Held"),
        Verb("abort", ("Held",), "", "Held"),
        Verb("close", ("Closed",), "kv, now", "Closed"),
    ),
    "Promoting": (
        Verb("landed", ("Prefilling",), "", "Prefilling", "every node of the path is readable"),
        Verb("lost", ("Queued",), "kv, now", "Queued", "a load failed"),
        Verb("leave", ("Held", "Queued", "Closed"), "kv, then, now", "AtRest", "loads go on, unpinned"),
    ),
    "Prefilling": (
        Verb("issue", ("Prefilling",), "1", "None", "rows go into a step"),
        Verb("commit", ("Prefilling",), "kv, 1", "None", "rows are acknowledged"),
        Verb("seal", ("Prefilling",), "kv, now", "None", "full pages become a segment"),
        Verb("filled", ("Decoding",), "", "Decoding"),
        Verb(
            "leave",
            ("Settling", "Held", "Queued", "Closed"),
            "kv, then, now",
            _THEN,
            "Settling while rows are in flight",
        ),
    ),
    "Decoding": (
        Verb("issue", ("Decoding",), "1", "None"),
        Verb("commit", ("Decoding",), "kv, 1", "None"),
        Verb("seal", ("Decoding",), "kv, now", "None"),
        Verb(
            "leave",
            ("Settling", "Held", "Queued", "Closed"),
            "kv, then, now",
            _THEN,
            "Settling while rows are in flight",
        ),
    ),
    "Settling": (
        Verb("ack", ("Settling", "Held", "Queued", "Closed"), "kv, 1, now", _THEN, "the last one gives the room back"),
        Verb("strengthen", ("Settling",), "then", "Settling", "requeue < hold < close; forks add up"),
    ),
    "Closed": (),
}

NODES: Final[dict[str, tuple[Verb, ...]]] = {
    "Device": (
        Verb("save", ("Saving",), "slots, ticket", "Saving"),
        Verb("drop", ("Gone",), "", "Gone"),
    ),
    "Saving": (
        Verb("acked", ("Both",), "", "Both"),
        Verb("failed", ("Device",), "", "tuple[Device, tuple[SlotId, ...]]"),
    ),
    "Both": (
        Verb("evict", ("Host",), "", "tuple[Host, tuple[PageId, ...]]", "free, at once"),
        Verb("forget", ("Device",), "", "tuple[Device, tuple[SlotId, ...]]"),
        Verb("drop", ("Gone",), "", "Gone"),
    ),
    "Host": (
        Verb("load", ("Loading",), "pages, ticket", "Loading"),
        Verb("drop", ("Gone",), "", "Gone"),
    ),
    "Loading": (
        Verb("acked", ("Both",), "", "Both"),
        Verb("failed", ("Host",), "", "tuple[Host, tuple[PageId, ...]]"),
    ),
}

"""What a recording says of ids and names: everything, or stand-ins that tell only what equals what."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Protocol, final

from agentspeed_engine.protocol.token_ids import unpack_ids

UNUSABLE = b"\xff"
"""Stands for ids that the core refuses: not a whole number of them, or some outside the vocabulary."""

UNUSABLE_NAME = "\0"
"""Stands for a name that the core refuses."""
MAX_NAME = 256
"""Characters of a tenant's, session's or tool's name; there may be many of them, so each has a bound."""


class Veil(Protocol):
    """Two ids at the same position get the same stand-in exactly when they are equal; so do two names. The core never
    compares ids of different positions, so it decides over stand-ins as it did over the ids."""

    @property
    def clear(self) -> bool:
        """Nothing is replaced."""
        ...

    def ids(self, packed: bytes, start: int) -> bytes:
        """Packed ids whose first one is at position `start`."""
        ...

    def drawn(self, ids: Sequence[int], positions: Sequence[int]) -> bytes:
        """One id at each position, packed."""
        ...

    def name(self, text: str) -> str:
        """Of a tenant, a session or a tool; the empty one stays empty."""
        ...


@final
class Clear:
    """Records ids and names as they are."""

    clear = True

    def ids(self, packed: bytes, start: int) -> bytes:
        return packed

    def drawn(self, ids: Sequence[int], positions: Sequence[int]) -> bytes:
        return array("I", ids).tobytes()

    def name(self, text: str) -> str:
        return text


def usable_name(text: str) -> bool:
    """Whether the core takes this for a name. NUL ends a tenant's name where it stands in a key (`kv.tree.RootKey`)."""
    return len(text) <= MAX_NAME and "\0" not in text


def usable(packed: bytes, vocab_size: int) -> bool:
    """Whether the core takes these ids for ids."""
    if len(packed) % 4:
        return False
    ids = unpack_ids(packed)
    return not ids or max(ids) < vocab_size

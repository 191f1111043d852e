"""Responses that can be gone on from, and named conversations: bounded, and each visible to its own tenant alone."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final, Generic, TypeVar, final

from agentspeed.messages import Message

T = TypeVar("T")
MOST_STORED: Final = 4096
"""Older ones are forgotten: a client that comes back then sends its history, and finds its session by that."""


@final
@dataclass(frozen=True, slots=True)
class StoredResponse:
    """What `previous_response_id` needs."""

    body: dict[str, Any]
    messages: tuple[Message, ...]
    """The conversation, this response's message included."""
    system: str | None


@final
@dataclass(slots=True)
class StoredConversation:
    """What `conversation` needs."""

    number: str
    created: int
    metadata: dict[str, Any]
    messages: tuple[Message, ...] = ()
    busy: bool = False


@final
class Store(Generic[T]):
    """The last `most` values that were put in, by tenant and id."""

    def __init__(self, most: int = MOST_STORED) -> None:
        self._most = most
        self._values: OrderedDict[tuple[str, str], T] = OrderedDict()

    def put(self, tenant: str, number: str, value: T) -> None:
        """Kept until `most` others came."""
        self._values[tenant, number] = value
        self._values.move_to_end((tenant, number))
        while len(self._values) > self._most:
            _ = self._values.popitem(last=False)

    def get(self, tenant: str, number: str) -> T | None:
        """None for what is not there, or is another tenant's."""
        return self._values.get((tenant, number))

    def pop(self, tenant: str, number: str) -> T | None:
        """What is not there any more."""
        return self._values.pop((tenant, number), None)

    def newest(self, most: int) -> list[tuple[str, str, T]]:
        """Tenant, id and value of the last `most`, oldest first."""
        first = max(0, len(self._values) - most)
        return [(tenant, number, value) for (tenant, number), value in islice(self._values.items(), first, None)]

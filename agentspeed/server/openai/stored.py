"""Responses that can be gone on from, and named conversations: bounded, and each visible to its own tenant alone."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final, Generic, TypeVar, final

from agentspeed.messages import Message

T = TypeVar("T")
MOST_STORED: Final = 4096
"""Of one tenant. Older ones are forgotten: a client that comes back then sends its history, and finds its session by
that."""


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
    """The last `most` values that were put in of each tenant, by id: no other tenant's push them out."""

    def __init__(self, most: int = MOST_STORED) -> None:
        self._most = most
        self._values: defaultdict[str, OrderedDict[str, T]] = defaultdict(OrderedDict)

    def put(self, tenant: str, number: str, value: T) -> None:
        """Kept until `most` others of the tenant came."""
        values = self._values[tenant]
        values[number] = value
        values.move_to_end(number)
        while len(values) > self._most:
            _ = values.popitem(last=False)

    def get(self, tenant: str, number: str) -> T | None:
        """None for what is not there, or is another tenant's."""
        return self._values[tenant].get(number)

    def pop(self, tenant: str, number: str) -> T | None:
        """What is not there any more."""
        return self._values[tenant].pop(number, None)

    def newest(self, most: int) -> list[tuple[str, str, T]]:
        """Tenant, id and value of the last `most` of each tenant, its oldest first."""
        return [
            (tenant, number, value)
            for tenant, values in self._values.items()
            for number, value in islice(values.items(), max(0, len(values) - most), None)
        ]

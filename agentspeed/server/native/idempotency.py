"""`Idempotency-Key`: a request that is sent again is answered as the first time, and done once."""

from __future__ import annotations

import hashlib
from collections import OrderedDict, defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final, final

import anyio

from agentspeed.server.problems import refused

MOST_KEYS: Final = 4096
"""Of one tenant: no other's requests make a server forget them."""


@final
@dataclass(slots=True)
class _Answer:
    digest: bytes
    done: anyio.Event = field(default_factory=anyio.Event)
    value: Any = None
    failed: bool = False


@final
class Idempotency:
    """The answers to each tenant's last requests that had a key; one that failed may be sent again under its key."""

    def __init__(self) -> None:
        self._answers: defaultdict[str, OrderedDict[str, _Answer]] = defaultdict(OrderedDict)

    async def once(self, tenant: str, key: str | None, request: bytes, do: Callable[[], Awaitable[Any]]) -> Any:
        """What `do` gives, from the first call with this key.

        Raises `RequestProblem` (409) where the same key came with another request."""
        if key is None:
            return await do()
        digest, answers = hashlib.sha256(request).digest(), self._answers[tenant]
        while (known := answers.get(key)) is not None:
            if known.digest != digest:
                raise refused(
                    f"The idempotency key {key!r} was used for another request.",
                    status=409,
                    code="idempotency_key_reused",
                )
            await known.done.wait()
            if not known.failed:
                return known.value
        answer = answers[key] = _Answer(digest)
        while len(answers) > MOST_KEYS:
            _ = answers.popitem(last=False)
        try:
            answer.value = await do()
        except BaseException:
            answer.failed = True
            _ = answers.pop(key, None)
            raise
        finally:
            answer.done.set()
        return answer.value

    def forget(self, tenant: str, key: str, value: object) -> None:
        """`value`, which came of this key, is no answer: the next request under it is done. Another that came since is
        kept."""
        answers = self._answers[tenant]
        if (known := answers.get(key)) is not None and known.done.is_set() and known.value == value:
            del answers[key]

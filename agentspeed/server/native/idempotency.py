"""`Idempotency-Key`: a request that is sent again is answered as the first time, and done once."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final, final

import anyio

from agentspeed.server.problems import refused

MOST_KEYS: Final = 4096


@final
@dataclass(slots=True)
class _Answer:
    digest: bytes
    done: anyio.Event = field(default_factory=anyio.Event)
    value: Any = None
    failed: bool = False


@final
class Idempotency:
    """The answers to the last requests that had a key; a request that failed may be sent again under its key."""

    def __init__(self) -> None:
        self._answers: OrderedDict[tuple[str, str], _Answer] = OrderedDict()

    async def once(self, tenant: str, key: str | None, request: bytes, do: Callable[[], Awaitable[Any]]) -> Any:
        """What `do` gives, from the first call with this key.

        Raises `RequestProblem` (409) where the same key came with another request."""
        if key is None:
            return await do()
        digest = hashlib.sha256(request).digest()
        while (known := self._answers.get((tenant, key))) is not None:
            if known.digest != digest:
                raise refused(
                    f"The idempotency key {key!r} was used for another request.",
                    status=409,
                    code="idempotency_key_reused",
                )
            await known.done.wait()
            if not known.failed:
                return known.value
        answer = self._answers[tenant, key] = _Answer(digest)
        while len(self._answers) > MOST_KEYS:
            _ = self._answers.popitem(last=False)
        try:
            answer.value = await do()
        except BaseException:
            answer.failed = True
            _ = self._answers.pop((tenant, key), None)
            raise
        finally:
            answer.done.set()
        return answer.value

    def forget(self, tenant: str, key: str, value: object) -> None:
        """`value`, which came of this key, is no answer: the next request under it is done. Another that came since is
        kept."""
        if (known := self._answers.get((tenant, key))) is not None and known.done.is_set() and known.value == value:
            del self._answers[tenant, key]

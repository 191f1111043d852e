"""Requests that come again under their key: done once, whoever comes at the same time."""

from __future__ import annotations

import anyio
import pytest

from agentspeed.server.native.idempotency import MOST_KEYS, Idempotency

pytestmark = pytest.mark.anyio


async def test_of_two_that_come_again_at_once_after_a_failure_one_is_done_and_both_are_answered() -> None:
    once = Idempotency()
    begun: list[int] = []
    answers: list[int] = []

    async def begin() -> int:
        begun.append(len(begun))
        return begun[-1]

    failed = await once.once("a", "key", b"body", begin)

    async def again() -> None:
        after = await once.once("a", "key", b"body", begin)
        if after == failed:
            once.forget("a", "key", after)
            after = await once.once("a", "key", b"body", begin)
        answers.append(after)

    async with anyio.create_task_group() as group:
        group.start_soon(again)
        group.start_soon(again)
    assert begun == [0, 1] and answers == [1, 1]


async def test_requests_of_other_tenants_make_nobodys_keys_forgotten() -> None:
    once = Idempotency()
    begun: list[str] = []

    async def begin() -> int:
        begun.append("done")
        return len(begun)

    first = await once.once("a", "key", b"body", begin)
    for number in range(MOST_KEYS + 1):
        _ = await once.once("b", str(number), b"body", begin)
    assert await once.once("a", "key", b"body", begin) == first
    assert await once.once("b", "0", b"body", begin) > MOST_KEYS + 1, "those of one tenant are bounded"

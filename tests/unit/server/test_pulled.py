"""An answer that somebody pulls: in order, in the pieces that there are, and never far ahead of who reads slowly."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from agentspeed import errors
from agentspeed.server.pulled import MOST_AHEAD, pulled

HEAD: dict[str, Any] = {"path": "/", "headers": []}
START: dict[str, Any] = {"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]}


def body(piece: bytes, *, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": piece, "more_body": more}


@pytest.mark.asyncio
async def test_an_answer_comes_whole_and_in_order() -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http" and (await receive())["body"] == b"asked"
        await send(START)
        for number in range(200):
            await send(body(b"%d " % number))
        await send(body(b"end", more=False))

    first, *pieces = [part async for part in pulled(application, HEAD, b"asked")]
    assert first == (200, [(b"a", b"b")])
    assert b"".join(pieces) == b"".join(b"%d " % number for number in range(200)) + b"end"  # type: ignore[arg-type]
    assert len(pieces) < 50, "what is there goes together"


@pytest.mark.asyncio
async def test_an_application_waits_for_who_reads_slowly_and_ends_with_who_leaves() -> None:
    sent, ended = 0, asyncio.Event()

    async def application(scope: Any, receive: Any, send: Any) -> None:
        nonlocal sent
        try:
            await send(START)
            while True:
                await send(body(b"x"))
                sent += 1
        finally:
            ended.set()

    answer = pulled(application, HEAD, b"")
    _ = await anext(answer)
    for read in range(1, 4):
        for _ in range(3 * MOST_AHEAD):
            await asyncio.sleep(0)
        assert sent <= MOST_AHEAD * read
        assert await anext(answer)
    await answer.aclose()
    assert ended.is_set()


@pytest.mark.asyncio
@pytest.mark.parametrize("begun", [True, False])
async def test_what_ends_an_application_too_early_is_raised(begun: bool) -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        if begun:
            await send(START)
            await send(body(b"x"))
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        _ = [part async for part in pulled(application, HEAD, b"")]


@pytest.mark.asyncio
async def test_an_application_without_an_end_is_a_bug() -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send(START)

    with pytest.raises(errors.InternalError):
        _ = [part async for part in pulled(application, HEAD, b"")]

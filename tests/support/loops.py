"""The event loops that the SDK promises to run on, and fewer of them for tests in which the loop decides nothing.

Every `@pytest.mark.anyio` test runs on all three (tests/conftest.py). A module that imports `without_uvloop` or
`on_asyncio` runs on fewer: asyncio's loop and uvloop differ in sockets, timers and signals, which the tests of links,
turns, starts and cancellation meet on all of them.
"""

from __future__ import annotations

from typing import Any

import pytest

LOOPS: dict[str, Any] = {
    "asyncio": ("asyncio", {"use_uvloop": False}),
    "uvloop": ("asyncio", {"use_uvloop": True}),
    "trio": ("trio", {}),
}


@pytest.fixture(name="anyio_backend", params=[LOOPS["asyncio"], LOOPS["trio"]], ids=["asyncio", "trio"])
def without_uvloop(request: pytest.FixtureRequest) -> Any:
    """asyncio and trio, whose cancellation and scopes differ."""
    return request.param


@pytest.fixture(name="anyio_backend", params=[LOOPS["asyncio"]], ids=["asyncio"])
def on_asyncio(request: pytest.FixtureRequest) -> Any:
    """asyncio alone: what is tested happens in other processes or threads."""
    return request.param

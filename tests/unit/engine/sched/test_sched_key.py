"""The key of a core, by which the search takes worlds for one: histories that go on differently must not share it."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import pytest

from agentspeed_engine.protocol import messages as wire
from agentspeed_engine.protocol.token_ids import pack_ids
from tests.modelcheck.explorer import GONE, Bounds, begin, carry_out

PLAN, ACKNOWLEDGE = "plan", "acknowledge"
FORK, CLOSE = wire.Fork(request=1, branch=1, n=1), wire.Close(request=1, branch=1)
CANCEL = wire.Cancel(request=1, branch=1)
OPEN = wire.Open(request=1, ids=pack_ids([1]))


def generate(branch: int, ids: tuple[int, ...] = (), most: int = 1) -> wire.Generate:
    return wire.Generate(request=1, branch=branch, ids=pack_ids(list(ids)), max_tokens=most)


def key_after(bounds: Bounds, *history: Any) -> Hashable:
    core = begin(bounds)
    for action in history:
        carry_out(core, action)
    return core.key()


SETTLING = (OPEN, generate(1), PLAN)
"""Its branch settles with whatever it is told next."""
QUOTA = Bounds(pages=6, page_tokens=1, context_limit=4, tenant_pages=5, branches=3, setup=((1,), (1, 2), (2, 1)))


@pytest.mark.parametrize(
    ("bounds", "one", "other"),
    [
        pytest.param(
            Bounds(),
            (*SETTLING, CANCEL),
            (*SETTLING, wire.Cancel(request=1, branch=1, cut=0)),
            id="how far a turn in flight is cut back",
        ),
        pytest.param(
            Bounds(),
            (*SETTLING, CANCEL, FORK, GONE),
            (*SETTLING, FORK, CLOSE),
            id="whether children still to be born have a client",
        ),
        pytest.param(
            Bounds(branches=3),
            (*SETTLING, FORK, OPEN),
            (OPEN, OPEN, generate(1), PLAN, FORK),
            id="whether a child still to be born comes before or after another branch",
        ),
        pytest.param(
            QUOTA,
            (generate(1, (1, 2), 3), generate(2), PLAN, ACKNOWLEDGE, generate(3)),
            (generate(2), generate(1, (1, 2), 3), PLAN, generate(3), ACKNOWLEDGE),
            id="which rows are older: of equals they go first",
        ),
    ],
)
def test_histories_that_go_on_differently_have_different_keys(bounds: Bounds, one: Any, other: Any) -> None:
    assert key_after(bounds, *one) != key_after(bounds, *other)


def test_histories_that_differ_in_numbers_alone_share_their_key() -> None:
    again = (OPEN, generate(1), PLAN, ACKNOWLEDGE, CLOSE)
    assert key_after(Bounds(), OPEN, OPEN, CLOSE) == key_after(Bounds(), OPEN)
    assert key_after(Bounds(), *again, wire.Open(request=1, ids=b"")) == key_after(
        Bounds(), *again, wire.Open(request=1, ids=b""), wire.Close(request=1, branch=2), wire.Open(request=1, ids=b"")
    )

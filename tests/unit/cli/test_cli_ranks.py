"""How many processes a command is told to use, as the engine's options."""

from __future__ import annotations

from typing import Any

import pytest

from agentspeed.cli.ranks import cut, said


@pytest.mark.parametrize(
    ("told", "options", "shown"),
    [
        ((1, 1, None), {}, ""),
        ((2, 1, None), {"tp": 2}, " on 2 ranks"),
        ((1, 2, None), {"dp": 2}, " on 2 ranks"),
        ((2, 2, 4), {"tp": 2, "dp": 2, "ep": 4}, " on 4 ranks"),
        ((1, 1, 1), {"ep": 1}, ""),
    ],
)
def test_options_are_given_where_they_say_more_than_one_process(
    told: tuple[int, int, int | None], options: dict[str, Any], shown: str
) -> None:
    tp, dp, ep = told
    assert cut(tp, dp, ep) == options
    assert said(tp, dp) == shown

"""What a turn cost, as it is added up and shown."""

from __future__ import annotations

import pytest

from agentspeed import Usage


@pytest.mark.parametrize(
    ("usage", "shown"),
    [
        (Usage(), "Usage()"),
        (Usage(new=16, drawn=3, turns=1), "Usage(new=16, drawn=3, turns=1)"),
        (
            Usage(queue_seconds=0.000197086999946805, decode_seconds=61.0449),
            "Usage(queue_seconds=0.000197, decode_seconds=61)",
        ),
        (Usage(pauses=1, pause_seconds=123456.789), "Usage(pauses=1, pause_seconds=123000)"),
        (Usage(recomputed=5, why="it's gone"), 'Usage(recomputed=5, why="it\'s gone")'),
    ],
)
def test_a_usage_shows_what_is_not_zero_and_seconds_in_short(usage: Usage, shown: str) -> None:
    assert repr(usage) == shown


def test_what_is_shown_is_read_back() -> None:
    usage = Usage(new=3, resumed_host=4, queue_seconds=0.25, why="a copy from the host failed")
    assert eval(repr(usage)) == usage

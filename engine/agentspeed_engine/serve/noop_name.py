"""Names of models that compute nothing: `noop:VOCABULARY:MILLISECONDS`."""

from __future__ import annotations

from typing import Final

from agentspeed_engine.errors import EngineFault

NOOP: Final = "noop:"
_MOST_VOCABULARY = 1 << 24
_MOST_SECONDS = 3600.0


def noop_sizes(name: str) -> tuple[int, float]:
    """(Ids, seconds of a step). Raises `EngineFault` (bad_options)."""
    try:
        vocabulary, milliseconds = name.removeprefix(NOOP).split(":")
        size, step = int(vocabulary), float(milliseconds) / 1000
    except ValueError as error:
        raise EngineFault("bad_options", f"{name!r} is not noop:VOCABULARY:MILLISECONDS.") from error
    if not 1 <= size <= _MOST_VOCABULARY or not 0 <= step <= _MOST_SECONDS:
        raise EngineFault("bad_options", f"{name!r} has an impossible vocabulary or step time.")
    return size, step

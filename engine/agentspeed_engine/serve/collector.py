"""When the garbage collector of an engine process runs: not while modules load, and never over what stays."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def at_rest() -> Iterator[None]:
    """For imports: they make some 100,000 objects that all stay, and each collection meanwhile walks over those that
    are there. That is a sixth of the time that torch takes to load."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def keep_what_is_loaded() -> None:
    """No later collection walks over it in the middle of a step."""
    _ = gc.collect()
    gc.freeze()

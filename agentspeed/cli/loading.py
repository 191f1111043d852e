"""How far a model is read, on standard error: one line, written anew, on a terminal; a line each tenth elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

from agentspeed.usage import Starting


@final
class LoadingLine:
    """What `on_start` is given."""

    def __init__(self, *, quiet: bool = False) -> None:
        """`quiet`: nothing is written where no terminal is."""
        self._tenths = 0
        self._shown = False
        self._quiet = quiet
        self._terminal = sys.stderr.isatty()

    def __call__(self, how: Starting) -> None:
        """In the thread that waits for the engine."""
        if how.part is None:
            return
        text = f"Reading weights: {how.part:.0%}"
        if self._terminal:
            self._shown = True
            print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)
        elif int(10 * how.part) > self._tenths and not self._quiet:
            self._tenths = int(10 * how.part)
            print(text, file=sys.stderr, flush=True)

    def end(self) -> None:
        """The start is over, and its line goes."""
        if self._shown:
            self._shown = False
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


@contextmanager
def loading(*, quiet: bool = False) -> Iterator[LoadingLine]:
    """Shown while the block runs."""
    line = LoadingLine(quiet=quiet)
    try:
        yield line
    finally:
        line.end()

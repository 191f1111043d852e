"""A command in a real terminal: what it shows, what is typed, how it ends."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import final

_LAUNCH = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execvp(sys.argv[1], sys.argv[1:])
"""
"""Takes the terminal as the controlling one: only then a typed Ctrl-C is a signal."""

_ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|[()][A-Z0-9]|[=>])|\x1b\[?[0-9;?]*$")


@final
class Terminal:
    """One process on a pseudo-terminal of its own. Ctrl-C and Ctrl-D are typed characters, as a person types them."""

    CTRL_C, CTRL_D = "\x03", "\x04"

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", _LAUNCH, *command],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            env=dict(environment),
        )
        os.close(theirs)
        self._raw = b""
        self._at = 0

    @property
    def seen(self) -> str:
        """Everything shown so far, without colours and moves of the cursor."""
        return _ESCAPES.sub("", self._raw.decode(errors="replace"))

    def until(self, words: str, seconds: float = 40.0) -> str:
        """Waits until `words` are shown, after what was waited for before; what came up to their end."""
        deadline = time.monotonic() + seconds
        while (found := self.seen.find(words, self._at)) < 0:
            assert self._read(deadline), f"it did not show {words!r}:\n{self.seen}"
        end = found + len(words)
        shown, self._at = self.seen[self._at : end], end
        return shown

    def type(self, text: str) -> None:
        _ = os.write(self._ours, text.encode())

    def resize(self, columns: int, lines: int) -> None:
        """As a person drags the corner of a window; COLUMNS and LINES in the environment would hide it."""
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def end(self, seconds: float = 40.0) -> int:
        """The exit status of a process that ends by itself."""
        deadline = time.monotonic() + seconds
        while self._read(deadline):
            pass
        try:
            return self.process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"it did not end:\n{self.seen}") from error

    def close(self) -> None:
        """Ends what is left of it."""
        if self.process.poll() is None:
            self.process.kill()
            _ = self.process.wait()
        os.close(self._ours)

    def _read(self, deadline: float) -> bool:
        """Some more of what it shows; False once it shows nothing any more."""
        ready, _, _ = select.select([self._ours], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return False
        try:
            data = os.read(self._ours, 1 << 16)
        except OSError:  # Linux says so when nobody has the other side open any more
            return False
        self._raw += data
        return bool(data)


@contextmanager
def terminal(command: Sequence[str], environment: Mapping[str, str]) -> Iterator[Terminal]:
    """A process in a terminal that is gone afterwards, whatever happened."""
    shown = Terminal(command, {**environment, "TERM": "xterm", "COLUMNS": "100", "LINES": "30"})
    try:
        yield shown
    finally:
        shown.close()

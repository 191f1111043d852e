"""Reads what a person types, with a line editor where there is a terminal, and says what Ctrl-C does meanwhile.

For the main thread alone: nowhere else can a read be interrupted. So a caller that reads lines runs its event loop in
another thread, and the editor clears its line at Ctrl-C as its user expects.
"""

from __future__ import annotations

import importlib
import math
import os
import signal
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Final, Self, final

_SOON: Final = 0.05
"""Seconds in which a Ctrl-C is heard, if it is heard by itself."""
_MAIN: Final = threading.main_thread().ident or 0


@final
class Lines:
    """`with Lines() as lines: line = lines.read("> ")`; in the block Ctrl-C does what `during` says, and else raises
    `KeyboardInterrupt`. What was typed is remembered for the arrow keys until the process ends, and nowhere else."""

    def __init__(self) -> None:
        self._editor = _editor()
        self._on_interrupt: Callable[[], None] = _raise
        self._before: Any = signal.SIG_DFL
        self._wakeup_before = -1
        self._heard_at = -math.inf
        self._ringing, self._bell = os.pipe()
        self._watch = threading.Thread(target=self._ring_again, name="agentspeed-interrupts", daemon=True)

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGINT, self._interrupted)
        os.set_blocking(self._bell, False)
        self._wakeup_before = signal.set_wakeup_fd(self._bell, warn_on_full_buffer=False)
        self._watch.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _ = signal.set_wakeup_fd(self._wakeup_before)
        _ = signal.signal(signal.SIGINT, self._before)
        os.close(self._bell)
        self._watch.join()
        os.close(self._ringing)

    @contextmanager
    def during(self, on_interrupt: Callable[[], None]) -> Iterator[None]:
        """In this block Ctrl-C calls this. It must not wait: it comes between any two steps of the main thread."""
        before, self._on_interrupt = self._on_interrupt, on_interrupt
        try:
            yield
        finally:
            self._on_interrupt = before

    def read(self, prompt: str) -> str | None:
        """A line; empty when Ctrl-C dropped it, None at the end of input."""
        try:
            with self.during(_raise):
                return input(prompt)
        except KeyboardInterrupt:
            print()
            return ""
        except EOFError:
            print()
            return None

    @property
    def can_ask(self) -> bool:
        """Whether a person is there to answer a question: what a pipe gives are lines for the model."""
        return sys.stdin.isatty()

    def agreed(self, question: str) -> bool:
        """Whether the person typed y or yes after seeing the question. Raises `KeyboardInterrupt` at Ctrl-C."""
        termios.tcflush(sys.stdin, termios.TCIFLUSH)  # typed before the question was there, so not an answer to it
        if self._editor is not None:
            self._editor.set_auto_history(False)
        try:
            with self.during(_raise):
                return input(question).strip().lower() in ("y", "yes")
        except EOFError:
            print()
            return False
        finally:
            if self._editor is not None:
                self._editor.set_auto_history(True)

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        self._heard_at = time.monotonic()
        self._on_interrupt()

    def _ring_again(self) -> None:
        """A Ctrl-C that comes while the editor looks at a key, and not while it waits for one, would be heard with the
        next key only: the editor waits on. So one that was not heard soon is sent once more."""
        while numbers := os.read(self._ringing, 64):
            rung = time.monotonic()
            time.sleep(_SOON)
            if signal.SIGINT in numbers and self._heard_at < rung - _SOON:
                signal.pthread_kill(_MAIN, signal.SIGINT)


def _raise() -> None:
    raise KeyboardInterrupt


def _editor() -> Any:
    """`readline`, which `input` uses from its import on; None without a terminal, or in a Python that lacks it."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return None
    try:
        return importlib.import_module("readline")
    except ImportError:
        return None

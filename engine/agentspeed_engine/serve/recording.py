"""Writes the recording of a running engine: a folder of segments, bounded, readable after a crash or a kill.

Every round of the loop writes once, before it answers anyone, so a killed process loses nothing that a client has
heard of; what the machine had not yet put on its disk is lost only when the machine itself stops. What cannot be
written ends the recording and never the engine.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from io import FileIO
from pathlib import Path
from typing import Final, final

from agentspeed_engine.errors import BrokenInvariant, EngineFault
from agentspeed_engine.sched.core import Core
from agentspeed_engine.sched.recorder import FLIGHT, SUFFIX, Ended, Header, RecordedCore, frame, opening
from agentspeed_engine.sched.redaction import Clear
from agentspeed_engine.serve import crashes
from agentspeed_engine.serve.stand_ins import Opaque

_LOG: Final = logging.getLogger("agentspeed.engine")
LEAST_BYTES: Final = 64 * 1024
STEPS_PER_DIGEST: Final = 64
_SHARE: Final = 4
"""A segment is a quarter of the bound, so that what is kept is between three quarters of it and all."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class RecordingOrder:
    """What the options ask for."""

    folder: Path
    most_bytes: int
    content: bool
    every: int = STEPS_PER_DIGEST
    crash_only: bool = False
    """A crash recording: it is removed when the engine ends in order, and an engine that cannot write it runs on."""


def begun(core: Core, order: RecordingOrder | None, *, began: float) -> Tape | None:
    """The tape of this order. Raises `EngineFault` (bad_options) when it was asked for and cannot be begun."""
    if order is None:
        return None
    try:
        return Tape(core, order, began=began)
    except EngineFault as fault:
        if not order.crash_only:
            raise
        _say(f"a crash of this engine will leave no recording: {fault.message}")
        return None


@final
class Tape:
    """The recording of one core, from its first input. `core` is to be used in the core's place."""

    def __init__(
        self, core: Core, order: RecordingOrder, *, began: float, say: Callable[[str], None] | None = None
    ) -> None:
        """Raises `EngineFault` (bad_options) when the folder cannot be written."""
        self.core = RecordedCore(core, Clear() if order.content else Opaque(), every=order.every)
        self._order = order
        self._began = began
        self._started = time.time()
        self._say = say if say is not None else _say
        self._kept: list[tuple[Path, int]] = []
        """Finished segments and their sizes, oldest first."""
        self._file: FileIO | None = None
        self._size = self._most = self._number = 0
        stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime(self._started))
        self.path = order.folder / f"{stamp}-{os.getpid()}-{id(self) & 0xFFFF:04x}{FLIGHT}"
        head = self._head(gap=False)
        if 2 * len(head) > order.most_bytes:
            raise EngineFault(
                "bad_options",
                f"record_bytes is {order.most_bytes}; a recording of a pool of "
                f"{core.config.pages} pages needs more than {2 * len(head)}.",
                "Give more.",
            )
        self._held: int | None = None
        try:
            with crashes.room(order.folder) if order.crash_only else nullcontext():
                self.path.mkdir(mode=0o700, parents=True)
                if order.crash_only:
                    self._held = crashes.hold(self.path)
            self._open(head)
        except OSError as error:
            if self._held is not None:
                self._forget()
            raise EngineFault(
                "bad_options",
                f"Cannot record into {order.folder}: {error}.",
                "Give a folder of your own (record), or leave it out.",
            ) from error

    @property
    def size(self) -> int:
        """Bytes on the disk."""
        return self._size + sum(size for _, size in self._kept)

    def flush(self) -> None:
        """Writes what was noted since the last call. To be called between two inputs."""
        records = self.core.taken()
        if not records or self._file is None:
            return
        with self._surviving():
            fitted = self._write(frame(records))
            if not fitted or self._size >= self._most:
                self._begin_segment(gap=not fitted)

    def begin_segment(self) -> None:
        """The state as it is now begins a new one; the oldest go. To be called between two inputs, all written."""
        if self._file is not None:
            with self._surviving():
                self._begin_segment(gap=False)

    def close(self, broke: BaseException | None = None) -> None:
        """The last words. `broke`: what stopped the engine. A later call changes nothing."""
        if self._file is not None:
            self._end(broke)
        if broke is None and self._held is not None:
            self._forget()
        self._let_go()  # what a broken engine leaves is a dead engine's from here on

    def _forget(self) -> None:
        """Only before the lock goes is it certain that nobody else takes it away at the same time."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._let_go()

    def _let_go(self) -> None:
        if self._held is not None:
            os.close(self._held)
        self._held = None

    def _end(self, broke: BaseException | None) -> None:
        records = self.core.taken()
        if broke is None:
            records.append(self.core.checked())
        records.append(Ended("" if broke is None else self._words(broke)))
        with self._surviving():
            _ = self._write(frame(records))
        if self._file is not None:
            self._file.close()
        self._file = None

    @contextmanager
    def _surviving(self) -> Iterator[None]:
        """What cannot be written ends the recording here."""
        try:
            yield
        except OSError as error:
            self._give_up(str(error))

    def _words(self, broke: BaseException) -> str:
        """Our own rules' sentences hold no content; of other errors only the class is known not to."""
        name = type(broke).__name__
        return f"{name}: {broke}" if self._order.content or isinstance(broke, BrokenInvariant) else name

    def _write(self, data: bytes) -> bool:
        """False when it does not fit, whatever is dropped: then it was not written."""
        if self._file is None:
            return False
        self._drop_down_to(self._order.most_bytes - self._size - len(data))
        if self.size + len(data) > self._order.most_bytes:
            return False
        _put(self._file, data)
        self._size += len(data)
        return True

    def _begin_segment(self, *, gap: bool) -> None:
        head = self._head(gap=gap)
        if 2 * len(head) > self._order.most_bytes:
            self._give_up(
                f"the engine's state alone is {len(head)} bytes, more than half of record_bytes "
                f"({self._order.most_bytes}); give more"
            )
        elif self._file is not None:
            self._file.close()
            self._kept.append((self._segment(self._number), self._size))
            self._open(head)

    def _head(self, *, gap: bool) -> bytes:
        return opening(self._header(self._number + 1, gap)) + frame(self.core.state())

    def _open(self, head: bytes) -> None:
        self._number += 1
        self._most = max(self._order.most_bytes // _SHARE, 2 * len(head))
        self._drop_down_to(self._order.most_bytes - self._most)
        self._size = 0
        path = self._segment(self._number)
        # Unbuffered: what a full disk refused must not be tried again when the file is closed.
        self._file = open(path, "xb", buffering=0, opener=_private)  # noqa: SIM115 - closed by `close`
        _put(self._file, head)
        self._size = len(head)

    def _drop_down_to(self, most: int) -> None:
        kept = sum(size for _, size in self._kept)
        while self._kept and kept > most:
            path, size = self._kept.pop(0)
            path.unlink(missing_ok=True)
            kept -= size

    def _give_up(self, why: str) -> None:
        self._say(f"the recording {self.path} ends here, the engine goes on: {why}")
        if self._file is not None:
            self._file.close()
        self._file = None

    def _segment(self, number: int) -> Path:
        return self.path / f"{number:06d}{SUFFIX}"

    def _header(self, number: int, gap: bool) -> Header:
        config = self.core.replayed_config()
        return Header(
            engine=_version(),
            model=config.model,
            pid=os.getpid(),
            started=self._started,
            began=self._began,
            segment=number,
            content=self._order.content,
            gap=gap,
            config=config,
        )


def _put(file: FileIO, data: bytes) -> None:
    """All of it; a file that is nearly full takes a part at a time."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _version() -> str:
    try:
        return version("agentspeed")
    except PackageNotFoundError:
        return "unknown"


def _say(what: str) -> None:
    _LOG.warning("%s", what)

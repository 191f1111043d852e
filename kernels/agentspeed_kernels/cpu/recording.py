"""Records the C calls of a step, so that the next step like it is one call into the library.

A tape holds addresses. The caller sees to it that they stay what they are: buffers come from a workspace that lives as
long as the tape, and what the calls read from outside is copied to the same place each time. The plan of attention is
the exception: its arrays are new in every step, and `Tape.attend` puts their addresses into the calls that read them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, final

import numpy as np
import torch

from agentspeed_kernels.cpu import native
from agentspeed_kernels.tiles import TilePlan
from agentspeed_kernels.workspace import Workspace

PARTIALS = "attention_partials"
"""The scratch of attention of a few rows, whose size follows the plan of the step."""
MOST_ARGUMENTS = 31
"""As in native_run.h."""
_STORED: dict[Any, Any] = {native.P: np.uint64, native.L: np.int64, native.N: np.int32, native.F: np.float32}
_PLAN_AT = {"mla_rows": 8, "gqa_rows": 9}
"""The ops that take a plan, and where among their arguments."""
_PARTIALS_BEHIND, _ENTRIES_BEHIND = 13, 14
"""Where, counted from there, they take their scratch and the number of its entries."""


Watch = Callable[[str, tuple[Any, ...], int], None]
"""Is told of a C call: its op, what it was given, and its nanoseconds of processor time. Of a call on a tape it is told
what was given when the tape was made; a plan of attention has changed since."""


@final
class Tape:
    """The calls of one step. Not thread-safe."""

    __slots__ = ("_attends", "_calls", "_held", "_rows", "_run", "partial_floats")

    def __init__(self) -> None:
        self._rows: list[tuple[str, native.Function, tuple[Any, ...]]] = []
        self._held: list[object] = []
        self._attends: list[tuple[int, int]] = []
        """Calls that take a plan, and where among their arguments."""
        self._calls = np.zeros((0, MOST_ARGUMENTS + 1), dtype=np.uint64)
        self._run: Any = None
        self.partial_floats = 0
        """Of that scratch, for one entry of the plan."""

    def add(self, op: str, function: native.Function, held: tuple[object, ...], given: tuple[Any, ...]) -> None:
        """`held` owns the memory that `given` names: a tape must not write to memory that went back."""
        self._held += held
        if op in _PLAN_AT:
            self._attends.append((len(self._rows), 1 + _PLAN_AT[op]))
        self._rows.append((op, function, given))

    def close(self) -> None:
        """Lays the calls out as the library reads them."""
        library = native.library()
        assert isinstance(library, native.Library)
        self._run = library.run
        self._calls = np.zeros((len(self._rows), MOST_ARGUMENTS + 1), dtype=np.uint64)
        for row, (_, function, given) in zip(self._calls, self._rows, strict=True):
            row[0] = function.entry
            for index, (kind, value) in enumerate(zip(function.types, given, strict=True)):
                row[index + 1 : index + 2].view(_STORED[kind])[0] = 0 if value is None else value

    def attend(self, tiles: TilePlan, workspace: Workspace) -> None:
        """Puts a step's plan into the calls that attend."""
        partials = workspace.take(PARTIALS, (tiles.entries, self.partial_floats), torch.float32)
        plan = (tiles.count, *tiles.addresses[:7], tiles.merge_rows.size, *tiles.addresses[7:])
        for call_at, plan_at in self._attends:
            row = self._calls[call_at, plan_at:]
            row[: len(plan)] = plan
            row[_PARTIALS_BEHIND], row[_ENTRIES_BEHIND] = partials.data_ptr(), tiles.entries

    def run(self) -> None:
        if _state.watch is not None:
            self._run_watched(_state.watch)
            return
        started = time.thread_time_ns() if _state.clock else 0
        self._run(self._calls.ctypes.data, len(self._calls))
        if _state.clock:
            _state.nanoseconds += time.thread_time_ns() - started

    def _run_watched(self, watch: Watch) -> None:
        for index, (op, _, given) in enumerate(self._rows):
            started = time.thread_time_ns()
            self._run(self._calls[index].ctypes.data, 1)
            watch(op, given, time.thread_time_ns() - started)

    @property
    def length(self) -> int:
        return len(self._rows)


class _State(threading.local):
    tape: Tape | None = None
    clock: bool = False
    nanoseconds: int = 0
    watch: Watch | None = None


_state = _State()


@contextmanager
def recording() -> Iterator[Tape]:
    """The C calls that this thread makes meanwhile are made, and recorded as well."""
    assert _state.tape is None
    _state.tape = tape = Tape()
    try:
        yield tape
    finally:
        _state.tape = None
    tape.close()


@contextmanager
def kernel_clock() -> Iterator[Callable[[], int]]:
    """Gives what this thread has spent in C calls since: nanoseconds of processor time. For benchmarks."""
    _state.clock, _state.nanoseconds = True, 0
    try:
        yield lambda: _state.nanoseconds
    finally:
        _state.clock = False


@contextmanager
def each_call(watch: Watch) -> Iterator[None]:
    """Tells `watch` of each C call of this thread, those on a tape one by one. For benchmarks."""
    _state.watch = watch
    try:
        yield
    finally:
        _state.watch = None


def call(functions: dict[str, native.Function], op: str, held: tuple[object, ...], *given: Any) -> None:
    """Calls a C function with `given`, addresses within what `held` has; on a recording thread the tape gets both."""
    function = functions[op]
    timed = _state.clock or _state.watch is not None
    started = time.thread_time_ns() if timed else 0
    function.call(*given)
    taken = time.thread_time_ns() - started if timed else 0
    if _state.clock:
        _state.nanoseconds += taken
    if _state.watch is not None:
        _state.watch(op, given, taken)
    if _state.tape is not None:
        _state.tape.add(op, function, held, given)


def note_partials(floats: int) -> None:
    if _state.tape is not None:
        _state.tape.partial_floats = floats

"""Steps of few rows as one call into the kernel library: recorded for a number of rows, checked, and then repeated.

Between its kernels a step of one token is mostly Python. The chain between the embedding and the head does the same
calls with the same memory in every step of as many rows, so they are recorded once and repeated. A module that computes
something the record does not have would be left out silently; so each record first runs beside the modules themselves,
in a step other than the one it was made in, and is used only if every bit agrees.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from agentspeed_engine.models.family import LONG_OPS
from agentspeed_engine.models.state import StepState
from agentspeed_engine.spmd.lower import Compiled
from agentspeed_kernels.cpu.recording import Tape, recording
from agentspeed_kernels.selection import Kernels
from agentspeed_kernels.workspace import Workspace

log = logging.getLogger("agentspeed.engine")

MOST_ROWS = 32
"""Above this what lies between the kernels is a small share of a step."""
MOST_PROGRAMS = 16
"""Each has scratch memory of its own, so that its addresses last."""
AFTER = 3
"""Steps of as many rows before a record is made: it costs two of them, and checking it one more."""


@final
@dataclass(slots=True)
class _Program:
    workspace: Workspace
    x: Tensor
    cos: Tensor
    sin: Tensor
    slots: Tensor
    tape: Tape
    out: Tensor
    proven: bool = False

    def inner(self, state: StepState) -> StepState:
        return replace(state, cos=self.cos, sin=self.sin, slots=self.slots, workspace=self.workspace)

    def load(self, x: Tensor, state: StepState) -> None:
        self.x.copy_(x)
        self.cos.copy_(state.cos)
        self.sin.copy_(state.sin)
        self.slots.copy_(state.slots)


@final
class Programs:
    """Not thread-safe: one worker thread drives it."""

    def __init__(self, steps: Sequence[Compiled], kernels: Kernels, ops: Sequence[str]) -> None:
        """`steps` is the chain of one rank: its first embeds, its last is the head. `ops`: those it calls."""
        self._ops = tuple(op for op in ops if op not in LONG_OPS)  # long extends are not repeated
        self._first, *self._middle, self._last = steps
        self._kernels = kernels
        self._programs: dict[int, _Program] = {}
        self._seen: dict[int, int] = {}
        self.allowed = True

    def run(self, ids: Tensor, state: StepState) -> Tensor | None:
        """Logits as the chain gives them, or None: the step is not one of those that are repeated."""
        rows = ids.shape[0]
        if not self.allowed or rows > MOST_ROWS or state.attention.many is not None or state.attention.few is None:
            return None
        program = self._programs.get(rows)
        if program is None and not self._worth(rows):
            return None
        x, _ = self._first(ids, None, state, (rows,))
        if program is None:
            program = self._programs[rows] = self._record(x, state)
        else:
            self._repeat(program, x, state)
        logits: Tensor = self._last(program.out, None, state, (rows,))[0]
        return logits

    def _worth(self, rows: int) -> bool:
        seen = self._seen[rows] = self._seen.get(rows, 0) + 1
        return seen > AFTER and len(self._programs) < MOST_PROGRAMS and self._kernels.recordable(self._ops, rows)

    def _chain(self, x: Tensor, state: StepState) -> Tensor:
        residual: Tensor | None = None
        for step in self._middle:
            x, residual = step(x, residual, state, (x.shape[0],))
        return x

    def _record(self, x: Tensor, state: StepState) -> _Program:
        held = _Program(
            workspace=Workspace(),
            x=x.clone(),
            cos=state.cos.clone(),
            sin=state.sin.clone(),
            slots=state.slots.clone(),
            tape=Tape(),
            out=x,
        )
        # Buffers of a workspace grow, and move, until the largest call of a step has been made.
        self._chain(held.x, held.inner(state))
        held.x.copy_(x)
        with recording() as tape:
            held.out = self._chain(held.x, held.inner(state))
        held.tape = tape
        return held

    def _repeat(self, program: _Program, x: Tensor, state: StepState) -> None:
        assert state.attention.few is not None
        program.load(x, state)
        program.tape.attend(state.attention.few, program.workspace)
        program.tape.run()
        if program.proven:
            return
        repeated = program.out.clone()
        program.x.copy_(x)
        program.out = self._chain(program.x, program.inner(state))
        if torch.equal(repeated, program.out):
            program.proven = True
            log.info("steps of %d rows are one call of %d kernels", x.shape[0], program.tape.length)
        else:
            self.allowed = False
            self._programs = {}
            log.warning("steps are not recorded: a module computes something outside the kernels. Steps are slower")

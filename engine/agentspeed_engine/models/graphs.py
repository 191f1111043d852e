"""Steps of few rows on a GPU as one CUDA graph: launched from Python, a step is mostly the time between its kernels.

A graph is captured for a padded number of rows and a padded shape of the attention's plan: for the usual steps before
the first turn, for others once they are met again. Rows that pad a step write
no latent (their slot is -1), are read by nobody, and what attention leaves of them is finite.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from agentspeed_engine.models.inputs import FlatBatch
from agentspeed_engine.models.inputs_on_device import unwaited
from agentspeed_engine.models.rope import Rope
from agentspeed_engine.models.state import StepState
from agentspeed_engine.models.usual_steps import usual_steps
from agentspeed_engine.spmd.lower import Compiled, run
from agentspeed_kernels.attention import AttentionStep
from agentspeed_kernels.triton.backend import TritonAttention
from agentspeed_kernels.triton.padded import PaddedShape, PlanMemory, padded, shape_for
from agentspeed_kernels.workspace import Workspace

log = logging.getLogger("agentspeed.engine")

BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
"""Rows that steps are padded to."""
AFTER = 2
"""Steps of a shape that run kernel by kernel before a graph is captured; they also compile what it is made of."""
MOST_GRAPHS = 192
SPARE_PART = 20
"""Of the GPU's memory one part in so many stays free of graphs."""
_cuda: Any = torch.cuda
"""torch gives these no types."""
_ROWS = ("ids", "positions", "slots")


@final
@dataclass(slots=True, eq=False)
class _Graph:
    plans: PlanMemory
    inputs: Tensor
    """[3, rows] int64: ids, positions, slots."""
    held: tuple[Workspace, Tensor]
    """Scratch memory and selected rows: the graph has their addresses."""
    graph: Any
    logits: Tensor


@final
class Graphs:
    """Not thread-safe: one worker thread drives it."""

    def __init__(self, steps: Sequence[Compiled], rope: Rope, attention: TritonAttention, device: torch.device) -> None:
        self._steps, self._rope, self._attention, self._device = tuple(steps), rope, attention, device
        self._graphs: dict[PaddedShape, _Graph] = {}
        self._seen: dict[PaddedShape, int] = {}
        self._pool: Any = None

    @property
    def count(self) -> int:
        return len(self._graphs)

    def capture(self, context_limit: int, pool_tokens: int, progress: Callable[[int], None]) -> bool:
        """Graphs of the usual steps of a pool of `pool_tokens`, as far as there is memory (False: not of all).
        `progress` is told how many there are."""
        for batch in usual_steps(BUCKETS, context_limit, pool_tokens, self._attention.shape.page_tokens):
            plan, form = self._attention.rows(batch.runs, batch.positions)
            shape = shape_for(plan, form, _bucket(len(batch.ids)), self._attention.shape)
            if shape is None or shape in self._graphs:
                continue
            if not self._room():
                return False
            self._capture(shape, batch, padded(plan, shape))
            progress(len(self._graphs))
        return True

    def run(self, batch: FlatBatch, name: Callable[[Tensor], None] | None) -> Tensor | None:
        """Logits of the selected rows as the chain gives them, valid until the next call; None: the step is not one of
        those that are repeated."""
        rows = len(batch.ids)
        if not rows or rows > BUCKETS[-1] or not len(batch.select):
            return None
        queries = _bucket(rows)
        plan, form = self._attention.rows(batch.runs, batch.positions)
        shape = shape_for(plan, form, queries, self._attention.shape)
        if shape is None:
            return None
        held = self._graphs.get(shape)
        if held is None:
            seen = self._seen[shape] = self._seen.get(shape, 0) + 1
            if seen <= AFTER or not self._room():
                return None
        plan = padded(plan, shape)
        if held is None:
            held = self._capture(shape, batch, plan)
        else:
            held.plans.load(plan)
        held.inputs.copy_(_padded_inputs(batch, queries), non_blocking=True)
        if name is not None:
            name(held.inputs[0])
        held.graph.replay()
        if len(batch.select) == rows:
            return held.logits[:rows]
        return held.logits[unwaited(batch.select, self._device)]

    def _room(self) -> bool:
        free, total = _cuda.mem_get_info(self._device)
        return bool(len(self._graphs) < MOST_GRAPHS and free >= total // SPARE_PART)

    def _capture(self, shape: PaddedShape, batch: FlatBatch, plan: Any) -> _Graph:
        """Runs once beside the capture, which writes what the step itself writes again."""
        plans = PlanMemory(shape, self._device)
        inputs = torch.empty(len(_ROWS), shape.queries, dtype=torch.int64, device=self._device)
        inputs.copy_(_padded_inputs(batch, shape.queries))
        workspace = Workspace(self._device)
        select = torch.arange(shape.queries, device=self._device)
        few = plans.load(plan)
        attention = AttentionStep(few=few, many=None, many_rows=np.zeros(0, np.int64))

        def chain() -> Tensor:
            cos, sin = self._rope.at(inputs[1])
            state = StepState(
                cos=cos, sin=sin, slots=inputs[2], attention=attention, select=select, workspace=workspace
            )
            logits: Tensor = run(self._steps, inputs[0], state, (shape.queries,))
            return logits

        # Buffers of a workspace grow, and move, until the largest call of a step has been made.
        side = _cuda.Stream(self._device)
        side.wait_stream(_cuda.current_stream(self._device))
        with _cuda.stream(side):
            chain()
        _cuda.current_stream(self._device).wait_stream(side)
        workspace.clear()
        graph = _cuda.CUDAGraph()
        with _cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits = chain()
        self._pool = self._pool or graph.pool()
        held = self._graphs[shape] = _Graph(plans, inputs, (workspace, select), graph, logits)
        log.debug("steps of up to %d rows are one graph (%d graphs)", shape.queries, len(self._graphs))
        return held


def _bucket(rows: int) -> int:
    return next(size for size in BUCKETS if size >= rows)


def _padded_inputs(batch: FlatBatch, queries: int) -> Tensor:
    """[3, queries] in pinned memory: ids, positions, slots."""
    given = torch.empty(len(_ROWS), queries, dtype=torch.int64, pin_memory=True)
    view = given.numpy()
    rows = len(batch.ids)
    view[0, :rows], view[1, :rows], view[2, :rows] = batch.ids, batch.positions, batch.slots
    view[0, rows:], view[1, rows:], view[2, rows:] = 0, 0, -1
    return given

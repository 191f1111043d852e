"""Most steps on a GPU as one CUDA graph: launched from Python, a step is mostly the time between its kernels.

A graph is captured for a padded number of rows and a padded shape of the attention's plan: for the usual steps before
the first turn, for others once they are met again. Rows that pad a step write
no latent (their slot is -1), are read by nobody, and what attention leaves of them is finite. Scratch memory is one for
all graphs: they run one after the other, and none reads what another has left.

Long extends run as other rows do, where that costs little more than their own kernels (`TritonAttention.absorbs`).

Ranks of one model capture the same graphs in the same order and replay them in the order of the steps: what decides is
in the step, which all are told, but for memory and what a capture came to, which they agree on.

The chain of a graph is the joined one. The first graph of each form is repeated beside the modules themselves; where it
gives something else all graphs are made of the modules from then on, and where these cannot be captured there are none.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, final

import torch
from torch import Tensor

from agentspeed_engine.models.graph_recorder import CudaRecorder, Recorder
from agentspeed_engine.models.inputs import FlatBatch
from agentspeed_engine.models.joined_check import objection
from agentspeed_engine.models.kv_pools import KvPools
from agentspeed_engine.models.rope import Rope
from agentspeed_engine.models.state import StepState
from agentspeed_engine.models.usual_steps import first_page, long_steps, usual_steps, written
from agentspeed_engine.spmd.lower import Compiled, run
from agentspeed_kernels.attention import AttentionStep
from agentspeed_kernels.selection import JOINED, SWITCH
from agentspeed_kernels.triton.attention import Form
from agentspeed_kernels.triton.backend import TritonAttention
from agentspeed_kernels.triton.padded import PaddedShape, PlanMemory, padded, shape_for
from agentspeed_kernels.triton.plan import RowsPlan
from agentspeed_kernels.uploads import unwaited
from agentspeed_kernels.workspace import Workspace

log = logging.getLogger("agentspeed.engine")

BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Rows that steps are padded to."""
DRAWN = 64
"""A step of more rows gives logits of so many, of all where that is not enough: most of its rows belong to prompts."""
AFTER = 2
"""Steps of a shape that run kernel by kernel before a graph is captured; they also compile what it is made of."""
MOST_GRAPHS = 256
CHECKED_ROWS = 4
"""Rows at the least that a form is checked with before the first turn: a near tie of the router is one row's."""
MOST_SAID = 500
"""Characters of what a compiler says about a step."""
_ROWS = ("ids", "positions", "slots", "select")


_Form: TypeAlias = tuple[PaddedShape, int]
"""Of a graph: what its plans have in common, and rows of logits."""


@final
@dataclass(slots=True, eq=False)
class _Graph:
    plans: PlanMemory
    inputs: Tensor
    """[4, rows] int64: ids, positions, slots, and the rows that logits are of."""
    held: tuple[Tensor, ...]
    """Scratch memory: the graph has its addresses."""
    replay: Callable[[], None]
    logits: Tensor


@final
class Graphs:
    """Not thread-safe: one worker thread drives it."""

    def __init__(
        self,
        joined: Sequence[Compiled] | None,
        plain: Sequence[Compiled],
        modules: Callable[[FlatBatch], Tensor],
        pools: KvPools,
        vocabulary: int,
        rope: Rope,
        attention: TritonAttention,
        device: torch.device,
        recorder: Recorder | None = None,
        agree: Callable[[bool], bool] | None = None,
    ) -> None:
        """`joined` and `plain` are the chain in two ways, None: the first is not wanted; `modules` gives the logits of
        the selected rows of a step, kernel by kernel. `recorder`: None for CUDA graphs. `agree`: of several ranks,
        whether all say what this one says; they are given the same steps."""
        self._agree = agree
        self._joined, self._modules = joined, modules
        self._plain: Sequence[Compiled] | None = plain
        self._pools, self._vocabulary = pools, vocabulary
        self._rope, self._attention, self._device = rope, attention, device
        self._recorder = recorder or CudaRecorder(device)
        self._workspace = Workspace(device)
        self._graphs: dict[_Form, _Graph] = {}
        self._seen: dict[_Form, int] = {}
        self._checked: set[tuple[int, Form]] = set()
        self._turns = 0
        self._full = False
        """Memory for another ran out once."""

    @property
    def count(self) -> int:
        return len(self._graphs)

    @property
    def joins(self) -> bool:
        """Whether graphs are of joined steps."""
        return self._joined is not None

    def capture(self, context_limit: int, pool_tokens: int, most_new: int, progress: Callable[[int], None]) -> bool:
        """Compiles what long prompts take, of which up to `most_new` tokens are in a step, and makes graphs of the
        usual steps of a pool of `pool_tokens`, as far as there is memory (False: not of all). `progress` is told how
        many there are. Nobody has rows in the pool yet."""
        page_tokens = self._attention.shape.page_tokens
        for step in long_steps(context_limit, pool_tokens, page_tokens, most_new):
            if self._room():
                self._modules(step)
        if not self.joins:
            return self._usual(context_limit, pool_tokens, progress)
        self._modules(first_page(min(page_tokens, context_limit), self._vocabulary))
        whole = self._usual(context_limit, pool_tokens, progress)
        for pool in self._pools.tensors:
            pool[:, : -(-BUCKETS[-1] // page_tokens)] = 0
        if self.joins:
            log.info("joined steps give what the modules give, in %d forms", len(self._checked))
        return whole

    def _usual(self, context_limit: int, pool_tokens: int, progress: Callable[[int], None]) -> bool:
        if self._plain is None:
            return True
        for batch in usual_steps(BUCKETS, context_limit, pool_tokens, self._attention.shape.page_tokens):
            plan, form = self._attention.rows(batch.runs, batch.positions)
            shape = shape_for(plan, form, _bucket(len(batch.ids)), self._attention.shape)
            if shape is None or (shape, _drawn(batch, shape)) in self._graphs:
                continue
            if not self._room():
                return False
            if self._capture(shape, batch, padded(plan, shape), self._trials(batch)) is None:
                return self._usual(context_limit, pool_tokens, progress)
            progress(len(self._graphs))
        return True

    def _trials(self, batch: FlatBatch) -> list[FlatBatch]:
        first, self._turns = self._turns + 1, self._turns + -(-CHECKED_ROWS // len(batch.ids))
        return [written(batch, self._vocabulary, turn) for turn in range(first, self._turns + 1)]

    def run(self, batch: FlatBatch, name: Callable[[Tensor], None] | None) -> Tensor | None:
        """Logits of the selected rows as the chain gives them, valid until the next call; None: the step is not one of
        those that are repeated."""
        rows = len(batch.ids)
        if self._plain is None or not rows or rows > BUCKETS[-1] or not self._attention.absorbs(batch.runs):
            return None
        plan, form = self._attention.rows(batch.runs, batch.positions)
        shape = shape_for(plan, form, _bucket(rows), self._attention.shape)
        if shape is None:
            return None
        key = shape, _drawn(batch, shape)
        held = self._graphs.get(key)
        if held is not None:
            held.plans.load(padded(plan, shape))
            return self._replay(held, batch, name)
        seen = self._seen[key] = self._seen.get(key, 0) + 1
        if seen <= AFTER or not self._room() or not (len(batch.select) or self._sound(shape)):
            return None
        try:
            held = self._capture(shape, batch, padded(plan, shape), [batch])
        except torch.OutOfMemoryError as error:
            if self._agree is not None:  # others wait for this one in the middle of a step
                raise
            # The step itself takes less than a graph of it, which is there for speed alone.
            self._full = True
            said = str(error).split(". ", 1)[0]
            log.warning(
                "no more graphs than %d: there is no room for one of up to %d rows: %s", self.count, shape.queries, said
            )
            return None
        return None if held is None else self._replay(held, batch, name)

    def _replay(self, held: _Graph, batch: FlatBatch, name: Callable[[Tensor], None] | None) -> Tensor:
        """Of a step whose plan is loaded."""
        held.inputs.copy_(_padded_inputs(batch, held.inputs.shape[1], self._device), non_blocking=True)
        if name is not None:
            name(held.inputs[0])
        held.replay()
        return held.logits[: len(batch.select)]

    def _sound(self, shape: PaddedShape) -> bool:
        """Whether a graph needs no check, which a step without logits is none for."""
        return not self.joins or (shape.queries, shape.form) in self._checked

    def _room(self) -> bool:
        """On several ranks, where all have it."""
        if self._full or len(self._graphs) >= MOST_GRAPHS:
            return False
        if self._agree is None:
            return self._recorder.room()
        self._full = not self._agree(self._recorder.room())
        return not self._full

    def _capture(
        self, shape: PaddedShape, batch: FlatBatch, plan: RowsPlan, trials: Sequence[FlatBatch]
    ) -> _Graph | None:
        """None where a chain was found wanting just now: there are no graphs any more. `trials`: steps of the same plan
        that a form of joined steps is checked with."""
        steps = self._plain if self._joined is None else self._joined
        if steps is None:
            return None
        made = self._tried(steps, shape, batch, plan, trials)
        if self._agree is not None and not self._agree(not isinstance(made, str)) and not isinstance(made, str):
            made = "another rank found it wanting"
        if isinstance(made, str):
            self._leave_out(shape, made)
            return None
        self._graphs[shape, _drawn(batch, shape)] = made
        log.debug("steps of up to %d rows are one graph (%d graphs)", shape.queries, len(self._graphs))
        return made

    def _tried(
        self,
        steps: Sequence[Compiled],
        shape: PaddedShape,
        batch: FlatBatch,
        plan: RowsPlan,
        trials: Sequence[FlatBatch],
    ) -> _Graph | str:
        """The graph, or what is wrong with its chain."""
        try:
            made = self._made(steps, shape, batch, plan)
            return self._objection(made, trials) or made
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - a compiler and a driver may raise anything; the warning says it
            return f"it raised {type(error).__name__}: {' '.join(str(error).split())[:MOST_SAID]}"

    def _objection(self, held: _Graph, trials: Sequence[FlatBatch]) -> str | None:
        """What is wrong with the first graph of a form: logits and rows of the cache beside those of the modules."""
        if self._sound(held.plans.shape):
            return None
        got: list[tuple[Tensor, Tensor]] = []
        wanted: list[tuple[Tensor, Tensor]] = []
        for batch in trials:
            live = torch.from_numpy(batch.slots[batch.select] >= 0).to(self._device)
            got.append((self._replay(held, batch, None)[live], self._rows(batch)))
            wanted.append((self._modules(batch)[live], self._rows(batch)))
        both = zip(zip(*got, strict=True), zip(*wanted, strict=True), strict=True)
        for what, (ours, theirs) in zip(("logits", "rows of the cache"), both, strict=True):
            why = objection(what, torch.cat(ours), torch.cat(theirs))
            if why is not None:
                return why
        self._checked.add((held.plans.shape.queries, held.plans.shape.form))
        return None

    def _rows(self, batch: FlatBatch) -> Tensor:
        """[T, numbers of a token] of what a step has written."""
        return self._pools.numbers(unwaited(batch.slots[batch.slots >= 0], self._device))

    def _leave_out(self, shape: PaddedShape, why: str) -> None:
        """Joined steps for those of the modules; these for no graphs at all."""
        if self._joined is not None:
            self._joined = None
            log.warning(
                "joined steps are left out, found by one of up to %d rows: %s. Steps call their modules one by one, "
                "which is slower (%s=-%s asks for that from the start)",
                shape.queries,
                why,
                SWITCH,
                JOINED,
            )
        else:
            self._plain = None
            log.warning(
                "steps are not captured, found by one of up to %d rows: %s. They are launched kernel by kernel, which "
                "is much slower",
                shape.queries,
                why,
            )
        self._graphs.clear()
        self._full = False
        self._recorder.forget()

    def _made(self, steps: Sequence[Compiled], shape: PaddedShape, batch: FlatBatch, plan: RowsPlan) -> _Graph:
        """Runs once beside the capture, which writes what the step itself writes again."""
        plans = PlanMemory(shape, self._device)
        inputs = torch.empty(len(_ROWS), shape.queries, dtype=torch.int64, device=self._device)
        inputs.copy_(_padded_inputs(batch, shape.queries, self._device))
        workspace, select = self._workspace, inputs[3, : _drawn(batch, shape)]
        none = torch.zeros(0, dtype=torch.int64, device=self._device)
        attention = AttentionStep(few=plans.load(plan), many=None, many_rows=none)

        def chain() -> Tensor:
            cos, sin = self._rope.at(inputs[1])
            state = StepState(
                cos=cos, sin=sin, slots=inputs[2], attention=attention, select=select, workspace=workspace
            )
            logits: Tensor = run(steps, inputs[0], state, (shape.queries,))
            return logits

        # Buffers of a workspace grow, and move, until the largest call of a step has been made.
        replay, logits = self._recorder.record(chain, workspace.clear)
        return _Graph(plans, inputs, workspace.buffers, replay, logits)


def _bucket(rows: int) -> int:
    return next(size for size in BUCKETS if size >= rows)


def _drawn(batch: FlatBatch, shape: PaddedShape) -> int:
    """How many rows of logits a graph for this step gives."""
    return DRAWN if len(batch.select) <= DRAWN < shape.queries else shape.queries


def _padded_inputs(batch: FlatBatch, queries: int, device: torch.device) -> Tensor:
    """[4, queries] in pinned memory for a GPU: ids, positions, slots, selected rows."""
    given = torch.empty(len(_ROWS), queries, dtype=torch.int64, pin_memory=device.type == "cuda")
    view = given.numpy()
    rows = len(batch.ids)
    view[0, :rows], view[1, :rows], view[2, :rows] = batch.ids, batch.positions, batch.slots
    view[0, rows:], view[1, rows:], view[2, rows:] = 0, 0, -1
    view[3, : len(batch.select)], view[3, len(batch.select) :] = batch.select, 0
    return given

"""Queries, results and partials further than 2^31 numbers away, through the interpreter: offsets are 64 bits wide.

The memory is reserved, not taken: only what kernels touch has pages."""

from __future__ import annotations

import importlib.util
import mmap
from typing import Any, final

import numpy as np
import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
import tests.triton_interpreter  # noqa: F401 - must come before the first kernel
from agentspeed_kernels.testing import conformance
from agentspeed_kernels.triton import attention, backend, grouped
from agentspeed_kernels.workspace import Workspace
from tests.support.forked_pieces import fork

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
"""The interpreter computes both sides of a `where`."""

CPU = torch.device("cpu")
PAGE, RANK, ROPE, HEADS = 16, 32, 16, 2
FAR = 1 << 31
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
"""Python 3.11 has no name for it."""


def reserved(rows: int, width: int) -> Tensor:
    """[rows, width] of zeros in float32."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
    return torch.frombuffer(mmap.mmap(-1, rows * width * 4, flags=flags), dtype=torch.float32).view(rows, width)


def moved(step: attention.RowsOnDevice, slots: int) -> attention.RowsOnDevice:
    """The same plan, whose partials lie behind those of so many slots."""
    items, table = step.arrays["items"].view(-1, 8), step.arrays["table"]
    items[:, 3] = torch.where(items[:, 3] >= 0, items[:, 3] + slots, -1)
    table[:] = torch.where(table >= 0, table + slots * step.form.block_rows, -1)
    step.plan.slots += slots
    return step


def later(step: attention.RowsOnDevice, rows: int) -> attention.RowsOnDevice:
    """The same plan for queries that stand behind others: so many rows of the plan."""
    for name in ("rows", "unit_row"):
        step.arrays[name][:] = torch.where(step.arrays[name] >= 0, step.arrays[name] + rows, -1)
    step.arrays["items"].view(-1, 8)[:, 4] += rows
    return step


@final
class Attention:
    """Latent attention, or that of several groups of heads: of some branches of a fork, whose rows are in partials, or
    of one branch, short enough for none."""

    def __init__(self, groups: int | None, *, forks: bool = True) -> None:
        noise = torch.Generator().manual_seed(1)
        pieces, positions = fork(3, 2)
        if not forks:
            pieces = [conformance.piece(np.array([9], np.int32), 0, 10, np.arange(2, dtype=np.int32), True)]
            positions = np.array([8, 9])
        self.groups, self.tokens, self.heads = groups or 1, positions.size, HEADS * (groups or 1)
        if groups is None:
            shape, pools, self.wide = backend.shape_of(HEADS, RANK, ROPE, PAGE, CPU, 4), 1, RANK + ROPE
        else:
            shape, pools, self.wide = backend.grouped_shape_of(self.heads, groups, RANK, PAGE, CPU, 4), 2, RANK
        self.held = [torch.randn(40, PAGE, self.wide * self.groups, generator=noise) for _ in range(pools)]
        self.q = torch.randn(self.tokens, self.heads, self.wide, generator=noise)
        self.call: Any = attention.mla_rows if groups is None else grouped.gqa_rows
        self.step = lambda: attention.prepare(pieces, positions, shape, CPU, cut="stream")

    def attended(self, step: attention.RowsOnDevice) -> Tensor:
        out = torch.full((self.tokens, self.heads, RANK), float("nan"))
        self.call(self.q, *self.held, step, 0.2, Workspace(), out)
        return out


@pytest.mark.parametrize("groups", [None, 2])
def test_partials_may_lie_anywhere(groups: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Attention(groups)
    wanted, step = one.attended(one.step()), one.step()
    assert step.plan.unit_row.size
    step = moved(step, FAR // RANK // step.form.block_rows)
    count = one.groups * step.plan.slots * step.form.block_rows
    far = reserved(count, RANK), reserved(count, 1)[:, 0]
    for module in (attention, grouped):
        monkeypatch.setattr(module, "partials", lambda *_: far)
    assert torch.equal(one.attended(step), wanted)


@pytest.mark.parametrize("forks", [True, False])
@pytest.mark.parametrize("groups", [None, 2])
def test_queries_and_results_may_lie_anywhere(groups: int | None, forks: bool) -> None:
    one = Attention(groups, forks=forks)
    before = FAR // (one.heads * RANK)
    wanted, step = one.attended(one.step()), later(one.step(), before * HEADS)
    assert bool(step.plan.unit_row.size) is forks
    q, out = (reserved((before + one.tokens) * one.heads, width) for width in (one.wide, RANK))
    q, out = (far.view(-1, one.heads, far.shape[1]) for far in (q, out))
    q[before:] = one.q
    one.call(q, *one.held, step, 0.2, Workspace(), out)
    assert torch.equal(out[before:], wanted)

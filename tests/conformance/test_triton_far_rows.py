"""Partials further than 2^31 numbers away, through the interpreter: offsets are 64 bits wide.

The memory is reserved, not taken: only what kernels touch has pages."""

from __future__ import annotations

import importlib.util
import mmap
from typing import Any

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
import tests.triton_interpreter  # noqa: F401 - must come before the first kernel
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


@pytest.mark.parametrize("groups", [None, 2])
def test_partials_may_lie_anywhere(groups: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = torch.Generator().manual_seed(1)
    pieces, positions = fork(3, 2)
    if groups is None:
        shape = backend.shape_of(HEADS, RANK, ROPE, PAGE, CPU, 4)
        pools, wide, all_heads = 1, RANK + ROPE, HEADS
    else:
        shape = backend.grouped_shape_of(HEADS * groups, groups, RANK, PAGE, CPU, 4)
        pools, wide, all_heads = 2, RANK, HEADS * groups
    held = [torch.randn(40, PAGE, wide * (groups or 1), generator=noise) for _ in range(pools)]
    q = torch.randn(positions.size, all_heads, wide, generator=noise)
    call: Any = attention.mla_rows if groups is None else grouped.gqa_rows

    def attended(step: attention.RowsOnDevice) -> Tensor:
        out = torch.full((positions.size, all_heads, RANK), float("nan"))
        call(q, *held, step, 0.2, Workspace(), out)
        return out

    wanted = attended(attention.prepare(pieces, positions, shape, CPU, cut="stream"))
    step = attention.prepare(pieces, positions, shape, CPU, cut="stream")
    assert step.plan.unit_row.size
    step = moved(step, FAR // RANK // step.form.block_rows)
    count = (groups or 1) * step.plan.slots * step.form.block_rows
    far = reserved(count, RANK), reserved(count, 1)[:, 0]
    for module in (attention, grouped):
        monkeypatch.setattr(module, "partials", lambda *_: far)
    assert torch.equal(attended(step), wanted)

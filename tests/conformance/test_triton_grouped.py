"""Grouped-query attention of the GPU through the interpreter: cuts, padded plans, parts of long extends, odd widths."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
import tests.triton_interpreter  # noqa: F401 - must come before the first kernel
from agentspeed_kernels.reference.grouped import gqa
from agentspeed_kernels.testing import conformance
from agentspeed_kernels.triton import attention, backend, extend, grouped
from agentspeed_kernels.triton.padded import PlanMemory, padded, shape_for
from agentspeed_kernels.triton.plan import Cut
from agentspeed_kernels.workspace import Workspace
from tests.support.forked_pieces import fork

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
"""The interpreter computes both sides of a `where`."""

CPU = torch.device("cpu")
PAGE, WIDTH = 16, 24
"""A width that is no power of two: tiles are wider than a head, and reach into the next one."""


class Drawn:
    """Pools and queries of a step of `branches` forks with `new` tokens each."""

    def __init__(self, heads: int, groups: int, branches: int, new: int) -> None:
        noise = torch.Generator().manual_seed(1)
        self.pieces, self.positions = fork(branches, new)
        self.pools = [torch.randn(40, PAGE, groups * WIDTH, generator=noise) for _ in range(2)]
        self.q = torch.randn(self.positions.size, heads + 1, WIDTH, generator=noise)[:, 1:]
        self.shape = backend.grouped_shape_of(heads, groups, WIDTH, PAGE, CPU, 4)

    def wanted(self) -> torch.Tensor:
        tiles = conformance.plan_tiles(self.pieces, self.positions, page_tokens=PAGE, chunk_tokens=32, block_rows=4)
        return gqa(self.q, *self.pools, tiles, 0.2, torch.zeros(self.q.shape))

    def rows(self, plan: attention.RowsOnDevice) -> torch.Tensor:
        out = torch.full(self.q.shape, float("nan"))
        grouped.gqa_rows(self.q, *self.pools, plan, 0.2, Workspace(), out)
        return out


def apart(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.double() - wanted).abs().max())


@pytest.mark.parametrize("cut", ["even", "stream", "fixed", None])
@pytest.mark.parametrize(("heads", "groups", "new"), [(6, 2, 3), (4, 4, 1), (20, 1, 1)])
def test_every_cut_gives_the_same_attention(cut: Cut | None, heads: int, groups: int, new: int) -> None:
    drawn = Drawn(heads, groups, 3, new)
    plan = attention.prepare(drawn.pieces, drawn.positions, drawn.shape, CPU, cut=cut)
    assert apart(drawn.rows(plan), drawn.wanted()) < 1e-5


def test_a_plan_in_the_memory_of_a_padded_shape_computes_what_it_computes_alone() -> None:
    drawn = Drawn(6, 2, 3, 1)
    plan, form = attention.plan_step(drawn.pieces, drawn.positions, drawn.shape)
    shape = shape_for(plan, form, 4, drawn.shape)
    assert shape is not None
    alone = drawn.rows(attention.upload(plan, form, CPU))
    assert torch.equal(drawn.rows(PlanMemory(shape, CPU).load(padded(plan, shape))), alone)
    assert apart(alone, drawn.wanted()) < 1e-5


@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (3, 1)])
@pytest.mark.parametrize("parts", [1, 3])
def test_a_long_extend_writes_its_own_rows_whatever_its_context_is_cut_into(
    heads: int, groups: int, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouped, "processors", lambda _: 1 if parts == 1 else 100)
    monkeypatch.setattr(grouped, "MOST_PARTS", parts)
    drawn = Drawn(heads, groups, 2, 20)
    (_, second) = extend.prepare_extend(drawn.pieces, drawn.positions, PAGE, heads, CPU)
    out = torch.full(drawn.q.shape, 7.0)
    grouped.gqa_extend(drawn.q, *drawn.pools, (second,), 0.2, Workspace(), out)
    assert (out[:20] == 7.0).all(), "rows of another branch keep what they had"
    assert apart(out[20:], drawn.wanted()[20:]) < 1e-5


def test_a_row_is_bit_equal_in_any_batch_under_the_invariant_cut() -> None:
    drawn = Drawn(6, 2, 3, 1)
    together = drawn.rows(attention.prepare(drawn.pieces, drawn.positions, drawn.shape, CPU, cut="fixed"))
    for row in range(3):
        own = [drawn.pieces[0], drawn.pieces[row + 1]]
        alone = [conformance.piece(one.pages, one.start, one.tokens, np.zeros(1, np.int32), one.causal) for one in own]
        plan = attention.prepare(alone, drawn.positions[row : row + 1], drawn.shape, CPU, cut="fixed")
        out = torch.empty(1, 6, WIDTH)
        grouped.gqa_rows(drawn.q[row : row + 1], *drawn.pools, plan, 0.2, Workspace(), out)
        assert torch.equal(out[0], together[row])


@pytest.mark.parametrize("most", [1, 8])
def test_a_negative_slot_leaves_the_pools_as_they_are(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In programs of one head, and of several."""
    monkeypatch.setattr(grouped, "MOST_SINGLE_HEADS", most)
    noise = torch.Generator().manual_seed(1)
    qkv = torch.randn(2, 8, WIDTH, generator=noise)
    pools = [torch.zeros(2, PAGE, 2 * WIDTH) for _ in range(2)]
    angles = torch.rand(2, WIDTH // 2, generator=noise)
    q = torch.full((2, 4, WIDTH), float("nan"))
    given = (qkv, None, None, 1e-6, angles.cos(), angles.sin(), torch.tensor([-1, 5]))
    grouped.qkv_append(*given, q, *pools)
    assert torch.isfinite(q).all()
    for pool in pools:
        written = pool.view(-1, 2 * WIDTH).any(dim=1).nonzero().flatten()
        assert written.tolist() == [5]

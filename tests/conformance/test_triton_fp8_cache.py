"""Pools of bytes on a GPU, through the interpreter: bytes and roundings, every cut, hidden rows, rows in any batch."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
import tests.triton_interpreter  # noqa: F401 - must come before the first kernel
from agentspeed_kernels.fp8_cache import CacheRow, heads_row, latent_row
from agentspeed_kernels.testing import conformance
from agentspeed_kernels.triton import attention, backend, fp8_cache_kernels, grouped, kernels
from agentspeed_kernels.triton.plan import Cut
from agentspeed_kernels.workspace import Workspace
from tests.support.forked_pieces import fork

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
"""The interpreter computes both sides of a `where`."""

CPU = torch.device("cpu")
PAGE, RANK, ROPE, HEADS = 16, 32, 16, 4
LATENT = latent_row(RANK, ROPE)
NEAR = 1e-2
"""Of results, which are bfloat16."""


def pool_of(row: CacheRow, pages: int = 40, seed: int = 1) -> Tensor:
    noise = torch.Generator().manual_seed(seed)
    return row.coded(torch.randn(pages, PAGE, row.numbers, generator=noise))


def queries(tokens: int, heads: int, width: int) -> Tensor:
    return torch.randn(tokens, heads, width, generator=torch.Generator().manual_seed(2)).bfloat16()


def attended(q: Tensor, pool: Tensor, pieces: Any, positions: Any, cut: Cut | None = None) -> Tensor:
    shape = backend.shape_of(HEADS, RANK, ROPE, PAGE, CPU, 1)
    out = torch.full((q.shape[0], HEADS, RANK), float("nan"), dtype=torch.bfloat16)
    plan = attention.prepare(pieces, positions, shape, CPU, cut=cut)
    attention.mla_rows(q, pool, plan, 0.15, Workspace(), out)
    return out


def test_every_byte_stands_for_the_number_that_torch_says() -> None:
    row = latent_row(256, 16)
    pool = torch.zeros(1, PAGE, row.nbytes, dtype=torch.uint8)
    pool[:, :, :256] = torch.arange(256, dtype=torch.uint8)
    pool[:, :, row.scales_at : row.scales_at + 4] = torch.tensor([1.0]).view(torch.uint8)
    out = torch.empty(1, PAGE, row.numbers)
    fp8_cache_kernels.decode(pool, torch.zeros(1, dtype=torch.int32), row, out)
    wanted = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    there = wanted.isfinite()
    assert torch.equal(out[0, 0, :256][there], wanted[there])
    assert bool(out[0, 0, :256][~there].isfinite().all()), "rows say by their scale that there is no number"


def test_a_row_is_written_as_the_nearest_bytes_ties_to_even() -> None:
    """Halves between neighbours and what lies beside them, of each size down to less than the least; 448 rules."""
    numbers = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    halves = (numbers[1:] + numbers[:-1]) / 2
    some = torch.cat([halves, halves * (1 + 2**-12), -halves * (1 - 2**-12), torch.tensor([448.0, -448.0])])
    width = -(-some.numel() // 16) * 16
    values = torch.zeros(1, 3, width)
    values[0, 2, : some.numel()] = some
    pools = [torch.zeros(1, PAGE, heads_row(1, width).nbytes, dtype=torch.uint8) for _ in range(2)]
    turn, slots = torch.zeros(1, width // 2), torch.tensor([3])
    kernels_q = torch.empty(1, 1, width)
    grouped.qkv_append(values, None, None, 1e-6, turn + 1, turn, slots, kernels_q, *pools)
    assert torch.equal(pools[1][0, 3, :width], heads_row(1, width).coded(values[0, 2])[:width])


@pytest.mark.parametrize("size", [1.0, 0.99, 2**-20])
def test_a_head_has_the_smallest_scale_or_is_zeros(size: float) -> None:
    row = heads_row(1, 16)
    values = torch.full((1, 3, 16), size * 448 * torch.finfo(torch.float32).tiny)
    pools = [torch.zeros(1, PAGE, row.nbytes, dtype=torch.uint8) for _ in range(2)]
    turn, slots = torch.zeros(1, 8), torch.tensor([3])
    grouped.qkv_append(values, None, None, 1e-6, turn + 1, turn, slots, torch.empty(1, 1, 16), *pools)
    for pool in pools:
        assert torch.equal(pool[0, 3], row.coded(values[0, 2]))


@pytest.mark.parametrize("cut", ["even", "stream", "fixed", None])
@pytest.mark.parametrize("new", [1, 3])
def test_every_cut_gives_attention_over_what_the_bytes_stand_for(cut: Cut | None, new: int) -> None:
    pieces, positions = fork(3, new)
    pool, q = pool_of(LATENT), queries(positions.size, HEADS, LATENT.numbers)
    tiles = conformance.plan_tiles(pieces, positions, page_tokens=PAGE, chunk_tokens=32, block_rows=4)
    numbers = LATENT.decoded(pool, torch.float64)
    wanted = conformance.definitions.mla_rows(q.double(), numbers, tiles, 0.15, RANK)
    assert float((attended(q, pool, pieces, positions, cut).double() - wanted).abs().max()) < NEAR


def test_rows_of_a_page_that_nobody_sees_may_hold_any_bytes() -> None:
    pieces, positions = fork(3, 1)
    pool, q = pool_of(LATENT), queries(3, HEADS, LATENT.numbers)
    before = attended(q, pool, pieces, positions)
    seen = torch.zeros(pool.shape[:2], dtype=torch.bool)
    for piece in pieces:
        for at in range(piece.tokens):
            seen[int(piece.pages[at // PAGE]), at % PAGE] = True
    pool[~seen] = 255
    assert torch.equal(attended(q, pool, pieces, positions), before)


def test_a_row_is_bit_equal_in_any_batch_under_the_invariant_cut() -> None:
    pieces, positions = fork(3, 1)
    pool, q = pool_of(LATENT), queries(3, HEADS, LATENT.numbers)
    together = attended(q, pool, pieces, positions, "fixed")
    for row in range(3):
        zero = np.zeros(1, np.int32)
        alone = [
            conformance.piece(one.pages, one.start, one.tokens, zero, one.causal)
            for one in (pieces[0], pieces[row + 1])
        ]
        out = attended(q[row : row + 1], pool, alone, positions[row : row + 1], "fixed")
        assert torch.equal(out[0], together[row])


def test_a_negative_slot_writes_nothing() -> None:
    pool = torch.full((1, PAGE, LATENT.nbytes), 7, dtype=torch.uint8)
    half = torch.ones(2, ROPE // 2)
    raw, gain = torch.randn(2, RANK + ROPE), torch.ones(RANK)
    kernels.latent_append(raw, gain, 1e-6, half, half, torch.tensor([-1, 5]), pool)
    touched = (pool != 7).any(-1)[0]
    assert touched.nonzero().flatten().tolist() == [5]

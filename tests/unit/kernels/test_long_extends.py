"""Attention of many new rows over tiles longer than what a kernel takes at once, with scores whose peaks grow."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from agentspeed_engine.models.inputs import Run
from agentspeed_kernels.fp8_cache import CacheRow, heads_row, latent_row
from agentspeed_kernels.packing import pack
from agentspeed_kernels.platform import detect
from agentspeed_kernels.reference import definitions as define
from agentspeed_kernels.reference import grouped
from agentspeed_kernels.registry import standard
from agentspeed_kernels.signature import KernelSpec
from agentspeed_kernels.testing.conformance import KINDS
from agentspeed_kernels.tiles import TilePlan, plan_tiles
from agentspeed_kernels.workspace import Workspace

PAGE, SHARED, ROWS = 48, 1200, 35
BOUND = {torch.float32: 1e-5, torch.bfloat16: 0.03}
"""Norm of the error over the norm of what the definition says."""


@pytest.fixture(autouse=True, params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def kernels(op: str) -> list[KernelSpec]:
    return [spec for spec in standard().candidates(op) if spec.device == "cpu" and "float64" not in spec.dtypes]


def fitting(spec: KernelSpec) -> torch.dtype:
    if spec.features - detect().features:
        pytest.skip(f"{spec} does not run here")
    return KINDS[next(iter(spec.dtypes))]


def plan() -> TilePlan:
    """Every other row of a step sees one long tile or a part of it; the others have a context of their own."""
    some, others = (np.arange(first, 2 * ROWS, 2, dtype=np.int32) for first in (0, 1))
    positions = np.empty(2 * ROWS, dtype=np.int64)
    positions[some], positions[others] = SHARED - ROWS + np.arange(ROWS), 600 + np.arange(ROWS)
    order = np.random.default_rng(5).permutation(40).astype(np.int32)
    runs = [
        Run(pages=order[:25], start=0, tokens=SHARED, queries=some, causal=True),
        Run(pages=order[25:], start=0, tokens=600 + ROWS, queries=others, causal=True),
    ]
    return plan_tiles(runs, positions, page_tokens=PAGE, chunk_tokens=2048, block_rows=512)


def growing(pool: torch.Tensor) -> torch.Tensor:
    """Keys further on are larger, so that the peak of a row's scores grows from block to block."""
    return pool * torch.linspace(0.3, 3, pool.shape[0]).view(-1, 1, 1)


def held(spec: KernelSpec, numbers: torch.Tensor, row: CacheRow) -> torch.Tensor:
    """A pool as the kernel takes it."""
    return row.coded(numbers) if spec.cache else numbers


def distance(out: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((out.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("shape", [(5, 72, 40, 24, 56), (2, 64, 128, 64, 128)])
@pytest.mark.parametrize("spec", kernels("mla_extend"), ids=str)
def test_latents_of_tiles_longer_than_a_block(spec: KernelSpec, shape: tuple[int, int, int, int, int]) -> None:
    kind, tiles = fitting(spec), plan()
    heads, rank, nope, rope, value = shape
    noise = torch.Generator().manual_seed(1)
    numbers = growing(torch.randn(40, PAGE, rank + rope, generator=noise)).to(kind)
    pool = held(spec, numbers, latent_row(rank, rope))
    key_up, value_up = (
        (torch.randn(heads, *each, generator=noise) * rank**-0.5).to(kind) for each in ((rank, nope), (value, rank))
    )
    q = torch.randn(2 * ROWS, heads, nope + rope, generator=noise).to(kind)
    out = torch.full((2 * ROWS, heads, value), float("nan"), dtype=kind)
    ups = [pack(each) if spec.layout == "tiles" else each for each in (key_up, value_up)]
    spec.call(q, pool, *ups, tiles, 0.3, Workspace(), out)
    assert distance(out, define.mla_extend(q, pool, key_up, value_up, tiles, 0.3)) < BOUND[kind]


@pytest.mark.parametrize(("heads", "groups", "width"), [(10, 2, 40), (4, 4, 128), (7, 1, 64)])
@pytest.mark.parametrize("spec", kernels("gqa_extend"), ids=str)
def test_grouped_heads_of_tiles_longer_than_a_block(spec: KernelSpec, heads: int, groups: int, width: int) -> None:
    kind, tiles = fitting(spec), plan()
    noise = torch.Generator().manual_seed(2)
    row = heads_row(groups, width)
    keys = held(spec, growing(torch.randn(40, PAGE, groups * width, generator=noise)).to(kind), row)
    values = held(spec, torch.randn(40, PAGE, groups * width, generator=noise).to(kind), row)
    q = torch.randn(2 * ROWS, heads, width, generator=noise).to(kind)
    out = torch.full((2 * ROWS, heads, width), float("nan"), dtype=kind)
    spec.call(q, keys, values, tiles, 0.3, Workspace(), out)
    wanted = grouped.gqa(q, keys, values, tiles, 0.3, torch.zeros(out.shape, dtype=torch.float64))
    assert distance(out, wanted) < BOUND[kind]

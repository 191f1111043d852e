"""Attention of few rows for numbers of pairs, heads and widths beyond the conformance cases: sets of 1 to 8 pairs and
what is left of them, heads that share a pass and that do not, rows that end within a step, of numbers and in 8 bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from agentspeed_engine.models.inputs import Run
from agentspeed_kernels.fp8_cache import CacheRow, heads_row, latent_row
from agentspeed_kernels.platform import detect
from agentspeed_kernels.reference import definitions as define
from agentspeed_kernels.reference import grouped
from agentspeed_kernels.registry import standard
from agentspeed_kernels.signature import KernelSpec
from agentspeed_kernels.testing.conformance import KINDS
from agentspeed_kernels.testing.tolerance import tolerance
from agentspeed_kernels.tiles import TilePlan, plan_tiles
from agentspeed_kernels.workspace import Workspace

PAGE, SHARED = 24, 150


def kernels(op: str) -> list[KernelSpec]:
    return [spec for spec in standard().candidates(op) if spec.features and spec.device == "cpu"]


def plan(rows: int) -> TilePlan:
    """Branches below a shared context of 150 tokens, each with tokens of its own, in pages of 24, cut at 70."""
    order = np.random.default_rng(3).permutation(-(-SHARED // PAGE) + rows).astype(np.int32)
    trunk = order[: -(-SHARED // PAGE)]
    shared = Run(pages=trunk, start=0, tokens=SHARED, queries=np.arange(rows, dtype=np.int32), causal=False)
    own = [
        Run(pages=order[trunk.size + row :][:1], start=SHARED, tokens=1 + row % PAGE, queries=np.array([row], np.int32),
            causal=False)
        for row in range(rows)
    ]  # fmt: skip
    at = np.array([SHARED + row % PAGE for row in range(rows)])
    return plan_tiles([shared, *own], at, page_tokens=PAGE, chunk_tokens=70, block_rows=32)


def pool(rows: int, width: int, kind: torch.dtype, seed: int) -> torch.Tensor:
    noise = torch.Generator().manual_seed(seed)
    return torch.randn(-(-SHARED // PAGE) + rows, PAGE, width, generator=noise).to(kind)


def fitting(spec: KernelSpec) -> torch.dtype:
    if spec.features - detect().features:
        pytest.skip(f"{spec} does not run here")
    return KINDS[next(iter(spec.dtypes))]


def held(spec: KernelSpec, numbers: torch.Tensor, row: CacheRow) -> torch.Tensor:
    """A pool as the kernel takes it."""
    return row.coded(numbers) if spec.cache else numbers


def assert_near(out: torch.Tensor, wanted: torch.Tensor, spec: KernelSpec) -> None:
    error = float((out.double() - wanted).abs().max() / wanted.abs().max())
    assert error <= tolerance(spec.op, next(iter(spec.dtypes)))


@pytest.mark.parametrize("shape", [(1, 1, 96), (3, 2, 40), (5, 1, 200), (6, 2, 64), (11, 3, 70), (9, 9, 128)], ids=str)
@pytest.mark.parametrize("spec", kernels("mla_rows"), ids=str)
def test_latents_of_any_width_meet_any_number_of_heads_and_rows(spec: KernelSpec, shape: tuple[int, int, int]) -> None:
    heads, rows, rank = shape
    kind, tiles, width = fitting(spec), plan(rows), rank + 16
    latents = held(spec, pool(rows, width, kind, 1), latent_row(rank, 16))
    q = torch.randn(rows, heads, width, generator=torch.Generator().manual_seed(2)).to(kind)
    out = torch.full((rows, heads, rank), float("nan"), dtype=kind)
    spec.call(q, latents, tiles, width**-0.5, Workspace(), out)
    assert_near(out, define.mla_rows(q, latents, tiles, width**-0.5, rank), spec)


@pytest.mark.parametrize(
    "shape",
    [(1, 5, 1, 64), (2, 3, 1, 128), (4, 2, 3, 128), (6, 2, 5, 80), (3, 1, 7, 32), (2, 5, 13, 40), (8, 1, 9, 128)],
    ids=str,
)
@pytest.mark.parametrize("spec", kernels("gqa_rows"), ids=str)
def test_heads_of_the_pools_of_any_width_are_shared_by_any_number(
    spec: KernelSpec, shape: tuple[int, int, int, int]
) -> None:
    each, groups, rows, width = shape
    kind, tiles, heads = fitting(spec), plan(rows), each * groups
    keys, values = (held(spec, pool(rows, groups * width, kind, seed), heads_row(groups, width)) for seed in (4, 5))
    q = torch.randn(rows, heads, width, generator=torch.Generator().manual_seed(6)).to(kind)
    out = torch.full((rows, heads, width), float("nan"), dtype=kind)
    spec.call(q, keys, values, tiles, width**-0.5, Workspace(), out)
    assert_near(out, grouped.gqa(q, keys, values, tiles, width**-0.5, torch.zeros_like(out)), spec)


@pytest.mark.parametrize("spec", kernels("mla_rows"), ids=str)
def test_a_score_that_outgrows_all_before_it_takes_the_sums_with_it(spec: KernelSpec) -> None:
    kind, tiles, heads, rank = fitting(spec), plan(1), 4, 64
    latents = pool(1, rank, kind, 7)
    q = torch.randn(1, heads, rank, generator=torch.Generator().manual_seed(8)).to(kind)
    pages = torch.from_numpy(np.concatenate([tile.pages for tile in tiles.tiles]))
    latents[pages[-1]] *= 4  # scores of the last tokens are some tens larger
    latents = held(spec, latents, latent_row(rank, 0))
    out = torch.full((1, heads, rank), float("nan"), dtype=kind)
    spec.call(q, latents, tiles, 1.0, Workspace(), out)
    assert_near(out, define.mla_rows(q, latents, tiles, 1.0, rank), spec)

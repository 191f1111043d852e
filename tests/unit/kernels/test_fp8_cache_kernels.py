"""The C kernels on pools in 8 bits: they write the bytes that the format says, and read the numbers those stand for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from agentspeed_engine.models.inputs import Run
from agentspeed_kernels.cpu import cache_kernels
from agentspeed_kernels.fp8_cache import heads_row, latent_row
from agentspeed_kernels.packing import pack
from agentspeed_kernels.platform import detect
from agentspeed_kernels.reference import definitions, grouped
from agentspeed_kernels.signature import KernelSpec
from agentspeed_kernels.testing.conformance import KINDS
from agentspeed_kernels.tiles import TilePlan, plan_tiles
from agentspeed_kernels.workspace import Workspace

TOKENS, PAGE, PAGES = 300, 48, 9
BOUND = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Norm of the error over the norm of what the definition says."""
JUNK = 9
"""A byte that stands in a pool before anything is written."""


def kernels(op: str) -> list[KernelSpec]:
    return [spec for spec in cache_kernels.SPECS if spec.op == op]


def fitting(spec: KernelSpec) -> torch.dtype:
    if spec.features - detect().features:
        pytest.skip(f"{spec} does not run here")
    return KINDS[next(iter(spec.dtypes))]


def drawn(kind: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(kind)


def hostile(rows: torch.Tensor) -> torch.Tensor:
    """[9 or more, ..., numbers] with nothing, the largest and the smallest numbers, what is none, what lies between two
    bytes of which neither is nearer, and what has the smallest scale."""
    rows = rows.clone()
    rows[0] = 0
    for index, size in enumerate((1e30, 1e-30, 1e-41), 1):
        rows[index] *= size
    rows[4, ..., 0], rows[5, ..., -1] = float("nan"), float("-inf")
    steps = torch.arange(126, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    between = (steps[1:] + steps[:-1]) / 2
    row = torch.cat([torch.tensor([448.0]), between, -between])
    count = min(rows.shape[-1], row.numel())
    rows[6, ..., :count], rows[7, ..., :count] = row[:count], row[-count:]
    rows[7, ..., 0] = -448
    rows[8] = 448 * torch.finfo(torch.float32).tiny
    return rows


def angles(kind: torch.dtype, rows: int, half: int) -> tuple[torch.Tensor, torch.Tensor]:
    turned = torch.linspace(0, 6, rows * half, dtype=torch.float64).view(rows, half)
    return turned.cos().to(kind), turned.sin().to(kind)


@pytest.mark.parametrize("shape", [(9, 23, 6), (40, 512, 64)])
@pytest.mark.parametrize("spec", kernels("latent_append"), ids=str)
def test_an_appended_latent_is_the_nearest_bytes_of_the_numbers(spec: KernelSpec, shape: tuple[int, int, int]) -> None:
    rows, rank, rope = shape
    kind, row = fitting(spec), latent_row(rank, rope)
    given = (hostile(drawn(kind, rows, rank + rope)), drawn(kind, rank), 1e-6, *angles(kind, rows, rope // 2))
    slots = torch.randperm(3 * rows, generator=torch.Generator().manual_seed(3))[:rows]
    numbers = torch.zeros(3 * rows, rank + rope, dtype=kind)
    pool = torch.full((3, rows, row.nbytes), JUNK, dtype=torch.uint8)
    spec.call(*given, slots, numbers.view(3, rows, -1))
    spec.call(*given, slots, pool)
    wanted = torch.full((3 * rows, row.nbytes), JUNK, dtype=torch.uint8)
    wanted[slots] = row.coded(numbers[slots])
    assert torch.equal(pool.view(3 * rows, -1), wanted)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("shape", [(9, 3, 20), (40, 2, 250)])
@pytest.mark.parametrize("spec", kernels("qkv_append"), ids=str)
def test_appended_keys_and_values_are_the_nearest_bytes_of_the_numbers(
    spec: KernelSpec, shape: tuple[int, int, int], normed: bool
) -> None:
    rows, groups, width = shape
    kind, row = fitting(spec), heads_row(groups, width)
    gain = drawn(kind, width) if normed else None
    given = (hostile(drawn(kind, rows, 4 * groups, width)), gain, gain, 1e-6, *angles(kind, rows, width // 2))
    slots = torch.randperm(3 * rows, generator=torch.Generator().manual_seed(3))[:rows]
    numbers = [torch.zeros(3, rows, groups * width, dtype=kind) for _ in range(2)]
    pools = [torch.full((3, rows, row.nbytes), JUNK, dtype=torch.uint8) for _ in range(2)]
    for held in (numbers, pools):
        spec.call(*given, slots, torch.empty(rows, 2 * groups, width, dtype=kind), *held)
    for pool, meant in zip(pools, numbers, strict=True):
        wanted = torch.full((3 * rows, row.nbytes), JUNK, dtype=torch.uint8)
        wanted[slots] = row.coded(meant.view(3 * rows, -1)[slots])
        assert torch.equal(pool.view(3 * rows, -1), wanted)


def distance(out: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((out.double() - wanted.double()).norm() / wanted.double().norm())


def assert_same(spec: KernelSpec, out: torch.Tensor, of_numbers: torch.Tensor) -> None:
    """The same bits; on vectors rows may stay bytes, so that scales are rounded with shares instead of with numbers."""
    if spec.name.startswith(("amx", "avx512bf16")) and spec.op.endswith("_rows"):
        assert distance(out, of_numbers) < 8e-3
    else:
        assert torch.equal(out, of_numbers)


def plan(rows: int) -> TilePlan:
    """The last rows of a context in scattered pages, each seeing one token more than the one before."""
    order = np.random.default_rng(1).permutation(PAGES).astype(np.int32)
    run = Run(pages=order, start=0, tokens=TOKENS, queries=np.arange(rows, dtype=np.int32), causal=True)
    positions = np.arange(rows) + TOKENS - rows
    return plan_tiles([run], positions, page_tokens=PAGE, chunk_tokens=130, block_rows=32)


@pytest.mark.parametrize("shape", [(1, 4, 32, 16), (3, 3, 23, 6), (9, 8, 512, 64), (35, 5, 72, 24)])
@pytest.mark.parametrize("spec", [*kernels("mla_rows"), *kernels("mla_extend")], ids=str)
def test_latents_in_8_bits_give_the_bits_of_the_numbers_they_stand_for(
    spec: KernelSpec, shape: tuple[int, int, int, int]
) -> None:
    rows, heads, rank, rope = shape
    kind, row, tiles = fitting(spec), latent_row(rank, rope), plan(rows)
    pool = row.coded(3 * drawn(kind, PAGES, PAGE, rank + rope))
    nope, value = 24, 40
    ups = [drawn(kind, heads, rank, nope), drawn(kind, heads, value, rank)] if spec.op == "mla_extend" else []
    laid = [pack(up) if spec.layout == "tiles" else up for up in ups]
    q = drawn(kind, rows, heads, (nope if ups else rank) + rope)
    outs = [torch.full((rows, heads, value if ups else rank), float("nan"), dtype=kind) for _ in range(2)]
    for held, out in zip((pool, row.decoded(pool, kind)), outs, strict=True):
        spec.call(q, held, *laid, tiles, 0.1, Workspace(), out)
    assert_same(spec, *outs)


@pytest.mark.parametrize("shape", [(1, 4, 4, 16), (3, 6, 3, 20), (9, 16, 8, 128), (35, 10, 2, 40), (1, 7, 1, 64)])
@pytest.mark.parametrize("spec", [*kernels("gqa_rows"), *kernels("gqa_extend")], ids=str)
def test_heads_in_8_bits_give_the_bits_of_the_numbers_they_stand_for(
    spec: KernelSpec, shape: tuple[int, int, int, int]
) -> None:
    rows, heads, groups, width = shape
    kind, row, tiles = fitting(spec), heads_row(groups, width), plan(rows)
    pools = [row.coded(drawn(kind, PAGES, PAGE, groups * width) + side) for side in (0, 1)]
    q = drawn(kind, rows, heads, width)
    outs = [torch.full((rows, heads, width), float("nan"), dtype=kind) for _ in range(2)]
    for held, out in zip((pools, [row.decoded(pool, kind) for pool in pools]), outs, strict=True):
        spec.call(q, *held, tiles, 0.1, Workspace(), out)
    assert_same(spec, *outs)


def uneven(kind: torch.dtype, *shape: int) -> torch.Tensor:
    """Tokens of all sizes from a thousandth to one, each in its place."""
    order = torch.randperm(PAGE, generator=torch.Generator().manual_seed(4))
    return drawn(kind, *shape) * torch.logspace(-3, 0, PAGE)[order].view(-1, 1).to(kind)


@pytest.mark.parametrize("shape", [(1, 1, 64, 0), (1, 2, 128, 32), (1, 3, 64, 64), (2, 4, 192, 64), (1, 8, 512, 64)])
@pytest.mark.parametrize("spec", kernels("mla_rows"), ids=str)
def test_each_latent_has_its_own_scale(spec: KernelSpec, shape: tuple[int, int, int, int]) -> None:
    rows, heads, rank, rope = shape
    kind, tiles = fitting(spec), plan(rows)
    pool = latent_row(rank, rope).coded(uneven(kind, PAGES, PAGE, rank + rope))
    q = 3 * drawn(kind, rows, heads, rank + rope)
    out = torch.full((rows, heads, rank), float("nan"), dtype=kind)
    spec.call(q, pool, tiles, 0.1, Workspace(), out)
    assert distance(out, definitions.mla_rows(q, pool, tiles, 0.1, rank)) < BOUND[kind]


@pytest.mark.parametrize("shape", [(1, 3, 3, 64), (1, 4, 2, 128), (1, 8, 2, 64), (2, 8, 2, 192), (1, 30, 3, 64)])
@pytest.mark.parametrize("spec", kernels("gqa_rows"), ids=str)
def test_each_head_of_keys_and_of_values_has_its_own_scale(spec: KernelSpec, shape: tuple[int, int, int, int]) -> None:
    rows, heads, groups, width = shape
    kind, row, tiles = fitting(spec), heads_row(groups, width), plan(rows)
    of_head = torch.logspace(0, -1, groups).repeat_interleave(width).to(kind)
    numbers = uneven(kind, PAGES, PAGE, groups * width) * of_head
    keys, values = row.coded(numbers), row.coded(numbers.flip(1))
    q = 3 * drawn(kind, rows, heads, width)
    out = torch.full((rows, heads, width), float("nan"), dtype=kind)
    spec.call(q, keys, values, tiles, 0.1, Workspace(), out)
    assert distance(out, grouped.gqa(q, keys, values, tiles, 0.1, torch.zeros_like(out))) < BOUND[kind]

"""Rows of the KV cache in 8 bits: what their bytes stand for, and where in a row they are."""

from __future__ import annotations

import pytest
import torch

from agentspeed_kernels.fp8_cache import CacheRow, heads_in, heads_row, latent_row

ROWS = (latent_row(512, 64), latent_row(40, 6), heads_row(8, 128), heads_row(3, 20))
FORMATS = (torch.float32, torch.float64, torch.bfloat16)


def test_a_row_of_deepseek_latents_takes_656_bytes_and_each_part_is_aligned() -> None:
    row = latent_row(512, 64)
    assert (row.scales_at, row.plain_at, row.nbytes) == (512, 528, 656)
    for other in ROWS:
        assert other.scales_at % 16 == other.plain_at % 16 == other.nbytes % 16 == 0


@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_what_is_read_is_within_a_sixteenth_of_each_number_or_a_step_of_its_head(
    row: CacheRow, dtype: torch.dtype
) -> None:
    values = torch.randn(5, 4, row.numbers, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)
    held = row.coded(values)
    assert held.dtype == torch.uint8 and held.shape == (5, 4, row.nbytes)
    read, heads = row.decoded(held, torch.float64), row.heads * row.width
    step = values[..., :heads].double().abs().amax() / 448 * 2**-9
    assert bool(((read - values.double()).abs() <= values.double().abs() / 16 * 1.01 + step).all())
    assert torch.equal(read[..., heads:], values[..., heads:].bfloat16().double())


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_what_was_read_is_coded_to_the_same_numbers_again(row: CacheRow) -> None:
    values = torch.randn(7, row.numbers, generator=torch.Generator().manual_seed(4))
    read = row.decoded(row.coded(values), torch.float32)
    torch.testing.assert_close(row.decoded(row.coded(read), torch.float32), read, rtol=3e-7, atol=0)


def test_zeros_are_read_as_zeros_and_fresh_memory_is_finite() -> None:
    row = heads_row(2, 16)
    assert not row.decoded(row.coded(torch.zeros(3, row.numbers)), torch.float32).any()
    assert not row.decoded(torch.zeros(3, row.nbytes, dtype=torch.uint8), torch.float32).any()


def test_numbers_too_small_for_a_scale_that_has_a_reciprocal_are_zeros() -> None:
    row, least = heads_row(2, 16), 448 * torch.finfo(torch.float32).tiny
    values = torch.full((1, row.numbers), least)
    values[0, 16:] *= 0.99
    read = row.decoded(row.coded(values), torch.float64)[0]
    assert bool((read[:16] == least).all()) and not read[16:].any()


def test_a_number_that_is_not_finite_spoils_its_head_and_no_other() -> None:
    row = heads_row(2, 16)
    values = torch.ones(1, row.numbers)
    values[0, 3] = float("inf")
    read = row.decoded(row.coded(values), torch.float32)[0]
    assert bool(read[:16].isnan().all()) and bool((read[16:] == 1).all())


@pytest.mark.parametrize("width", [16, 20, 64, 128])
def test_bytes_of_a_row_say_how_many_heads_it_has(width: int) -> None:
    for heads in range(1, 40):
        assert heads_in(heads_row(heads, width).nbytes, width) == heads_row(heads, width)


def test_bytes_that_no_number_of_heads_takes_are_refused_and_so_are_heads_that_several_would() -> None:
    with pytest.raises(ValueError, match="no number of heads of 64 takes 100 bytes"):
        heads_in(100, 64)
    with pytest.raises(ValueError, match="no number of heads of 8 takes"):
        heads_in(heads_row(2, 8).nbytes, 8)

"""Pools that steps stream through lie in large pages of the kernel's; what is small, or not written, takes no more."""

from __future__ import annotations

import gc

import pytest
import torch

from agentspeed_engine.models.kv_layout import KvLayout, KvPool
from agentspeed_engine.models.kv_pools import KvPools
from agentspeed_engine.models.memory import LARGE_PAGE
from tests.support.large_pages import NEEDS_LARGE_PAGES, advised, mapped, resident

PAGE = 64
NOISE = 8 << 20
"""Bytes that other work of the process may take meanwhile."""

pytestmark = NEEDS_LARGE_PAGES


def pools(width: int, pages: int) -> KvPools:
    layout = KvLayout(
        pools=tuple(KvPool(name=name, layers=2, width=width, dtype="float32") for name in ("key", "value"))
    )
    return KvPools(layout, pages, PAGE)


def test_a_pool_whose_layers_are_wide_and_long_lies_in_large_pages() -> None:
    for pool in pools(width=512, pages=128).tensors:
        pool.fill_(1.0)
        assert pool.data_ptr() % LARGE_PAGE == 0
        assert advised(pool.data_ptr()) and advised(pool.data_ptr() + pool.nbytes - 1)
        # Where memory is scattered the kernel may give fewer than all.
        assert int(mapped(pool.data_ptr())["AnonHugePages"].split()[0]) > 0


def test_what_is_not_written_takes_no_memory_and_the_first_page_one_large_page_a_layer() -> None:
    before = resident()
    held = pools(width=512, pages=1024).tensors
    assert resident() - before < NOISE
    for pool in held:
        pool[:, 0] = 1.0
    layers = sum(pool.shape[0] for pool in held)
    assert resident() - before < layers * LARGE_PAGE + NOISE


def test_reading_what_is_not_written_gives_zeros_and_takes_no_memory() -> None:
    pool, _ = pools(width=512, pages=1024).tensors
    before = resident()
    assert not bool(pool.view(torch.uint8).any())
    assert resident() - before < pool.nbytes / 4


@pytest.mark.parametrize(("width", "pages"), [(112, 16_384), (512, 16)], ids=["narrow rows", "few pages"])
def test_a_small_models_pool_takes_memory_in_small_pages(width: int, pages: int) -> None:
    pool, _ = pools(width, pages).tensors
    assert not advised(pool.data_ptr() + pool.nbytes // 2)


def test_memory_goes_back_with_the_pool() -> None:
    held = pools(width=512, pages=512)
    before = resident()
    for pool in held.tensors:
        pool.fill_(1.0)
    written = sum(pool.nbytes for pool in held.tensors)
    assert resident() - before > written - NOISE
    del pool, held
    gc.collect()
    assert resident() - before < NOISE

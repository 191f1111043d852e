"""Ranks that share memory get the same sums, bit for bit, and hear of it when one does not come."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import pytest
import torch

from agentspeed_kernels.cpu import native, recording
from agentspeed_kernels.cpu.group_layout import SLOT_BYTES, shared_bytes
from agentspeed_kernels.cpu.process_group import GroupBroken, SharedGroup

T = TypeVar("T")
pytestmark = pytest.mark.skipif(isinstance(native.library(), native.Unavailable), reason="needs the C library")
RANKS = 3


@pytest.fixture
def groups() -> Iterator[list[SharedGroup]]:
    file = os.memfd_create("group")
    os.truncate(file, shared_bytes(RANKS))
    yield [SharedGroup(file, rank, RANKS, seconds=0.3) for rank in range(RANKS)]
    os.close(file)


def on_all(groups: list[SharedGroup], call: Callable[[SharedGroup], T]) -> list[T]:
    """Each rank is a thread: to the memory they are as good as processes."""
    with ThreadPoolExecutor(len(groups)) as pool:
        return list(pool.map(call, groups))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 5, SLOT_BYTES // 4 + 3])
def test_all_ranks_get_one_sum(groups: list[SharedGroup], dtype: torch.dtype, count: int) -> None:
    """Also of more than a slot holds, and of one sum after the other."""
    noise = torch.Generator().manual_seed(count)
    parts = [torch.randn(count, generator=noise, dtype=torch.float32).to(dtype) for _ in groups]

    def summed(group: SharedGroup) -> torch.Tensor:
        value = parts[group.rank].clone()
        for _ in range(3):
            value.copy_(parts[group.rank])
            group.sum(value)
        return value

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    wanted = parts[0].to(wide)
    for part in parts[1:]:
        wanted = wanted + part.to(wide)
    for got in on_all(groups, summed):
        assert torch.equal(got, wanted.to(dtype)), "in the order of the ranks, rounded once"


def test_a_sum_can_be_part_of_a_recorded_step(groups: list[SharedGroup]) -> None:
    values = [torch.full((4,), float(rank + 1)) for rank in range(RANKS)]

    def repeated(group: SharedGroup) -> None:
        with recording.recording() as tape:
            group.sum(values[group.rank])
        values[group.rank].fill_(10.0 * (group.rank + 1))
        tape.run()
        group.check()

    _ = on_all(groups, repeated)
    assert [value.tolist() for value in values] == [[60.0] * 4] * RANKS


def test_every_rank_hears_what_all_gave(groups: list[SharedGroup]) -> None:
    given = [np.arange(6.0).reshape(2, 3) + rank for rank in range(RANKS)]
    for heard in on_all(groups, lambda group: group.gather(given[group.rank])):
        assert np.array_equal(heard, np.stack(given))
    assert all(heard.shape == (RANKS, 0) for heard in on_all(groups, lambda group: group.gather(np.zeros(0))))
    assert groups[0].waited(0) >= 0


def test_a_rank_that_does_not_come_is_named_to_all_and_later_calls_fail_at_once(groups: list[SharedGroup]) -> None:
    def late(group: SharedGroup) -> int | None:
        with pytest.raises(GroupBroken) as broken:
            group.sum(torch.ones(2))
        return broken.value.late

    assert on_all(groups[:2], late) == [2, 2]
    assert late(groups[2]) == 2


def test_ranks_that_wait_give_up_when_one_abandons_the_group(groups: list[SharedGroup]) -> None:
    def gathered(group: SharedGroup) -> str:
        if group.rank == 2:
            group.abandon()
            return ""
        with pytest.raises(GroupBroken) as broken:
            _ = group.gather(np.zeros(1))
        return str(broken.value)

    assert on_all(groups, gathered) == ["a rank gave up"] * 2 + [""]


def test_ranks_that_do_different_things_are_found_out(groups: list[SharedGroup]) -> None:
    def apart(group: SharedGroup) -> None:
        with pytest.raises(GroupBroken, match="different things"):
            group.sum(torch.ones(3 if group.rank else 2))

    _ = on_all(groups, apart)

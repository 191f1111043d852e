"""Ranks of two axes in shared memory: every collective gives what its definition gives, and who is late is named."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from agentspeed_engine.exec.ranks.group import GroupBroken, SharedMemory
from agentspeed_engine.spmd.logical import apply_collective
from agentspeed_engine.spmd.placement import FEATURES, TOKENS, Axis, Mesh
from agentspeed_engine.spmd.plan import Collective, Kind
from agentspeed_kernels.cpu import native
from agentspeed_kernels.cpu.group_layout import shared_bytes

pytestmark = pytest.mark.skipif(
    not isinstance(native.library(), native.Library), reason="ranks share memory through the C library"
)
MESH, WIDTH = Mesh(dp=2, tp=2), 6


def step(kind: Kind, axis: Axis, dim: int) -> Collective:
    return Collective(kind=kind, axis=axis, value="x", dim=dim, width=WIDTH, between=("a", "b"))


def opened(mesh: Mesh, files: Sequence[int], seconds: float) -> list[SharedMemory]:
    """`files`: of each dp rank, then of each place in them."""
    return [
        SharedMemory(files[rank.dp], rank, seconds=seconds, dp_file=files[mesh.dp + rank.tp]) for rank in mesh.ranks()
    ]


@pytest.fixture
def files() -> Iterator[list[int]]:
    made = [os.memfd_create("ranks") for _ in range(MESH.dp + MESH.tp)]
    for file in made:
        os.truncate(file, shared_bytes(2))
    yield made
    for file in made:
        os.close(file)


@pytest.mark.parametrize("sizes", [(3, 2), (4, 0), (0, 1), (0, 0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_collectives_of_uneven_and_empty_dp_ranks_are_as_defined(
    files: list[int], sizes: tuple[int, int], dtype: torch.dtype
) -> None:
    groups = opened(MESH, files, 30.0)
    noise = torch.Generator().manual_seed(1)
    whole = sum(sizes)

    def check(one: Collective, rows: Sequence[int], width: int = WIDTH) -> None:
        held = [torch.randint(-8, 8, (count, width), generator=noise).to(dtype) for count in rows]
        wanted = apply_collective(one, held, MESH, sizes)
        with ThreadPoolExecutor(MESH.size) as pool:
            got = list(
                pool.map(lambda rank: groups[rank].comm.apply(one, held[rank].clone(), sizes), range(MESH.size))  # type: ignore[union-attr]
            )
        for mine, other in zip(got, wanted, strict=True):
            assert torch.equal(mine, other)

    own = [sizes[rank.dp] for rank in MESH.ranks()]
    check(step("all_gather", "dp", TOKENS), own)
    check(step("all_reduce", "tp", 0), own)
    check(step("all_gather", "tp", FEATURES), own, WIDTH // 2)
    check(step("reduce_scatter", "dp", TOKENS), [whole] * MESH.size)
    check(step("slice", "dp", TOKENS), [whole] * MESH.size)


def test_a_rank_that_does_not_come_is_named_by_its_number_among_all(files: list[int]) -> None:
    """Rank 3 is the second of its dp rank, and of those at its place."""
    groups = opened(MESH, files, 0.05)
    with pytest.raises(GroupBroken) as broken:
        _ = groups[2].gather(torch.ones(1).double().numpy())
    assert broken.value.late == 3
    with pytest.raises(GroupBroken) as broken:
        assert groups[1].comm is not None
        _ = groups[1].comm.apply(step("all_reduce", "dp", 0), torch.ones(1, WIDTH), (1, 1))
    assert broken.value.late == 3


def test_a_rank_of_a_dp_rank_by_itself_is_named_by_its_number_among_all(files: list[int]) -> None:
    group = SharedMemory(files[0], Mesh(tp=2).rank(0), seconds=0.05, first=2)
    with pytest.raises(GroupBroken, match="rank 3 did not come in time") as broken:
        _ = group.gather(torch.ones(1).double().numpy())
    assert broken.value.late == 3

"""Sums and gathers in memory that several GPUs write: the numbers, and what a rank that is given up leaves behind."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tests.triton_interpreter as _interpreter  # noqa: F401 - before any kernel
from agentspeed_kernels.triton import ipc
from agentspeed_kernels.triton.device_code import device_code
from agentspeed_kernels.triton.kernels import own
from agentspeed_kernels.triton.peers import MEETINGS, WORDS, PeerMemory, reached

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")

CPU = torch.device("cpu")
RANKS, ROWS = 3, 4


def memories(columns: int = 6, dtype: torch.dtype = torch.float32) -> list[PeerMemory]:
    row = RANKS * columns * dtype.itemsize
    made = [PeerMemory(rank, RANKS, CPU, sum_bytes=16 * WORDS, rows=ROWS, row_bytes=row) for rank in range(RANKS)]
    for one in made:
        one.reach([other.block.data_ptr() for other in made])
    return made


def words(memory: PeerMemory) -> Tensor:
    return memory.block[: memory.block.numel() // 8 * 8].view(torch.int64)


def come(memory: PeerMemory, rank: int, x: Tensor, count: int) -> None:
    """As if `rank` had sent `x` for call `count`."""
    held = x.view(-1).view(torch.int32).numpy().astype(np.int64) & 0xFFFFFFFF
    for part in range(-(-held.size // WORDS)):
        sent = held[part * WORDS : (part + 1) * WORDS]
        at = MEETINGS + ((part * 2 + count % 2) * RANKS + rank) * WORDS
        words(memory)[at : at + sent.size] = torch.from_numpy((count << 32) | sent)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 40), (3, 500)])
def test_every_rank_adds_what_came_for_this_call_in_the_order_of_the_ranks(
    dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    noise, ranks = torch.Generator().manual_seed(0), memories()
    for count in (1, 2, 3):
        given = [torch.randn(shape, generator=noise).to(dtype) for _ in ranks]
        wanted = (given[0].float() + given[1].float() + given[2].float()).to(dtype)
        for one in ranks:
            for rank, x in enumerate(given):
                if rank != one.rank:
                    come(one, rank, x, count)
        for one in ranks:
            assert one.sums(given[one.rank])
            total = given[one.rank].clone()
            one.sum(total, total)
            rounding = 0 if dtype is torch.float32 else 1e-2  # the interpreter rounds to bfloat16 in its own way
            assert torch.allclose(total.float(), wanted.float(), rtol=rounding, atol=0)


def test_a_rank_sends_its_numbers_with_the_count_of_the_call_to_all_others() -> None:
    ranks = memories()
    x = torch.tensor([[1.5, -2.0, 3.25]])
    for one in ranks[1:]:
        come(ranks[0], one.rank, x, 1)
    ranks[0].sum(x, torch.empty_like(x))
    for one in ranks[1:]:
        sent = words(one)[MEETINGS + RANKS * WORDS :][:3].numpy()
        assert (sent >> 32).tolist() == [1, 1, 1]
        assert (sent & 0xFFFFFFFF).astype(np.uint32).view(np.float32).tolist() == x[0].tolist()


def test_who_waits_for_a_rank_that_never_comes_goes_on_when_it_is_given_up_and_names_it() -> None:
    ranks = memories()
    x = torch.ones(1, 4)
    come(ranks[0], 1, x, 1)
    assert ranks[0].late is None and not ranks[0].given_up
    ranks[0].give_up()
    ranks[0].sum(x, torch.empty_like(x))
    assert ranks[0].given_up and ranks[0].late == 2


@pytest.mark.parametrize("met", [0, 1, 2**31 - 2, 2**31 - 1, 2**32 - 1])
def test_a_rank_waits_at_a_meeting_for_who_has_not_come_however_often_they_have_met(met: int) -> None:
    def signed(number: int) -> int:
        return (number + 2**31) % 2**32 - 2**31

    for ahead, waited_for in ((0, 1 + 1), (1, 0), (2, 0)):
        memory, count = torch.zeros(MEETINGS, dtype=torch.int64), torch.tensor([signed(met)], dtype=torch.int32)
        memory[1] = signed(met + ahead)
        table = torch.tensor([memory.data_ptr()] * 2)
        over = torch.tensor([1, 0], dtype=torch.int32)  # given up: who waits says so and goes on
        device_code("peers").meet[(1,)](table, over, count, RANK=0, RANKS=2)
        assert over[1] == waited_for and count[0] == signed(met + 1)


def test_a_rank_that_finds_a_sum_wrong_still_makes_all_that_the_others_wait_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sums = 0

    def wrong(memory: PeerMemory, x: Tensor, out: Tensor) -> None:
        nonlocal sums
        sums += 1
        out.zero_()

    one = memories()[0]
    monkeypatch.setattr(ipc, "offered", lambda held: bytes([1]) * ipc.OFFER_BYTES)
    monkeypatch.setattr(ipc, "MappedMemory", lambda offer: SimpleNamespace(at=one.block.data_ptr(), close=lambda: None))
    monkeypatch.setattr(PeerMemory, "sum", wrong)
    monkeypatch.setattr(PeerMemory, "gather", lambda memory, x: x.repeat(1, RANKS))
    assert "wrong" in str(reached(one, lambda mine: [mine] * RANKS, seconds=1.0))
    assert sums == 4


class Driver:
    """As much of CUDA's as handles of memory need: a handle is the address, and nothing is reached."""

    def __init__(self, refused: int | None = None) -> None:
        """`refused`: whose memory is not let into."""
        self.open: list[int] = []
        self.contexts = [7]
        self._refused = refused

    def cuMemGetAddressRange_v2(self, base: Any, size: Any, at: Any) -> int:
        base.contents.value = at.value
        return 0

    def cuIpcGetMemHandle(self, handle: Any, base: Any) -> int:
        handle.contents.data[:8] = base.value.to_bytes(8, "little")
        return 0

    def cuCtxGetCurrent(self, context: Any) -> int:
        context.contents.value = self.contexts[-1]
        return 0

    def cuCtxPushCurrent_v2(self, context: Any) -> int:
        self.contexts.append(context.value)
        return 0

    def cuCtxPopCurrent_v2(self, context: Any) -> int:
        context.contents.value = self.contexts.pop()
        return 0

    def cuIpcOpenMemHandle_v2(self, base: Any, handle: Any, how: Any) -> int:
        at = int.from_bytes(bytes(handle.data[:8]), "little")
        if at == self._refused:
            return 217
        base.contents.value = at
        self.open.append(at)
        return 0

    def cuIpcCloseMemHandle(self, base: Any) -> int:
        assert self.contexts[-1] == 7, "the GPU that it was opened for is the thread's"
        self.open.remove(base.value)
        return 0


@pytest.fixture
def blocks() -> list[PeerMemory]:
    row = RANKS * 6 * 4
    return [PeerMemory(rank, RANKS, CPU, sum_bytes=16 * WORDS, rows=ROWS, row_bytes=row) for rank in range(RANKS)]


def test_the_memory_of_others_is_let_go_of_from_whatever_thread(
    blocks: list[PeerMemory], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver()
    monkeypatch.setattr(ipc, "driver", lambda: driver)
    blocks[1].open([ipc.offered(one.block) for one in blocks])
    assert blocks[1].reaches and driver.open == [blocks[0].block.data_ptr(), blocks[2].block.data_ptr()]
    driver.contexts = [0]  # of a thread that never used a GPU
    blocks[1].close()
    assert driver.open == [] and driver.contexts == [0] and not blocks[1].reaches
    blocks[1].close()  # once more is no fault


def test_what_was_opened_before_a_gpu_did_not_let_others_in_is_let_go_of_too(
    blocks: list[PeerMemory], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(refused=blocks[2].block.data_ptr())
    monkeypatch.setattr(ipc, "driver", lambda: driver)
    with pytest.raises(ipc.NoAccess, match="error 217"):
        blocks[0].open([ipc.offered(one.block) for one in blocks])
    assert driver.open == [blocks[1].block.data_ptr()]
    blocks[0].close()
    assert driver.open == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_of_rows_lie_side_by_side_on_every_rank(dtype: torch.dtype) -> None:
    ranks = memories(columns=6, dtype=dtype)
    parts = [torch.arange(12).view(2, 6).to(dtype) + 100 * one.rank for one in ranks]
    for one in ranks:
        for other in ranks:
            words(one)[other.rank] = 1  # it has come
    for one, part in zip(ranks, parts, strict=True):
        assert one.gathers(part)
        one.gather(part)
    for one in ranks:
        for other in ranks:
            words(one)[other.rank] = 2
    for one, part in zip(ranks, parts, strict=True):
        assert torch.equal(one.gather(part), torch.cat(parts, 1))


@pytest.mark.parametrize(
    "x",
    [torch.zeros(0, 4), torch.zeros(1, 5 * WORDS), torch.zeros(2, 4).double(), torch.zeros(4, 2).T,
     torch.zeros(1, 3, dtype=torch.bfloat16)],
    ids=["none", "too many", "float64", "strided", "half a word"],
)  # fmt: skip
def test_other_values_are_left_to_who_sums_anything(x: Tensor) -> None:
    assert not memories()[0].sums(x)
    assert not memories()[0].gathers(torch.zeros(ROWS + 1, 6)) and not memories()[0].gathers(torch.zeros(1, 5))


def test_choices_of_experts_that_lie_elsewhere_are_nobodys_and_weigh_nothing() -> None:
    ids = torch.tensor([[0, 5, 7], [4, 3, 8]])  # the id 8 is nobody's among eight
    weights = torch.full((2, 3), 0.5)
    own(ids, weights, 4, 4)
    assert ids.tolist() == [[4, 1, 3], [0, 4, 4]]
    assert weights.tolist() == [[0.0, 0.5, 0.5], [0.5, 0.0, 0.0]]

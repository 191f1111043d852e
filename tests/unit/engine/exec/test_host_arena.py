"""Pages go to host slots and come back as they were, on every device this machine has."""

from __future__ import annotations

import pytest
import torch

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.exec.arena import HostArena
from agentspeed_engine.exec.executor import CopyFailed

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def pool(request: pytest.FixtureRequest) -> torch.Tensor:
    """[3 layers, 9 pages, 4 tokens, width 5], every value its own."""
    return torch.arange(3.0 * 9 * 4 * 5, device=request.param).view(3, 9, 4, 5)


def test_pages_come_back_bit_for_bit_into_other_pages_and_nothing_else_changes(pool: torch.Tensor) -> None:
    arena, before = HostArena([pool], 4), pool.clone()
    arena.save([7, 2, 5], [3, 0, 1])
    pool[:, [2, 5, 7]] = -1
    arena.load([0, 3], [8, 4])
    assert (pool[:, [8, 4]] == before[:, [2, 7]]).all()
    assert (pool[:, [2, 5, 7]] == -1).all()
    assert (pool[:, [0, 1, 3, 6]] == before[:, [0, 1, 3, 6]]).all()


def test_a_slot_keeps_the_last_page_that_was_saved_to_it(pool: torch.Tensor) -> None:
    arena, before = HostArena([pool], 1), pool.clone()
    arena.save([1], [0])
    arena.save([6], [0])
    arena.load([0], [3])
    assert (pool[:, 3] == before[:, 6]).all()


def test_a_copy_that_breaks_is_named_and_the_next_one_works(
    pool: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    arena, before = HostArena([pool], 2), pool.clone()
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "copy_", _breaks)
        with pytest.raises(CopyFailed, match="planted"):
            arena.save([1], [0])
    arena.save([1], [0])
    arena.load([0], [2])
    assert (pool[:, 2] == before[:, 1]).all()


def test_more_slots_than_the_machine_has_memory_for_are_refused(pool: torch.Tensor) -> None:
    with pytest.raises(EngineFault, match=str(2**40)) as refused:
        HostArena([pool], 2**40)
    assert refused.value.code == "out_of_memory"


def _breaks(*_: object, **__: object) -> None:
    raise RuntimeError("planted")

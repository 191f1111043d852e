"""Ranks over torch.distributed: one that hangs is seen by the deadline, in sums of the plan as in what is drawn."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.exec.ranks.group import GroupBroken, TorchGroup
from agentspeed_engine.spmd.distributed import DistributedComm
from agentspeed_engine.spmd.placement import Mesh
from agentspeed_engine.spmd.plan import Collective
from agentspeed_kernels.triton import peers

CPU = torch.device("cpu")
SUM = Collective(kind="all_reduce", axis="tp", value="x", dim=0, width=3, between=("partial", "whole"))
OTHER = """
import sys
sys.path[:0] = {paths!r}
from pathlib import Path
import torch
from agentspeed_engine.exec.ranks.group import TorchGroup
from agentspeed_engine.spmd.placement import Mesh
group = TorchGroup(Path(sys.argv[1]), Mesh(tp=2).rank(1), seconds=60, device=torch.device("cpu"))
sys.stdin.read()
"""


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[TorchGroup]:
    group = TorchGroup(tmp_path, Mesh(tp=1).rank(0), seconds=5, device=CPU)
    yield group
    group.close()


def test_a_rank_that_does_not_come_to_a_sum_breaks_the_group_by_the_deadline(tmp_path: Path) -> None:
    """The deadline is not that of the start: the other rank takes longer than it to get there."""
    code = OTHER.format(paths=[path for path in sys.path if path])
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE) as other:
        try:
            group = TorchGroup(tmp_path, Mesh(tp=2).rank(0), seconds=1, device=CPU)
            try:
                with pytest.raises(GroupBroken):
                    _ = group.comm.apply(SUM, torch.ones(3), ())
            finally:
                group.close()
        finally:
            other.kill()


def test_a_closed_group_leaves_room_for_another_and_an_open_one_is_named(alone: TorchGroup, tmp_path: Path) -> None:
    with pytest.raises(EngineFault, match="has a default group"):
        _ = TorchGroup(tmp_path, Mesh(tp=1).rank(0), seconds=5, device=CPU)
    alone.close()
    (tmp_path / "meet").unlink(missing_ok=True)
    TorchGroup(tmp_path, Mesh(tp=1).rank(0), seconds=5, device=CPU).close()
    assert not dist.is_initialized()


@pytest.mark.parametrize("reached", [None, "sums are wrong"], ids=["of an engine that ends", "that was not used"])
def test_the_memory_of_other_gpus_is_let_go_of(
    alone: TorchGroup, monkeypatch: pytest.MonkeyPatch, reached: str | None
) -> None:
    closed: list[bool] = []

    class Held:
        given_up = False

        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def close(self) -> None:
            closed.append(dist.is_initialized())

    monkeypatch.setattr(peers, "PeerMemory", Held)
    monkeypatch.setattr(peers, "reached", lambda held, gather, seconds: reached)
    monkeypatch.setattr(alone, "_device", torch.device("cuda"))
    assert alone.reach(sum_bytes=8, rows=1, row_bytes=8) == reached
    assert closed == ([] if reached is None else [True])
    alone.close()
    assert closed == [reached is not None], "after the last sum of the others has ended"


def test_a_module_that_fails_beside_a_sum_is_no_lost_rank(alone: TorchGroup) -> None:
    class Fails:
        boundary: Any = None

        def __call__(self, x: torch.Tensor, residual: torch.Tensor | None, state: Any) -> Any:
            raise RuntimeError("shapes differ")

    assert isinstance(alone.comm, DistributedComm)
    with pytest.raises(RuntimeError, match="shapes differ"):
        _ = alone.comm.sum_call(SUM, Fails(), torch.ones(2), torch.ones(2), None, ())

"""Which way a value takes on GPUs that write into each other's memory: its shape and format alone say."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from agentspeed_engine.spmd.peer_comm import PeerComm
from agentspeed_engine.spmd.plan import Collective

SUM = Collective(kind="all_reduce", axis="tp", value="x", dim=0, width=4, between=("a", "b"))
GATHER = Collective(kind="all_gather", axis="tp", value="x", dim=-1, width=4, between=("a", "b"))
TOKENS = Collective(kind="all_gather", axis="tp", value="x", dim=0, width=4, between=("a", "b"))


class Peers:
    """Take up to two rows; the others have the same numbers."""

    def sums(self, x: Tensor) -> bool:
        return x.shape[0] <= 2

    def sum(self, x: Tensor, out: Tensor) -> None:
        out.copy_(2 * x)

    def gathers(self, x: Tensor) -> bool:
        return x.shape[0] <= 2

    def gather(self, x: Tensor) -> Tensor:
        return torch.cat([x, x], 1)


class Others:
    """Takes anything, and says so."""

    def apply(self, step: Collective, value: Tensor, sizes: Any) -> str:
        return step.kind

    def sum_call(self, *given: Any) -> str:
        return "sum_call"


def comm() -> PeerComm:
    return PeerComm(Peers(), cast(Any, Others()))


def module(x: Tensor, residual: Tensor | None, state: Any) -> Any:
    return x, residual


def test_what_fits_is_summed_and_gathered_in_shared_memory_and_the_rest_by_the_others() -> None:
    few, many = torch.ones(2, 4), torch.ones(3, 4)
    assert comm().apply(SUM, few, ()).tolist() == [[2.0] * 4] * 2 and few.max() == 1
    assert comm().apply(GATHER, few, ()).shape == (2, 8)
    assert [comm().apply(step, many, ()) for step in (SUM, GATHER)] == ["all_reduce", "all_gather"]
    assert comm().apply(TOKENS, few, ()) == "all_gather"
    assert comm().sum_call(SUM, cast(Any, module), many, many, None, ()) == "sum_call"


def test_a_sum_is_made_in_place_but_the_first_of_a_chain_which_becomes_the_residual() -> None:
    x, residual = torch.ones(1, 4), torch.zeros(1, 4)
    total, _ = comm().sum_call(SUM, cast(Any, module), x, residual, None, ())
    assert total is x and x.max() == 2
    first = torch.ones(1, 4)
    total, _ = comm().sum_call(SUM, cast(Any, module), first, None, None, ())
    assert total.max() == 2 and first.max() == 1

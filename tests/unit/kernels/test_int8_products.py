"""Torch's products of weights in 8 bits: right, with a bounded part of the weight taken back from bytes at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from agentspeed_kernels.cpu import torch_bytes
from agentspeed_kernels.quantised import quantise
from agentspeed_kernels.reference import definitions as define
from agentspeed_kernels.testing.tolerance import tolerance
from agentspeed_kernels.workspace import Workspace

AT_ONCE = 8192


class Largest(TorchDispatchMode):
    """Sees every tensor that an operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {one.untyped_storage().data_ptr() for one in args if isinstance(one, Tensor)}
        made = func(*args, **kwargs or {})
        if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in given:
            self.elements = max(self.elements, made.untyped_storage().nbytes() // made.element_size())
        return made


@pytest.fixture(autouse=True)
def few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_bytes, "AT_ONCE", AT_ONCE)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))) * shape[-1] ** -0.5


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("group", [0, 32])
def test_a_product_takes_back_a_part_of_the_weight_at_a_time(group: int) -> None:
    x, weight, bias = drawn(20, 150), quantise(drawn(701, 150), group), drawn(701)
    out = torch.full((20, 701), float("nan"))
    with Largest() as largest:
        torch_bytes.linear(x, weight, bias, out)
    assert largest.elements <= 2 * AT_ONCE < 701 * 150
    assert error(out, define.linear(x, weight.whole(torch.float64), bias)) <= tolerance("linear", "float32")


@pytest.mark.parametrize("experts", [1, 5])
def test_experts_take_back_a_part_of_one_matrix_at_a_time(experts: int) -> None:
    x, out = drawn(20, 150), torch.full((20, 150), float("nan"))
    gate_up, down = quantise(drawn(experts, 2 * 203, 150), 0, 2), quantise(drawn(experts, 150, 203))
    ids = torch.arange(40).view(20, 2) % min(experts, 4)
    shares = torch.rand(20, 2, generator=torch.Generator().manual_seed(1))
    with Largest() as largest:
        torch_bytes.experts(x, gate_up, down, ids, shares, Workspace(), out)
    assert largest.elements <= 2 * AT_ONCE < 203 * 150
    joined = gate_up.whole(torch.float64).flatten(-3, -2)
    assert error(out, define.experts(x, joined, down.whole(torch.float64), ids, shares)) <= tolerance(
        "experts", "float32"
    )

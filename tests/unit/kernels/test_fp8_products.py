"""Products with weights in fp8: every byte stands for its number, and blocks end where a matrix ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from agentspeed_kernels.fp8_blocks import Fp8Blocks, in_blocks
from agentspeed_kernels.platform import detect
from agentspeed_kernels.reference import definitions as define
from agentspeed_kernels.registry import standard
from agentspeed_kernels.signature import KernelSpec
from agentspeed_kernels.testing.tolerance import tolerance
from agentspeed_kernels.workspace import Workspace

KINDS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def here(op: str) -> list[Any]:
    found = [
        pytest.param(spec, dtype, id=f"{spec.name}-{dtype}")
        for spec in standard().candidates(op)
        if spec.weights == {"fp8"} and spec.device == "cpu" and not spec.features - detect().features
        for dtype in sorted(spec.dtypes & KINDS.keys())
    ]
    assert found
    return found


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))) * shape[-1] ** -0.5


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize(("spec", "dtype"), here("linear"))
def test_every_byte_stands_for_its_number(spec: KernelSpec, dtype: str) -> None:
    """256 outputs of 256 inputs have every byte at every place once; one input at a time shows one."""
    numbers = (torch.arange(256)[:, None] + torch.arange(256)) % 256
    numbers[numbers % 128 == 127] = 0  # not a number
    data = numbers.to(torch.uint8).view(torch.float8_e4m3fn)
    weight = Fp8Blocks(data, torch.tensor([[1.0, 2.0], [4.0, 0.5]]))
    ones = torch.eye(256, dtype=KINDS[dtype])
    for first in range(0, 256, 8):
        out = torch.full((8, 256), float("nan"), dtype=KINDS[dtype])
        spec.call(ones[first : first + 8], weight, None, out)
        assert torch.equal(out.float(), weight.whole(torch.float32).T[first : first + 8])


@pytest.mark.parametrize(("spec", "dtype"), here("linear"))
@pytest.mark.parametrize(("outputs", "inputs"), [(5, 200), (130, 300), (517, 129), (16, 1), (33, 2100)])
def test_blocks_end_where_a_matrix_does(spec: KernelSpec, dtype: str, outputs: int, inputs: int) -> None:
    weight = in_blocks(drawn(outputs, inputs))
    for rows in (1, 2, 5, 8):
        x, out = drawn(rows, inputs).to(KINDS[dtype]), torch.full((rows, outputs), float("nan"), dtype=KINDS[dtype])
        spec.call(x, weight, None, out)
        assert error(out, define.linear(x, weight.whole(torch.float64), None)) <= tolerance("linear", dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize(("spec", "dtype"), here("linear"))
def test_a_block_without_a_number_makes_no_other_number(spec: KernelSpec, dtype: str) -> None:
    whole = drawn(300, 300)
    whole[130, 0] = float("nan")
    out = torch.zeros(1, 300, dtype=KINDS[dtype])
    spec.call(drawn(1, 300).to(KINDS[dtype]), in_blocks(whole), None, out)
    assert bool(out[0, 128:256].isnan().all()) and int(out.isnan().sum()) == 128


@pytest.mark.parametrize(("spec", "dtype"), here("experts"))
@pytest.mark.parametrize(("inner", "hidden"), [(136, 320), (203, 150), (40, 33)])
def test_gate_and_up_have_blocks_of_their_own(spec: KernelSpec, dtype: str, inner: int, hidden: int) -> None:
    gate_up, down = in_blocks(drawn(4, 2 * inner, hidden), 2), in_blocks(drawn(4, hidden, inner))
    assert gate_up.shape == (4, 2, inner, hidden)
    for rows in (1, 3, 8):
        ids = torch.arange(2 * rows).view(rows, 2) % 3
        shares = torch.rand(rows, 2, generator=torch.Generator().manual_seed(1))
        x, out = drawn(rows, hidden).to(KINDS[dtype]), torch.full((rows, hidden), float("nan"), dtype=KINDS[dtype])
        spec.call(x, gate_up, down, ids, shares, Workspace(), out)
        joined = gate_up.whole(torch.float64).flatten(-3, -2)
        wanted = define.experts(x, joined, down.whole(torch.float64), ids, shares)
        assert error(out, wanted) <= tolerance("experts", dtype)  # type: ignore[arg-type]

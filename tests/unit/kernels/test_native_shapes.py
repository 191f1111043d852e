"""Products whose shapes take other ways through the kernels than the conformance cases: long chains, blocks of rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

import pytest
import torch

from agentspeed_kernels.packing import Weight, kept_in, pack
from agentspeed_kernels.platform import detect
from agentspeed_kernels.reference import definitions as define
from agentspeed_kernels.registry import standard
from agentspeed_kernels.signature import KernelSpec, WeightFormat
from agentspeed_kernels.testing.conformance import KINDS
from agentspeed_kernels.testing.tolerance import tolerance
from agentspeed_kernels.workspace import Workspace


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def kernels(op: str) -> list[KernelSpec]:
    return [spec for spec in standard().candidates(op) if spec.features and spec.layout != "blocks"]


def laid(
    spec: KernelSpec, weight: torch.Tensor, kind: WeightFormat | None, parts: int = 1
) -> tuple[Weight, torch.Tensor]:
    """(what the kernel takes, what it stands for)"""
    if kind is not None:
        made = kept_in(weight, kind, parts)
        whole = made if isinstance(made, torch.Tensor) else made.whole(torch.float64)
        return made, whole.to(weight.dtype).reshape(weight.shape) if kind == "bfloat16" else whole.reshape(weight.shape)
    return (pack(weight, parts) if spec.layout == "tiles" else weight), weight


def formats(spec: KernelSpec) -> list[WeightFormat | None]:
    return [kind for kind in get_args(WeightFormat) if kind in (spec.weights or ())] or [None]


def fitting(spec: KernelSpec, rows: int) -> torch.dtype:
    if spec.features - detect().features:
        pytest.skip(f"{spec} does not run here")
    if spec.most_rows is not None and rows > spec.most_rows:
        pytest.skip(f"{spec} takes up to {spec.most_rows} rows")
    return KINDS[next(iter(spec.dtypes))]


@pytest.mark.parametrize(
    "shape", [(5, 40, 2100), (16, 33, 1056), (17, 40, 1056), (300, 83, 2100), (300, 50, 64), (257, 16, 1090)]
)
@pytest.mark.parametrize("spec", kernels("linear"), ids=str)
def test_long_chains_and_blocks_of_rows(spec: KernelSpec, shape: tuple[int, int, int]) -> None:
    rows, outputs, inputs = shape
    kind = fitting(spec, rows)
    noise = torch.Generator().manual_seed(1)
    # Beside each row lies what must not be read, and around the result what must not be written.
    held = torch.full((rows, inputs + 70), float("nan"), dtype=kind)
    held[:, 3 : 3 + inputs] = torch.randn(rows, inputs, generator=noise)
    around = torch.full((rows, outputs + 40), 7.0, dtype=kind)
    x, out = held[:, 3 : 3 + inputs], around[:, 20 : 20 + outputs]
    weight = (torch.randn(outputs, inputs, generator=noise) * inputs**-0.5).to(kind)
    bias = torch.randn(outputs, generator=noise).to(kind)
    for form in formats(spec):
        given, meant = laid(spec, weight, form)
        spec.call(x, given, bias, out)
        wanted = define.linear(x, meant, bias)
        error = float((out.double() - wanted).abs().max() / wanted.abs().max())
        assert error <= tolerance("linear", next(iter(spec.dtypes)))
        assert bool((around[:, :20] == 7).all() and (around[:, 20 + outputs :] == 7).all())


@pytest.mark.parametrize("spec", kernels("experts"), ids=str)
def test_an_expert_that_most_tokens_choose_and_one_that_none_does(spec: KernelSpec) -> None:
    rows = min(spec.most_rows or 150, 150)
    kind = fitting(spec, rows)
    noise = torch.Generator().manual_seed(2)
    count, inner, hidden = 6, 48, 96
    x = torch.randn(rows, hidden, generator=noise).to(kind)
    gate_up = (torch.randn(count, 2 * inner, hidden, generator=noise) * hidden**-0.5).to(kind)
    down = (torch.randn(count, hidden, inner, generator=noise) * inner**-0.5).to(kind)
    ids = torch.stack([torch.zeros(rows, dtype=torch.int64), torch.randint(1, 5, (rows,), generator=noise)], 1)
    weights, out = torch.rand(rows, 2, generator=noise), torch.full((rows, hidden), float("nan"), dtype=kind)
    for form in formats(spec):
        (both, meant), (back, meant_back) = laid(spec, gate_up, form, 2), laid(spec, down, form)
        spec.call(x, both, back, ids, weights, Workspace(), out)
        wanted = define.experts(x, meant, meant_back, ids, weights)
        error = float((out.double() - wanted).abs().max() / wanted.abs().max())
        assert error <= tolerance("experts", next(iter(spec.dtypes)))


@pytest.mark.parametrize("shape", [(130, 40, 72), (200, 56, 100), (17, 1000, 64)])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("spec", kernels("experts"), ids=str)
def test_a_dense_layer_is_an_expert_that_all_rows_choose(
    spec: KernelSpec, threads: int, shape: tuple[int, int, int]
) -> None:
    rows, inner, hidden = shape
    kind = fitting(spec, rows)
    torch.set_num_threads(threads)
    noise = torch.Generator().manual_seed(3)
    x = torch.randn(rows, hidden, generator=noise).to(kind)
    gate_up = (torch.randn(1, 2 * inner, hidden, generator=noise) * hidden**-0.5).to(kind)
    down = (torch.randn(1, hidden, inner, generator=noise) * inner**-0.5).to(kind)
    ids, weights = torch.zeros(rows, 1, dtype=torch.int64), torch.ones(rows, 1)
    for form in formats(spec):
        (both, meant), (back, meant_back) = laid(spec, gate_up, form, 2), laid(spec, down, form)
        out = torch.full((rows, hidden), float("nan"), dtype=kind)
        spec.call(x, both, back, ids, weights, Workspace(), out)
        wanted = define.experts(x, meant, meant_back, ids, weights)
        error = float((out.double() - wanted).abs().max() / wanted.abs().max())
        assert error <= tolerance("experts", next(iter(spec.dtypes)))


@pytest.mark.parametrize("shape", [(100, 3, 40, 70), (200, 2, 83, 64)])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("spec", kernels("heads_linear"), ids=str)
def test_heads_of_many_rows_by_one_thread_and_by_two(
    spec: KernelSpec, threads: int, shape: tuple[int, int, int, int]
) -> None:
    rows, heads, outputs, inputs = shape
    kind = fitting(spec, rows)
    torch.set_num_threads(threads)
    noise = torch.Generator().manual_seed(4)
    x = torch.randn(rows, heads, inputs, generator=noise).to(kind)
    weight = (torch.randn(heads, outputs, inputs, generator=noise) * inputs**-0.5).to(kind)
    out = torch.full((rows, heads, outputs), float("nan"), dtype=kind)
    given, meant = laid(spec, weight, formats(spec)[0])
    spec.call(x, given, out)
    wanted = define.heads_linear(x, meant)
    error = float((out.double() - wanted).abs().max() / wanted.abs().max())
    assert error <= tolerance("heads_linear", next(iter(spec.dtypes)))

"""Every registered kernel against the float64 definition of its op, on friendly and hostile inputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from agentspeed_kernels.ops import OPS
from agentspeed_kernels.platform import detect
from agentspeed_kernels.registry import standard
from agentspeed_kernels.signature import KernelSpec
from agentspeed_kernels.testing import conformance
from agentspeed_kernels.testing.tolerance import KIND_OF, TOLERANCE, tolerance

pytestmark = pytest.mark.usefixtures("one_thread")
"""test_bf16_logits.py checks that their number changes nothing."""
KERNELS = tuple(standard())


def names(spec: KernelSpec) -> str:
    return f"{spec.op}-{spec.name}"


@pytest.mark.parametrize("spec", KERNELS, ids=names)
def test_a_kernel_keeps_its_tolerance_on_every_case(spec: KernelSpec) -> None:
    missing = spec.features - detect().features
    if missing:
        pytest.skip(f"{spec} needs {missing}: {detect().absent}")
    over = {
        case.name: error
        for case in conformance.cases(spec)
        if not (error := conformance.worst_error(spec, case)) <= tolerance(case.op, case.dtype)
    }
    assert not over


def test_every_op_has_a_portable_kernel_in_every_format() -> None:
    portable = {(spec.op, dtype) for spec in KERNELS if not spec.features for dtype in spec.dtypes}
    assert portable == {(op, dtype) for op in OPS for dtype in conformance.KINDS}


def test_every_op_has_a_kind_and_every_kind_a_tolerance_with_a_reason() -> None:
    assert set(KIND_OF) == set(OPS)
    assert {(kind, dtype) for kind in KIND_OF.values() for dtype in conformance.KINDS} == set(TOLERANCE)
    assert all(reason for _, reason in TOLERANCE.values())


def test_a_kernel_that_ignores_its_input_is_caught() -> None:
    honest = next(spec for spec in KERNELS if spec.op == "rms_norm" and spec.name == "torch")
    case = conformance.Case(op="rms_norm", dtype="float32", manner="random", size="odd", rows=3)
    lazy = KernelSpec(
        op="rms_norm",
        name="lazy",
        dtypes=honest.dtypes,
        device="cpu",
        call=lambda x, weight, eps, out: out.copy_(x),
        priority=1,
    )
    assert conformance.worst_error(honest, case) <= tolerance("rms_norm", "float32")
    assert conformance.worst_error(lazy, case) > tolerance("rms_norm", "float32")


def test_a_kernel_that_cuts_to_8_bits_instead_of_rounding_is_caught() -> None:
    honest = next(spec for spec in KERNELS if spec.op == "latent_append" and spec.name == "torch-fp8-cache")
    case = conformance.Case(op="latent_append", dtype="float32", manner="random", size="small", rows=3, cache="fp8")

    def cut(raw: Tensor, gain: Tensor, eps: float, cos: Tensor, sin: Tensor, slots: Tensor, pool: Tensor) -> None:
        honest.call(raw, gain, eps, cos, sin, slots, pool)
        rank = gain.shape[0]
        pool[slots, :rank] -= (pool[slots, :rank] & 1).to(torch.uint8)

    assert conformance.worst_error(honest, case) <= tolerance("latent_append", "float32")
    assert conformance.worst_error(replace(honest, call=cut), case) > tolerance("latent_append", "float32")

"""What bench/gpu.py checks on a GPU: every kernel that is listed, each with the weights that it takes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
from agentspeed_kernels.signature import KernelSpec
from agentspeed_kernels.testing import conformance
from agentspeed_kernels.triton.specs import SPECS

BENCH = Path(__file__).parents[3] / "bench"
GROUPED = {"qkv_append", "gqa_rows", "gqa_extend"}


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[KernelSpec, conformance.Case]]:
    """What was checked; nothing is computed."""
    monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path])
    found: list[tuple[KernelSpec, conformance.Case]] = []

    def noted(spec: KernelSpec, case: conformance.Case, device: object) -> float:
        del device
        found.append((spec, case))
        return 0.0

    monkeypatch.setattr(conformance, "worst_error", noted)
    return found


@pytest.fixture
def report(checked: object) -> Any:
    del checked  # it makes the folder importable
    from gpu_timing import Report

    return Report(None)


def test_every_kernel_of_grouped_attention_is_checked(
    checked: list[tuple[KernelSpec, conformance.Case]], report: Any
) -> None:
    import gpu_grouped

    gpu_grouped.section_check(report)
    assert {spec.call for spec, _ in checked} == {spec.call for spec in SPECS if spec.op in GROUPED}
    assert {case.dtype for _, case in checked} == {"float32", "bfloat16"}
    assert len({line["case"] for line in report.lines}) == len(report.lines)
    assert not report.missed()


def test_every_kernel_is_checked_with_the_weights_that_it_takes(
    checked: list[tuple[KernelSpec, conformance.Case]], report: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu_layers

    monkeypatch.setattr(gpu_layers, "_check_sampling", lambda _: None)
    gpu_layers.section_check(report)
    assert {(spec.op, spec.name) for spec, _ in checked} == {(spec.op, spec.name) for spec in SPECS}
    assert all(case.weights in (spec.weights or {None}) for spec, case in checked)
    assert len({line["case"] for line in report.lines}) == len(report.lines)

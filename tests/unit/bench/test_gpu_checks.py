"""What bench/gpu.py checks on a GPU: every kernel that is listed, each with the weights that it takes."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
from agentspeed_kernels.registry import standard
from agentspeed_kernels.signature import KernelSpec
from agentspeed_kernels.testing import conformance
from agentspeed_kernels.triton.specs import SPECS

BENCH = Path(__file__).parents[3] / "bench"
GROUPED = {"qkv_append", "gqa_rows", "gqa_extend"}


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[KernelSpec, conformance.Case]]:
    """What was checked; nothing is computed."""
    monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path])
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
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


@pytest.mark.parametrize("cores", [1, 2])
def test_kernels_that_are_checked_beside_each_other_have_the_same_lines(
    monkeypatch: pytest.MonkeyPatch, cores: int
) -> None:
    monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path])
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    from gpu_checks import check
    from gpu_timing import Report

    specs = [spec for op in ("rms_norm", "rope") for spec in standard().candidates(op) if spec.name == "torch"]
    report = Report(None)
    check(report, "cpu", specs, {"bfloat16": ("small", "odd"), "float32": ("small",)}, device="cpu")
    assert [line["case"] for line in report.lines] == [
        f"{op} torch {case}"
        for op in ("rms_norm", "rope")
        for case in ("bfloat16 small", "bfloat16 odd", "float32 small")
    ]
    assert not report.missed() and any(line["worst"] > 0 for line in report.lines)

"""Kernels on a GPU against their float64 definitions on hostile inputs: a line for each kernel, format and size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

import torch
from gpu_timing import DEVICE, Report

from agentspeed_kernels.signature import Dtype, KernelSpec
from agentspeed_kernels.testing import conformance
from agentspeed_kernels.testing.tolerance import KIND_OF, UNDEFINED, tolerance

Size: TypeAlias = Literal["small", "odd", "wide"]
_ROWS = (1, 3, 8, 40)


def check(report: Report, section: str, specs: Sequence[KernelSpec], sizes: Mapping[Dtype, Sequence[Size]]) -> None:
    """Every one of `specs`, in each format of activations that `sizes` names and the spec has."""
    threads = torch.get_num_threads()
    # Definitions compute on the CPU, a small product after the other: threads that wait for a core cost more than all.
    torch.set_num_threads(1)
    try:
        for spec in specs:
            for dtype in (dtype for dtype in sizes if dtype in spec.dtypes):
                for size in sizes[dtype]:
                    _worst(report, section, spec, dtype, size)
    finally:
        torch.set_num_threads(threads)


def _worst(report: Report, section: str, spec: KernelSpec, dtype: Dtype, size: Size) -> None:
    rows_of = _ROWS if spec.most_rows is None else (1, min(3, spec.most_rows))
    cases = [
        conformance.Case(op=spec.op, dtype=dtype, manner=manner, size=size, rows=rows, weights=weights, cache=cache)
        for weights in conformance.weights_of(spec)
        for cache in conformance.caches_of(spec)
        for manner in conformance.MANNERS
        for rows in rows_of
        if conformance.fits(spec, size) and (KIND_OF[spec.op], dtype, manner) not in UNDEFINED
    ]
    worst, name = 0.0, ""
    for case in cases:
        error = conformance.worst_error(spec, case, DEVICE)
        if not error <= worst:
            worst, name = error, case.name
    if cases:
        limit = tolerance(spec.op, dtype)
        report.add(section, f"{spec.op} {spec.name} {dtype} {size}", worst=worst, tolerance=limit, at=name,
                   met=worst <= limit)  # fmt: skip

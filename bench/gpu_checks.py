"""Kernels on a GPU against their float64 definitions on hostile inputs: a line for each kernel, format and size.

Most of the time goes by on the host: kernels are compiled, and a definition of wide sizes takes up to a second of one
core. So kernels are checked in several processes, and in this one alone where it may use one core (`taskset`), as it
should under a sanitizer.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import get_context
from typing import Literal, NamedTuple, TypeAlias

import torch
from gpu_timing import DEVICE, Report

from agentspeed_kernels.signature import Dtype, KernelSpec
from agentspeed_kernels.testing import conformance
from agentspeed_kernels.testing.tolerance import KIND_OF, UNDEFINED, tolerance

Size: TypeAlias = Literal["small", "odd", "wide"]
_ROWS = (1, 3, 8, 40)
_MOST_PROCESSES = 8
"""Each has a context on the GPU."""


class _Checked(NamedTuple):
    worst: float
    at: str


class _Job(NamedTuple):
    spec: KernelSpec
    dtype: Dtype
    size: Size
    device: str


def check(
    report: Report,
    section: str,
    specs: Sequence[KernelSpec],
    sizes: Mapping[Dtype, Sequence[Size]],
    device: str = DEVICE.type,
) -> None:
    """Every one of `specs`, in each format of activations that `sizes` names and the spec has."""
    jobs = [
        _Job(spec, dtype, size, device)
        for spec in specs
        for dtype in (dtype for dtype in sizes if dtype in spec.dtypes)
        for size in sizes[dtype]
        if _cases(spec, dtype, size)
    ]
    for (spec, dtype, size, _), (worst, at) in zip(jobs, _all_checked(jobs), strict=True):
        limit = tolerance(spec.op, dtype)
        report.add(section, f"{spec.op} {spec.name} {dtype} {size}", worst=worst, tolerance=limit, at=at,
                   met=worst <= limit)  # fmt: skip


def _all_checked(jobs: Sequence[_Job]) -> Iterator[_Checked]:
    """In their order, each as soon as it is there."""
    processes = min(_MOST_PROCESSES, len(os.sched_getaffinity(0)), len(jobs))
    if processes < 2:
        threads = torch.get_num_threads()
        _one_thread()
        try:
            yield from map(_worst, jobs)
        finally:
            torch.set_num_threads(threads)
        return
    with get_context("spawn").Pool(processes, initializer=_one_thread) as pool:
        yield from pool.imap(_worst, jobs)


def _one_thread() -> None:
    """Definitions compute on the CPU, a small product after the other: threads that wait for a core cost more than
    all."""
    torch.set_num_threads(1)


def _cases(spec: KernelSpec, dtype: Dtype, size: Size) -> list[conformance.Case]:
    rows_of = _ROWS if spec.most_rows is None else (1, min(3, spec.most_rows))
    return [
        conformance.Case(op=spec.op, dtype=dtype, manner=manner, size=size, rows=rows, weights=weights, cache=cache)
        for weights in conformance.weights_of(spec)
        for cache in conformance.caches_of(spec)
        for manner in conformance.MANNERS
        for rows in rows_of
        if conformance.fits(spec, size) and (KIND_OF[spec.op], dtype, manner) not in UNDEFINED
    ]


def _worst(job: _Job) -> _Checked:
    worst, at = 0.0, ""
    for case in _cases(job.spec, job.dtype, job.size):
        error = conformance.worst_error(job.spec, case, job.device)
        if not error <= worst:
            worst, at = error, case.name
    return _Checked(worst, at)

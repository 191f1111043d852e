"""What Triton's interpreter is spared changes nothing that it gives or refuses."""

from __future__ import annotations

import importlib.util
import itertools
from typing import Any

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
import triton
from triton import language as tl
from triton.language import core, semantic
from triton.runtime.errors import InterpreterError

import tests.triton_interpreter  # noqa: F401 - must come before the first kernel
from tests import quick_interpreter

NAMES = [*core.dtype.SINT_TYPES, *core.dtype.UINT_TYPES, *core.dtype.FP_TYPES]
SEMANTIC: Any = semantic.TritonSemantic(None)


@triton.jit
def _sum_of(x, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.sum(tl.load(x + tl.arange(0, SIZE)))


@triton.jit
def _sums(x, out, SIZE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    block = tl.full((BLOCK, 1), 1, tl.int32) + tl.arange(0, SIZE)
    tl.store(out, _sum_of(x, SIZE) + tl.sum(tl.sum(block, 1)))


def found_or_refused(function: Any, *given: Any) -> str:
    try:
        return str(function(*given))
    except (TypeError, ValueError) as refusal:
        return repr(refusal)


def test_a_result_has_the_type_that_triton_gives_it() -> None:
    types = [core.dtype(name) for name in NAMES]
    flags = itertools.product((False, True), (False, True), (False, True))
    for _ in "first", "known":
        for a, b, (a_scalar, b_scalar, divided) in itertools.product(types, types, flags):
            given = (SEMANTIC, a, a_scalar, b, b_scalar, divided)
            wanted = found_or_refused(quick_interpreter.result_type_of_triton, *given)
            assert found_or_refused(semantic.TritonSemantic.computation_type_impl, *given) == wanted


def test_blocks_are_equal_where_shapes_and_elements_are() -> None:
    made = [
        core.block_type(element, shape)
        for element in (core.int32, core.pointer_type(core.int32), core.pointer_type(core.int32, 3), core.float32)
        for shape in ([4], [4, 1], [1, 4], [tl.constexpr(4), 1])
    ]
    for a, b in itertools.product(made, made):
        same = a.element_ty == b.element_ty and list(a.shape.values) == list(b.shape.values)
        assert (a == b) is same
        assert (a != b) is not same


def test_a_kernel_runs_after_one_that_was_refused_and_the_refused_one_is_refused_again() -> None:
    x, out = torch.arange(8, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    before = tl.load, tl.tensor.__add__, core.dtype.to_ir
    for _ in range(2):
        with pytest.raises(InterpreterError, match="power of 2"):
            _sums[(1,)](x, out, 8, 3)
        assert (tl.load, tl.tensor.__add__, core.dtype.to_ir) == before
        _sums[(1,)](x, out, 8, 2)
        assert out.item() == 28 + 2 * (28 + 8)
        assert (tl.load, tl.tensor.__add__, core.dtype.to_ir) == before

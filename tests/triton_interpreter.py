"""Runs Triton kernels on the CPU through Triton's interpreter, for tests of numbers; import it before any kernel.

`tests/conftest.py` sets the switch, since Triton reads it when it is first imported. The interpreter of Triton 3.6
turns arrays of one element into Python numbers with `int`, which NumPy 2.4 refuses; `item` means the same. It keeps
bfloat16 as bits and multiplies the bits; products are given the numbers here. Where the largest is, it finds by NumPy,
which takes what is no number for it; a GPU's comparisons pass that over, as its maxima do.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from triton.runtime import interpreter

import tests.quick_interpreter  # noqa: F401

assert os.environ.get("TRITON_INTERPRET") == "1"

_original: Any = interpreter._patch_lang_tensor


def _patched(tensor: Any, scope: Any) -> None:
    _original(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patched  # type: ignore[attr-defined]


def _numbers(handle: Any) -> Any:
    if handle.dtype.scalar.name != "bf16":
        return handle
    data = (handle.data.astype(np.uint32) << 16).view(np.float32)
    return interpreter.TensorHandle(data, interpreter.tl.float32)


_dot: Any = interpreter.InterpreterBuilder.create_dot


def _dot_of_numbers(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    return _dot(self, _numbers(a), _numbers(b), *rest)


interpreter.InterpreterBuilder.create_dot = _dot_of_numbers  # type: ignore[method-assign]


_smallest_or_largest: Any = interpreter.ReduceOps.min_max


def _passes_over(self: Any, given: Any, val_reduce_op: Any, idx_reduce_op: Any = None) -> Any:
    if idx_reduce_op is np.argmax:
        found = given[0] if isinstance(given, tuple) else given
        numbers = np.where(np.isnan(found.handle.data), -np.inf, found.handle.data)
        given = self.to_tensor(numbers, found.dtype)
    return _smallest_or_largest(self, given, val_reduce_op, idx_reduce_op)


interpreter.ReduceOps.min_max = _passes_over  # type: ignore[method-assign]

"""Memory as a model takes it: for pages where they are written, and for weights without what making them took."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

import torch
from torch import Tensor

_NUMBERS: Final = {"MALLOC_TRIM_THRESHOLD_": -1, "MALLOC_TOP_PAD_": -2, "MALLOC_MMAP_THRESHOLD_": -3}
"""What glibc calls the settings that a process may have been started with (`serve.tuning`)."""
_MEANWHILE: Final = {"MALLOC_TRIM_THRESHOLD_": 1 << 17, "MALLOC_TOP_PAD_": 0, "MALLOC_MMAP_THRESHOLD_": 1 << 17}
"""Bytes: what is larger is mapped by itself, and unmapped when it is freed. What is smaller may be freed below a scale
or a norm that stays and so leave a hole; holes for larger ones came to a third of a model in int8."""
_MOST: Final = (1 << 31) - 1
"""That a call can set one to."""
LARGE_PAGE: Final = 2 << 20
"""Bytes, on x86-64 and on 64-bit ARM with pages of 4 KB."""


@contextmanager
def given_back() -> Iterator[None]:
    """What is freed meanwhile, and is not small, goes back to the machine at once, where a process was told to keep it:
    a step uses its memory again, and a load would leave holes between weights that are as large as what they were made
    of. Of the whole process; without effect where it was told nothing, or the C library is not glibc."""
    library = ctypes.CDLL(None)
    told = {name: os.environ.get(name, "") for name in _NUMBERS}
    if not hasattr(library, "mallopt") or not all(value.isdecimal() for value in told.values()):
        yield
        return
    after = {name: min(int(value), _MOST) for name, value in told.items()}
    # A library that would not take a value back is left alone.
    if all(library.mallopt(_NUMBERS[name], value) for name, value in after.items()):
        for name, value in _MEANWHILE.items():
            library.mallopt(_NUMBERS[name], value)
        library.malloc_trim(0)
    try:
        yield
    finally:
        for name, value in after.items():
            library.mallopt(_NUMBERS[name], value)


def zeros_on_demand(shape: tuple[int, ...], dtype: torch.dtype, *, streamed: bool = False) -> Tensor:
    """Zeros that take memory only where they are written: a pool may be large, most sessions are not.

    `streamed`: steps read long ranges of it, so that it lies in pages of `LARGE_PAGE` where the kernel gives them on
    advice. It then takes memory in such steps, never more than it has in all."""
    size = math.prod(shape) * dtype.itemsize
    # Memory of this process alone: what processes could share is the kernel's file system for it, and has small pages.
    spare = LARGE_PAGE if streamed else 0
    memory = mmap.mmap(-1, size + spare, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    begin = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % LARGE_PAGE if streamed else 0
    whole = size // LARGE_PAGE * LARGE_PAGE if streamed else 0
    if whole and sys.platform == "linux":
        with suppress(OSError):  # a kernel built without large pages
            memory.madvise(mmap.MADV_HUGEPAGE, begin, whole)
    return torch.frombuffer(memory, dtype=dtype, offset=begin, count=size // dtype.itemsize).view(shape)

"""Memory as a model takes it: for pages where they are written, and for weights without what making them took, in large
pages of the kernel's."""

from __future__ import annotations

import bisect
import ctypes
import math
import mmap
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from agentspeed_engine.errors import EngineFault

_NUMBERS: Final = {"MALLOC_TRIM_THRESHOLD_": -1, "MALLOC_TOP_PAD_": -2, "MALLOC_MMAP_THRESHOLD_": -3}
"""What glibc calls the settings that a process may have been started with (`serve.tuning`)."""
_MEANWHILE: Final = {"MALLOC_TRIM_THRESHOLD_": 1 << 17, "MALLOC_TOP_PAD_": 0, "MALLOC_MMAP_THRESHOLD_": 1 << 17}
"""Bytes: what is larger is mapped by itself, and unmapped when it is freed. What is smaller may be freed below a scale
or a norm that stays and so leave a hole; holes for larger ones came to a third of a model in int8."""
_MOST: Final = (1 << 31) - 1
"""That a call can set one to."""
LARGE_PAGE: Final = 2 << 20
"""Bytes, on x86-64 and on 64-bit ARM with pages of 4 KB."""
_COLLAPSE: Final = 25
"""Linux's MADV_COLLAPSE (6.1 and later), which Python's mmap does not name: small pages become large ones at once."""
_APART: Final = 8 << 10
"""Bytes between two allocations side by side, at most: the rest of a page, and what the allocator notes."""
_SMALL: Final = 4 << 20
"""Bytes of a weight, at most, that is moved: it is there twice meanwhile, and a larger one loses less at its ends."""
_LINE: Final = 64
"""Bytes of a cache line, on which tensors begin."""
_ASKED: Final = Path("/sys/kernel/mm/transparent_hugepage/enabled")


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
    advice. It then takes memory in such steps, never more than it has in all. Raises `EngineFault` (out_of_memory)
    where the process may not have so many addresses."""
    size = math.prod(shape) * dtype.itemsize
    # Memory of this process alone: what processes could share is the kernel's file system for it, and has small pages.
    spare = LARGE_PAGE if streamed else 0
    try:
        memory = mmap.mmap(-1, size + spare, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise EngineFault(
            "out_of_memory",
            f"This process cannot have {(size >> 20) + 1} MB of memory more: {error.strerror}.",
            "Give fewer pages or host slots, or lift what limits the process (`ulimit -v`).",
        ) from error
    begin = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % LARGE_PAGE if streamed else 0
    whole = size // LARGE_PAGE * LARGE_PAGE if streamed else 0
    if whole and sys.platform == "linux":
        with suppress(OSError):  # a kernel built without large pages
            memory.madvise(mmap.MADV_HUGEPAGE, begin, whole)
    return torch.frombuffer(memory, dtype=dtype, offset=begin, count=size // dtype.itemsize).view(shape)


def in_large_pages(weights: Iterable[Tensor]) -> None:
    """Moves what is resident to pages of `LARGE_PAGE`: a product that reads a weight once runs on across the ends of
    small pages at two thirds of the speed. Small weights are laid side by side; others stay where they are, as far as
    those beside each other fill large pages. No more memory is taken, but for one small weight on its way.

    Without effect on files that are mapped, and where the kernel gives no large pages or has been told not to. Each
    tensor of a small weight must be given: one that is not would hold the memory that it was in."""
    try:
        if sys.platform != "linux" or "[never]" in _ASKED.read_text():
            return
        anonymous = _anonymous()
    except OSError:  # a kernel without large pages, or one that tells this process nothing
        return
    held = list({id(weight): weight for weight in weights}.values())
    _lay_side_by_side(held, anonymous)
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for begin, end in large_spans((weight.data_ptr(), weight.nbytes) for weight in held):
        for low, high in anonymous:
            first, last = max(begin, low), min(end, high)
            if last - first >= LARGE_PAGE:  # what is not done is left as it was, and costs speed alone
                first += -first % LARGE_PAGE
                size = (last - first) // LARGE_PAGE * LARGE_PAGE
                if size and advise(first, size, mmap.MADV_HUGEPAGE) == 0:
                    advise(first, size, _COLLAPSE)


def _lay_side_by_side(weights: Iterable[Tensor], anonymous: list[tuple[int, int]]) -> None:
    """One small weight after the other into one stretch of memory. Where they were made, what was freed meanwhile and
    scales lie between them: half of a small model in 8 bits filled no large page."""
    sharing: dict[int, list[Tensor]] = {}
    for weight in weights:
        sharing.setdefault(weight.untyped_storage().data_ptr(), []).append(weight)
        if (whole := weight._base) is not None:  # which a view of it keeps
            sharing[whole.untyped_storage().data_ptr()].append(whole)
    moved: list[tuple[list[Tensor], int]] = []
    for address, those in sharing.items():
        size = those[0].untyped_storage().nbytes()
        # Of memory that these are only a part of, others may hold the rest.
        if 0 < size <= _SMALL and max(one.nbytes for one in those) == size and _within(address, size, anonymous):
            moved.append((those, size))
    room = sum(_lines(size) for _, size in moved)
    if room < LARGE_PAGE:
        return
    try:
        stretch = zeros_on_demand((room,), torch.uint8, streamed=True)
    except EngineFault:  # they stay where they are, which costs speed alone
        return
    library = ctypes.CDLL(None)
    at = kept = 0
    for those, size in moved:
        old = those[0].untyped_storage()
        stretch[at : at + size].copy_(torch.empty(0, dtype=torch.uint8).set_(old, 0, (size,), (1,)))
        first = stretch.data_ptr() - stretch.untyped_storage().data_ptr() + at
        for one in {id(one): one for one in those}.values():
            offset = first // one.element_size() + one.storage_offset()
            one.set_(stretch.untyped_storage(), offset, one.shape, one.stride())
        at, kept = at + _lines(size), kept + size
        if (kept >= _SMALL or at == room) and hasattr(library, "malloc_trim"):
            library.malloc_trim(0)  # else memory that was not mapped by itself would stay this process's
            kept = 0


def _lines(size: int) -> int:
    """Bytes of whole cache lines."""
    return -(-size // _LINE) * _LINE


def _within(address: int, size: int, ranges: list[tuple[int, int]]) -> bool:
    """Whether one of the ranges, which rise, has all of it."""
    found = bisect.bisect_right(ranges, (address, sys.maxsize)) - 1
    return found >= 0 and ranges[found][0] <= address and address + size <= ranges[found][1]


def large_spans(held: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """(begin, end) of whole large pages that ranges (address, bytes) fill, those side by side taken together."""
    joined: list[list[int]] = []
    for begin, size in sorted(held):
        if joined and begin - joined[-1][1] <= _APART:
            joined[-1][1] = max(joined[-1][1], begin + size)
        else:
            joined.append([begin, begin + size])
    whole = [(-(-begin // LARGE_PAGE) * LARGE_PAGE, end // LARGE_PAGE * LARGE_PAGE) for begin, end in joined]
    return [(begin, end) for begin, end in whole if begin < end]


def _anonymous() -> list[tuple[int, int]]:
    """(begin, end) of this process's mappings that belong to no file."""
    found: list[tuple[int, int]] = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        where, _, _, _, inode, *_ = line.split(maxsplit=5)
        if inode == "0":
            begin, end = where.split("-")
            found.append((int(begin, 16), int(end, 16)))
    return found

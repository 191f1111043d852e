"""One safetensors file, whose tensors are read into memory of their own: nothing of the file stays mapped behind them.

A mapped tensor costs its file's pages as long as it lives, beside the copy in the kernels' layout that is made of it.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, Final, cast, final

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from agentspeed_engine.models.tensor_shapes import Shape

_KINDS: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I32": torch.int32,
    "I64": torch.int64,
}
"""By the names of safetensors; tensors of other kinds are known by name alone."""

_CHUNK: Final = 2 << 20
"""Bytes that one call reads: few enough that a tensor's are spread over the readers."""
_WIDE: Final = 1 << 14
"""Bytes of a row's piece from which it is read by a call of its own; of a narrower one the whole row is read with its
neighbours, which takes less time than as many calls."""


@final
class ShardFile:
    """Open as long as it is held. Reading is thread-safe."""

    __slots__ = ("__weakref__", "_data", "_file", "_readers", "_tensors")

    def __init__(self, path: Path, readers: Executor | None = None) -> None:
        """`readers` reads the parts of a large tensor at once; None: one after the other. Raises `SafetensorError` or
        `OSError` for a file that is damaged, cut short or not there."""
        self._readers = readers
        with safe_open(str(path), framework="pt"):
            pass  # the library checks the header against the file
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        _ = weakref.finalize(self, os.close, self._file)
        size = int.from_bytes(os.pread(self._file, 8, 0), "little")
        self._data = 8 + size
        self._tensors: dict[str, Any] = json.loads(os.pread(self._file, size, 8))
        _ = self._tensors.pop("__metadata__", None)

    @property
    def names(self) -> tuple[str, ...]:
        """Of all tensors."""
        return tuple(self._tensors)

    def shape(self, name: str) -> Shape:
        """Of one tensor."""
        return tuple(self._tensors[name]["shape"])

    def kind(self, name: str) -> str:
        """How it is stored, by safetensors' name."""
        return str(self._tensors[name]["dtype"])

    def bytes(self, name: str) -> int:
        """Of one tensor in the file."""
        begin, end = self._tensors[name]["data_offsets"]
        return int(end - begin)

    def read(self, name: str, rows: slice | None = None, columns: slice | None = None) -> Tensor:
        """The tensor, or some of its rows or of a matrix's columns, contiguous; nothing else stays in memory. Raises
        `OSError` where the file ends before it does."""
        shape, (begin, end) = self.shape(name), self._tensors[name]["data_offsets"]
        if rows is not None:
            row = (end - begin) // shape[0]
            begin, end = begin + rows.start * row, begin + rows.stop * row
            shape = (rows.stop - rows.start, *shape[1:])
        kind = _KINDS[self.kind(name)]
        if columns is None:
            held = torch.empty(end - begin, dtype=torch.uint8)
            self._fill(memoryview(cast(Any, held.numpy())), begin)
            return held.view(kind).view(shape)
        row, first, last = (extent * kind.itemsize for extent in (shape[1], columns.start, columns.stop))
        held = torch.empty(shape[0], last - first, dtype=torch.uint8)
        kept = held.numpy()  # torch would copy with threads of its own, for each of the readers
        step = max(1, _CHUNK // row)

        def block(top: int) -> None:
            rows = min(step, shape[0] - top)
            if last - first >= _WIDE:
                for at in range(top, top + rows):
                    self._take(memoryview(cast(Any, kept[at])), begin + at * row + first)
                return
            whole = np.empty((rows, row), np.uint8)
            self._take(memoryview(cast(Any, whole)).cast("B"), begin + top * row)
            kept[top : top + rows] = whole[:, first:last]

        self._each(block, range(0, shape[0], step))
        return held.view(kind)

    def _fill(self, view: memoryview, begin: int) -> None:
        """`begin` is of the data, behind the header."""
        self._each(
            lambda at: self._take(view[at : at + _CHUNK], begin + at),
            range(0, len(view), _CHUNK),
        )

    def _each(self, read: Callable[[int], None], places: range) -> None:
        """At once where there are several."""
        if self._readers is None or len(places) < 2:
            for place in places:
                read(place)
        else:
            for _ in self._readers.map(read, places):
                pass

    def _take(self, view: memoryview, begin: int) -> None:
        at = 0
        while at < len(view):
            taken = os.preadv(self._file, [view[at:]], self._data + begin + at)
            if not taken:
                raise OSError("the file ends before the tensor does")
            at += taken

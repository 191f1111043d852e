"""A chain of launches as something that is repeated: a CUDA graph, and whether the GPU has room for another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, final

import torch
from torch import Tensor

SPARE_PART = 20
"""Of the GPU's memory one part in so many stays free of graphs."""
_cuda: Any = torch.cuda
"""torch gives these no types."""


class Recorder(Protocol):
    """`CudaRecorder` is the one that engines have."""

    def room(self) -> bool:
        """Whether there is memory for another."""
        ...

    def record(self, chain: Callable[[], Tensor], settled: Callable[[], None]) -> tuple[Callable[[], None], Tensor]:
        """(what does again all that `chain` does, the tensor that it leaves its result in). The chain runs once before,
        and then `settled`, after which nothing of it moves in memory."""
        ...

    def forget(self) -> None:
        """Nothing that was recorded so far is done again."""
        ...


@final
class CudaRecorder:
    """Not thread-safe: one worker thread drives it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None

    def room(self) -> bool:
        free, total = _cuda.mem_get_info(self._device)
        return bool(free >= total // SPARE_PART)

    def record(self, chain: Callable[[], Tensor], settled: Callable[[], None]) -> tuple[Callable[[], None], Tensor]:
        before = _cuda.current_stream(self._device)
        side = _cuda.Stream(self._device)
        side.wait_stream(before)
        with _cuda.stream(side):
            chain()
        before.wait_stream(side)
        settled()
        graph = _cuda.CUDAGraph()
        try:
            with _cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                out = chain()
        finally:
            # A capture that fails leaves its own stream behind as the current one.
            _cuda.set_stream(before)
        self._pool = self._pool or graph.pool()
        return graph.replay, out

    def forget(self) -> None:
        # The memory of graphs goes with the last of them; its name cannot be used again.
        self._pool = None

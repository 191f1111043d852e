"""Host slots for the pages of a cache: pinned memory and streams of their own where its pools are on a GPU."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from itertools import cycle
from typing import Any, final

import torch
from torch import Tensor

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.exec.executor import CopyFailed
from agentspeed_engine.models.memory import zeros_on_demand
from agentspeed_engine.wording import counted

_cuda: Any = torch.cuda
"""torch gives these no types."""


@final
class HostArena:
    """Each pool is [layers, pages, page_tokens, width]; a slot holds one page of all, a contiguous piece for each pool.

    `save` and `load` return when the rows have arrived. They may be called from another thread than the one that runs
    steps, and wait for no step: no unacknowledged step writes a page that is saved, or reads one that is loaded into.
    On a GPU each takes a bounce buffer of two pages.

    On a CPU the arena is a second one in the same memory: it proves that copies are right, not that they pay.
    """

    def __init__(self, pools: Sequence[Tensor], slots: int) -> None:
        """Raises `EngineFault` (out_of_memory)."""
        self._pools = pools
        on_gpu = pools[0].is_cuda
        try:
            self._slots = [zeros_on_demand((slots, pool.shape[0], *pool.shape[2:]), pool.dtype) for pool in pools]
            if on_gpu:
                for held in self._slots:
                    _pin(held, self)
        except (EngineFault, OSError, RuntimeError) as error:
            raise EngineFault(
                "out_of_memory",
                f"No host memory for {counted(slots, 'slot')}: {str(error).rstrip('.')}.",
                "Give fewer slots.",
            ) from error
        # Two, so that the pieces of one page are gathered while another is on its way.
        self._streams = tuple(_cuda.Stream(pools[0].device) for _ in range(2)) if on_gpu else ()

    def save(self, pages: Sequence[int], slots: Sequence[int]) -> None:
        """Raises `CopyFailed`."""
        self._copy(
            (held[slot], pool[:, page])
            for page, slot in zip(pages, slots, strict=True)
            for pool, held in zip(self._pools, self._slots, strict=True)
        )

    def load(self, slots: Sequence[int], pages: Sequence[int]) -> None:
        """Raises `CopyFailed`."""
        self._copy(
            (pool[:, page], held[slot])
            for slot, page in zip(slots, pages, strict=True)
            for pool, held in zip(self._pools, self._slots, strict=True)
        )

    def _copy(self, moves: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Each is (target, source)."""
        try:
            if self._streams:
                self._copy_aside(moves)
                return
            for target, source in moves:
                target.copy_(source)
        except RuntimeError as error:
            raise CopyFailed(str(error)) from error

    def _copy_aside(self, moves: Iterable[tuple[Tensor, Tensor]]) -> None:
        try:
            for (target, source), stream in zip(moves, cycle(self._streams), strict=False):
                with _cuda.stream(stream):
                    target.copy_(source, non_blocking=True)
        finally:
            # After a failure too: the scheduler, once told, gives the pages and slots to others.
            for stream in self._streams:
                arrived = _cuda.Event(blocking=True)
                arrived.record(stream)
                arrived.synchronize()


def _pin(slots: Tensor, owner: HostArena) -> None:
    """Pins the slots where they are: torch's own pinned memory comes in powers of two, which a large arena cannot
    afford."""
    runtime = _cuda.cudart()
    status = int(runtime.cudaHostRegister(slots.data_ptr(), slots.numel() * slots.element_size(), 0))
    if status != 0:
        raise RuntimeError(f"pinning them failed with CUDA error {status}")
    weakref.finalize(owner, runtime.cudaHostUnregister, slots.data_ptr())

"""GPUs of one machine that write into each other's memory: sums and gathers of a decode step in a few microseconds.

What a library for any number of GPUs and bytes takes tens of microseconds for is, for a row or some hundred, one launch
(`device.peers`). All ranks make the same calls in the same order, whether launched or as part of a graph.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, final

import torch
from torch import Tensor

from agentspeed_kernels.triton import ipc, launching
from agentspeed_kernels.triton.device_code import device_code

WORDS: Final = 512
"""Of 32 bits that a program of a sum sends and adds up."""
MEETINGS: Final = 64
"""Words of 64 bits at the front of a rank's memory: the most ranks there can be."""
_WARPS, _BLOCK = 8, 1024
log = logging.getLogger("agentspeed.kernels")
_cuda: Any = torch.cuda
"""torch gives these no types."""
_ALIGNED: Final = 16


@final
class PeerMemory:
    """One rank's side of the memory that all of them can write."""

    def __init__(
        self, rank: int, ranks: int, device: torch.device, *, sum_bytes: int, rows: int, row_bytes: int
    ) -> None:
        """`sum_bytes`: the most that is summed at once; `rows` of `row_bytes` on all ranks together: what is gathered
        at once. Raises `torch.OutOfMemoryError`."""
        assert 1 < ranks <= MEETINGS
        self.rank, self.ranks = rank, ranks
        self._parts = -(-sum_bytes // (4 * WORDS))
        self._rows, self._row_bytes = rows, row_bytes
        self._whole = MEETINGS + self._parts * 2 * ranks * WORDS
        """Where gathered rows begin, in words of 64 bits."""
        bytes_in_all = -(-(8 * self._whole + rows * row_bytes) // _ALIGNED) * _ALIGNED
        self.block = torch.zeros(bytes_in_all, dtype=torch.uint8, device=device)
        """That others write to."""
        self._table: Tensor | None = None
        self._opened: list[ipc.MappedMemory] = []
        """Of the other ranks."""
        self._counts = torch.zeros(self._parts, dtype=torch.int32, device=device)
        self._meetings = torch.zeros(1, dtype=torch.int32, device=device)
        self._over = torch.zeros(2, dtype=torch.int32, device=device)
        """[Given up, 1 + the rank that was waited for then]."""
        self._said = torch.ones(1, dtype=torch.int32, pin_memory=device.type == "cuda")
        # Kernels that wait keep the stream of the steps busy.
        self._aside = _cuda.Stream(device) if device.type == "cuda" else None
        self.given_up = False
        """Whether what was computed last is of no use."""

    def reach(self, places: Sequence[int]) -> None:
        """`places`: where the block of each rank begins, as this process's GPU sees it."""
        assert len(places) == self.ranks and places[self.rank] == self.block.data_ptr()
        self._table = torch.tensor(list(places), dtype=torch.int64).to(self.block.device)

    def open(self, offers: Sequence[bytes]) -> None:
        """Reaches what the ranks offered (`ipc.offered`). Raises `ipc.NoAccess`; `close` is due then too."""
        places: list[int] = []
        for rank, offer in enumerate(offers):
            if rank != self.rank:
                self._opened.append(ipc.MappedMemory(offer))
            places.append(self.block.data_ptr() if rank == self.rank else self._opened[-1].at)
        self.reach(places)

    @property
    def reaches(self) -> bool:
        return self._table is not None

    def columns(self, dtype: torch.dtype) -> int:
        """Of the rows that are gathered, on each rank."""
        return self._row_bytes // dtype.itemsize // self.ranks

    # ---- calls of all ranks ----------------------------------------------------------------------------------------
    def sums(self, x: Tensor) -> bool:
        """Whether `sum` takes a value like this: contiguous, float32 or bfloat16, whole words of 32 bits, not empty and
        not too large."""
        size = x.numel() * x.element_size()
        fits = 0 < size <= 4 * WORDS * self._parts and size % 4 == 0
        return fits and x.dtype in (torch.float32, torch.bfloat16) and x.is_contiguous()

    def sum(self, x: Tensor, out: Tensor) -> None:
        """out = the sum of every rank's `x`, with the same bits on all; `out` may be `x`."""
        words, into = x.view(-1).view(torch.int32), out.view(-1).view(torch.int32)
        early = launching.early(x)
        device_code("peers").add_up[(-(-words.numel() // WORDS),)](
            words, into, self._table, self._over, self._counts, words.numel(), RANK=self.rank, RANKS=self.ranks,
            FIRST=MEETINGS, WORDS=WORDS, HALVES=x.dtype == torch.bfloat16, EARLY=early, num_warps=_WARPS,
            **launching.options(early),
        )  # fmt: skip

    def gathers(self, x: Tensor) -> bool:
        """Whether `gather` takes a value like this: [rows, columns], contiguous, rows of whole words of 32 bits."""
        row = x.shape[-1] * x.element_size()
        fits = x.dim() == 2 and 0 < x.shape[0] <= self._rows and row * self.ranks == self._row_bytes
        return fits and row % 4 == 0 and x.is_contiguous()

    def gather(self, x: Tensor) -> Tensor:
        """[rows, ranks * columns]: every rank's columns of the same rows, side by side; valid until the next call."""
        rows, width = x.shape[0], x.shape[1] * x.element_size() // 4
        device = device_code("peers")
        words = x.view(torch.int32)
        device.spread[(-(-width // _BLOCK), rows)](
            words, self._table, width, self._whole, RANK=self.rank, RANKS=self.ranks, BLOCK=_BLOCK, num_warps=4
        )  # fmt: skip
        device.meet[(1,)](self._table, self._over, self._meetings, RANK=self.rank, RANKS=self.ranks, num_warps=1)
        whole = self.block[8 * self._whole :][: rows * self._row_bytes].view(x.dtype)
        return whole.view(rows, self.ranks * x.shape[1])

    # ---- ends ------------------------------------------------------------------------------------------------------
    def give_up(self) -> None:
        """Whoever waits here for others waits no more, and what it computes is of no use. From any thread."""
        self.given_up = True
        if self._aside is None:
            self._over[:1] = self._said
            return
        try:
            with _cuda.stream(self._aside):
                self._over[:1].copy_(self._said, non_blocking=True)
        except RuntimeError as error:  # the GPU is lost to this process: nothing waits on it
            log.warning("a GPU that waits for others is not told that they are given up: %s", error)

    def close(self) -> None:
        """Lets go of the memory of others: a process may have several engines. Nothing here runs any more."""
        self._table = None
        while self._opened:
            try:
                self._opened.pop().close()
            except ipc.NoAccess as error:  # the GPU is lost to this process
                log.warning("memory of another GPU is held until this process ends: %s", error)

    @property
    def late(self) -> int | None:
        """The rank that something here waited for when it was given up; known once that has ended."""
        found = int(self._over[1])
        return found - 1 if found else None


def reached(memory: PeerMemory, gather: Callable[[bytes], list[bytes]], seconds: float) -> str | None:
    """Lets all ranks' memory reach each other's and tries it; why that cannot be, None where it can, on all alike.
    `gather`: what every rank gave, of one length. `seconds`: how long the trial waits for the others."""
    offer, why = b"", ""
    try:
        offer = ipc.offered(memory.block)
    except ipc.NoAccess as reason:
        why = str(reason)
    offers = gather(offer.ljust(ipc.OFFER_BYTES, b"\0"))
    try:
        if all(any(one) for one in offers):
            memory.open(offers)
    except ipc.NoAccess as reason:
        why = str(reason)
    if not _all(gather, memory.reaches):
        return why or "another GPU does not let others into its memory"
    return None if _all(gather, _tried(memory, seconds)) else "sums in each other's memory are wrong, or never come"


def _all(gather: Callable[[bytes], list[bytes]], mine: bool) -> bool:
    return all(one == b"\1" for one in gather(b"\1" if mine else b"\0"))


def _tried(memory: PeerMemory, seconds: float) -> bool:
    """Whether sums and gathers of small numbers, which have no rounding, are right; twice as often as there are halves
    that take turns, also behind a wrong one: the other ranks wait for each."""
    device = memory.block.device
    x = torch.arange(4 * WORDS, dtype=torch.float32, device=device) % 61 + memory.rank
    wanted = memory.ranks * (x - memory.rank) + memory.ranks * (memory.ranks - 1) // 2
    rows = memory.columns(torch.float32)
    right = torch.ones((), dtype=torch.bool, device=device)
    for turn in range(4):
        total, mine = torch.empty_like(x), x + turn
        memory.sum(mine, total)
        whole = memory.gather(torch.full((2, rows), float(memory.rank + turn), device=device))
        held = whole.view(2, memory.ranks, rows)
        meant = (torch.arange(memory.ranks, device=device) + turn).view(1, -1, 1)
        right &= (total == wanted + memory.ranks * turn).all() & (held == meant).all()
        if not _in_time(memory, device, seconds):
            return False
    return bool(right)


def _in_time(memory: PeerMemory, device: torch.device, seconds: float) -> bool:
    if device.type != "cuda":
        return True
    event, until = _cuda.Event(), time.monotonic() + seconds
    event.record()
    while not event.query():
        if time.monotonic() > until:
            memory.give_up()
            return False
        time.sleep(1e-4)
    return True

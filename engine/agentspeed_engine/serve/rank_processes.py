"""The other ranks of a model: started beside rank 0, waited for while they start, watched, and ended with it."""

from __future__ import annotations

import logging
import os
import queue
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

import msgspec

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.protocol.messages import RankView
from agentspeed_engine.serve.rank_memory import RankMemory, memory_of
from agentspeed_engine.serve.rank_options import Files, RankOptions, opened_group
from agentspeed_engine.serve.rank_process import STOP_SECONDS, RankProcess

if TYPE_CHECKING:
    from agentspeed_engine.exec.ranks.group import Group
    from agentspeed_engine.exec.ranks.sides import Followers

_LOG: Final = logging.getLogger("agentspeed.engine")
_NEWS_SECONDS = 2.0
"""How long after a step went wrong one looks whether a rank has died."""
_START_SECONDS: Final = 300.0
"""How long a rank may say nothing while it starts, or `rank_seconds` where that is longer: it tells each
hundredth of its weights and each graph."""
_ENDING: Final = 5.0
"""Seconds that what ranks do together has to end in, once one of them is given up."""
_LOOKS: Final = 0.2
"""Seconds between two looks at ranks that start."""
_REMEDY: Final = "Sessions go on in a new engine; what the rank said last is in the log."


@final
class RankProcesses:
    """All but rank 0, and rank 0's side of the group."""

    def __init__(self, options: RankOptions, say: Callable[[str], None]) -> None:
        """Starts them; they load from now on. `options` are those of rank 0. Raises `EngineFault`."""
        self._options, self._say = options, say
        self._news: queue.SimpleQueue[tuple[RankProcess, Any]] = queue.SimpleQueue()
        self._lost = threading.Event()
        self._lock = threading.Lock()
        self._report: Callable[[EngineFault], None] | None = None
        self._closing = False
        self._memory: RankMemory | None = None
        self._folder: Path | None = None
        self.all: list[RankProcess] = []
        self._followers: dict[int, Followers] = {}
        self._group: Group | None = None
        self._late: int | None = None
        """The rank that rank 0 waited for in vain."""
        self._shares = False
        """Ranks sum in shared memory."""
        self._starting = True
        try:
            self._memory = memory_of(options)
            self._folder = Path(tempfile.mkdtemp(prefix="agentspeed-ranks-"))
            self._options = msgspec.structs.replace(options, meet=str(self._folder))
            for rank in range(1, options.dp * options.tp):
                theirs = msgspec.structs.replace(self._options, rank=rank)
                self.all.append(RankProcess(theirs, self._files(rank), self._heard))
        except (OSError, RuntimeError) as error:
            self.close()
            raise EngineFault(
                "out_of_memory", f"Rank {len(self.all) + 1} could not be started: {error}.", "Raise `ulimit -u`."
            ) from error

    def group(self) -> Group:
        """Rank 0's side. With torch.distributed it returns when all have met, and one that ends
        before is noticed at once. Raises `EngineFault`."""
        if self._group is None:
            try:
                self._group = opened_group(self._options, self._files(0), lambda: self._await("arrived"))
            except EngineFault as fault:
                dead = next((one for one in self.all if one.ended), None)
                raise (fault if dead is None else self._fault_of(dead)) from fault
            from agentspeed_engine.exec.ranks.group import SharedMemory

            self._shares = isinstance(self._group, SharedMemory)  # so it is for all, and nobody meets in the folder
            if self._shares:
                self._leave_folder()
        return self._group

    def followers(self, dp_rank: int) -> Followers:
        """Rank 0's lines to the others of a dp rank."""
        # Imported late, with the tensors that it needs.
        from agentspeed_engine.exec.ranks.sides import Followers

        if dp_rank not in self._followers:
            first, end = max(1, dp_rank * self._options.tp), (dp_rank + 1) * self._options.tp
            theirs = [one for one in self.all if first <= one.rank < end]
            self._followers[dp_rank] = Followers(
                [one.steps for one in theirs],
                [one.copies for one in theirs],
                seconds=self._options.seconds,
                first=first,
            )
        return self._followers[dp_rank]

    def await_loaded(self) -> None:
        """Blocks until all wait for an order to capture graphs, and gives it. Raises `EngineFault` where one cannot."""
        self._await("loaded")
        for dp_rank in range(self._options.dp):
            self.followers(dp_rank).begin()

    def await_readiness(self) -> None:
        """Blocks until all have loaded. Raises `EngineFault` where one cannot, or says nothing for long."""
        self._await("ready")
        self._starting = False

    def together(self, work: Callable[[], None]) -> None:
        """Does what all ranks do at this point of the start, in a thread that ends with it (`serve.aside`). Raises what
        `work` raises, and `EngineFault` where a rank says nothing for long: this one may wait for it, on a GPU, where
        nothing else ends that."""
        raised: list[BaseException] = []

        def carried_out() -> None:
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - raised below
                raised.append(error)

        thread = threading.Thread(target=carried_out, name="agentspeed-start", daemon=True)
        began = time.monotonic()
        thread.start()
        while thread.is_alive():
            thread.join(_LOOKS)
            if not thread.is_alive():
                break
            fault = self._silent((one for one in self.all if not one.start.ready), began)
            if fault is not None:
                self.abandon()
                thread.join(_ENDING)
                if thread.is_alive():  # to close it would wait for what never ends; it ends with the process
                    self._group = None
                raise fault
        if raised:
            raise raised[0]

    def _await(self, what: str) -> None:
        """Until all have said it. Raises `EngineFault` where one ends before, or says nothing for long."""
        waiting, began = {one.rank for one in self.all}, time.monotonic()
        while waiting:
            try:
                one, said = self._news.get(timeout=_LOOKS)
            except queue.Empty:
                if (fault := self._silent((one for one in self.all if one.rank in waiting), began)) is not None:
                    raise fault from None
                continue
            if said is None:
                raise self._fault_of(one)
            if "progress" in said:
                self._say(f"rank {one.rank}: {said['progress']}")
            elif what in said:
                waiting.discard(one.rank)

    def watch(self, report: Callable[[EngineFault], None]) -> None:
        """`report` is told when one ends that was not told to, from a thread; at once where one has already."""
        with self._lock:
            self._report = report
            dead = next((one for one in self.all if one.ended), None)
        if dead is not None:
            report(self._fault_of(dead))

    def fault(self, error: Exception) -> EngineFault | None:
        """Why a step or a copy went wrong, if a rank is the reason: it has ended, or it does not answer."""
        from agentspeed_engine.exec.ranks.group import GroupBroken

        late = error.late if isinstance(error, GroupBroken) else None
        if late is not None:
            self._late = late
        elif not self._closing:
            _ = self._lost.wait(_NEWS_SECONDS)
        dead = next((one for one in self.all if one.ended), None)
        if dead is not None or late is not None:
            return self._fault_of(dead)
        if isinstance(error, TimeoutError):
            return EngineFault("rank_lost", f"A rank took no order for {self._seconds}.", _REMEDY)
        if isinstance(error, GroupBroken):
            if (fault := self._absent()) is not None:
                return fault
            return EngineFault("rank_lost", f"The ranks did not come together: {error}.", _REMEDY)
        return None

    def views(self) -> tuple[RankView, ...]:
        """Of every rank, rank 0 first."""
        pids = (os.getpid(), *(one.pid for one in self.all))
        memory = self._memory if self._shares else None
        return tuple(
            RankView(
                rank=rank,
                pid=pid,
                memory=_resident(pid),
                waited=None if memory is None else memory.waited(rank),
                dp=rank // self._options.tp,
            )
            for rank, pid in enumerate(pids)
        )

    def abandon(self) -> None:
        """They are told to end, and who waits for one waits no more: what they were doing does not count."""
        with self._lock:
            self._closing = True
        if self._group is not None:
            self._group.abandon()
        for one in self.all:
            one.tell_end()

    def close(self) -> None:
        """Ends them; none is left when it returns."""
        self.abandon()
        # One that is stopped or stuck, for which the engine ends, will not end by itself.
        until = time.monotonic() + (0.0 if self._lost.is_set() else STOP_SECONDS)
        for one in self.all:
            one.end(until)
        if self._memory is not None:
            self._memory.close()
            self._memory = None
        if self._group is not None:
            self._group.close()
            self._group = None
        self._leave_folder()

    def _files(self, rank: int) -> Files | None:
        return None if self._memory is None else self._memory.files(rank)

    def _leave_folder(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _heard(self, one: RankProcess, said: Any) -> None:
        """From the threads that read."""
        self._news.put((one, said))
        if said is not None:
            return
        with self._lock:
            report = None if self._closing else self._report
            if not self._closing and self._group is not None:
                self._group.abandon()  # whoever waits for it shall not
        self._lost.set()
        if report is not None:
            report(self._fault_of(one))

    @property
    def _seconds(self) -> str:
        return f"{self._options.seconds:g} s (rank_seconds)"

    def _fault_of(self, one: RankProcess | None) -> EngineFault:
        """The first cause, of which the others may be effects: what a rank could not do, one that was killed, one that
        hangs, a bug, and one that ended somehow (`one`)."""
        self._hear_out()
        named = [rank.fault for rank in self.all if rank.fault is not None]
        if (plain := next((fault for fault in named if fault.code != "internal"), None)) is not None:
            return plain
        if (killed := next((rank for rank in self.all if rank.ended.startswith("was killed")), None)) is not None:
            return _loss(killed.rank, killed.pid, killed.ended)
        alive = {0: os.getpid()} | {rank.rank: rank.pid for rank in self.all if not rank.ended}
        hangs = next((rank for rank in self._waited_for() if rank in alive), None)
        if hangs is not None:
            self._lost.set()
            return _loss(hangs, alive[hangs], f"did not answer for {self._seconds}")
        if named:
            return named[0]
        if one is not None and one.left and (absent := self._absent()) is not None:
            return absent
        ended = next((rank for rank in self.all if rank.ended and not rank.left), one)
        if ended is None:
            return EngineFault("rank_lost", "The ranks did not come together.", _REMEDY)
        return _loss(ended.rank, ended.pid, f"gave up: {ended.left}" if ended.left else ended.ended)

    def _silent(self, among: Iterable[RankProcess], since: float) -> EngineFault | None:
        """Of ranks that start: the one that has been silent for longest, where that is too long. It counts from `since`
        on, when rank 0 began to wait: what takes rank 0 long takes the others as long."""
        limit = max(_START_SECONDS, self._options.seconds)
        first = min((one for one in among if not one.ended), key=lambda one: one.start.heard, default=None)
        if first is None or time.monotonic() - max(first.start.heard, since) <= limit:
            return None
        self._lost.set()
        return _loss(first.rank, first.pid, f"said nothing for {limit:g} s while it started{_last(first)}")

    def _absent(self) -> EngineFault | None:
        """Ranks that start waited in vain, and none knows for whom: it is the one that is at it still."""
        if not self._starting:
            return None
        time.sleep(_NEWS_SECONDS)  # those that waited end one after the other
        still = [one for one in self.all if not (one.ended or one.left or one.start.ready)]
        if not still:
            return None
        self._lost.set()
        first = min(still, key=lambda one: one.start.heard)
        return _loss(first.rank, first.pid, f"did not come to the others within {self._seconds}{_last(first)}")

    def _hear_out(self) -> None:
        """Along two axes one rank may wait for another that waits for a third: each says so, but not at once."""
        if self._options.lock_step and self._options.tp > 1 and self._waited_for() and not self._closing:
            time.sleep(_NEWS_SECONDS)

    def _waited_for(self) -> list[int]:
        """Whom ranks waited for in vain; first those that waited for nobody."""
        late = {rank.rank: rank.late for rank in self.all if rank.late is not None}
        if self._late is not None:
            late[0] = self._late
        return sorted(late.values(), key=lambda rank: rank in late)


def _last(one: RankProcess) -> str:
    return f"; the last that it said of its start: {one.start.doing}"


def _loss(rank: int, pid: int, how: str) -> EngineFault:
    return EngineFault("rank_lost", f"Rank {rank} (process {pid}) {how}.", _REMEDY)


def _resident(pid: int) -> int:
    """Bytes of memory that a process has; 0 where the system does not say."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")

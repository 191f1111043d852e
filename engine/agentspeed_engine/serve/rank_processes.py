"""The other ranks of a model as processes: started beside rank 0, watched, told apart in the log, and ended with it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, final

import msgspec

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.protocol.messages import RankView
from agentspeed_engine.serve.import_path import with_import_path
from agentspeed_engine.serve.rank_memory import RankMemory, memory_of
from agentspeed_engine.serve.rank_options import Files, RankOptions, opened_group

if TYPE_CHECKING:
    from agentspeed_engine.exec.ranks.group import Group
    from agentspeed_engine.exec.ranks.sides import Followers

_LOG: Final = logging.getLogger("agentspeed.engine")
_STOP_SECONDS = 2.0
"""What a rank gets to end by itself."""
_NEWS_SECONDS = 2.0
"""How long after a step went wrong one looks whether a rank has died."""
_LEVELS: Final = ("DEBUG ", "INFO ", "WARNING ", "ERROR ", "CRITICAL ")
_REMEDY: Final = "Sessions go on in a new engine; what the rank said last is in the log."


@final
class RankProcess:
    """One of them. Two threads of it read what it says."""

    def __init__(self, options: RankOptions, memory: Files | None, heard: Callable[[RankProcess, Any], None]) -> None:
        """`heard`: called with each line of its status, and with None when it has ended. Raises `OSError`
        and `RuntimeError` where the system gives no process, thread or descriptor, and leaves none."""
        self.rank = options.rank
        self.fault: EngineFault | None = None
        """What it named before it ended."""
        self.left = ""
        """Why it ended, where others did not come."""
        self.late: int | None = None
        """The rank that it waited for in vain."""
        self._heard = heard
        self._threads: tuple[threading.Thread, ...] = ()
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
            self.steps, steps = _pair(ours, theirs)
            self.copies, copies = _pair(ours, theirs)
            status, their_status = os.pipe()
            theirs.callback(os.close, their_status)
            self._status = ours.enter_context(open(status, encoding="utf-8"))
            shared = {} if memory is None else {"--tp-memory": memory.tp, "--dp-memory": memory.dp}
            fds = (steps, copies, their_status, *(file for file in shared.values() if file is not None))
            words = ["--options", msgspec.json.encode(options).decode(), "--steps", str(steps), "--copies", str(copies)]
            words += ["--status", str(their_status), *(() if memory is None else ("--shared",))]
            words += [word for name, file in shared.items() if file is not None for word in (name, str(file))]
            # Linux ends a rank with the thread that started it, which has to be one that lasts as long as the engine.
            if threading.current_thread() is threading.main_thread():
                words += ["--leader", str(os.getpid())]
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "agentspeed_engine.serve.rank", *words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=_environment(options),
                pass_fds=fds,
            )
            ours.callback(self._stop)
            assert self._process.stdout is not None
            self._threads = (
                threading.Thread(target=self._read, name=f"agentspeed-rank-{self.rank}", daemon=True),
                threading.Thread(
                    target=self._log, args=(self._process.stdout,), name="agentspeed-rank-log", daemon=True
                ),
            )
            for thread in self._threads:
                thread.start()
            _ = ours.pop_all()  # it stays: `end` gives everything back

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def ended(self) -> str:
        """How; empty while it runs."""
        status = self._process.poll()
        if status is None:
            return ""
        return f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"

    def tell_end(self) -> None:
        """By the end of its stdin and of its lines; whoever waits at those, here or there, waits no more."""
        for line in (self.steps, self.copies):
            with contextlib.suppress(OSError):  # it has ended already
                line.shutdown(socket.SHUT_RDWR)
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()

    def end(self, until: float) -> None:
        """Waits until then, then kills it."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, until - time.monotonic()))
        self._stop()
        self.steps.close()
        self.copies.close()

    def _stop(self) -> None:
        """At once."""
        self._process.kill()
        self._process.wait()
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        for thread in self._threads:
            if thread.ident is not None:  # one that could not be started reads nothing
                thread.join(_STOP_SECONDS)
        if self._threads[-1].ident is None and self._process.stdout is not None:
            self._process.stdout.close()

    def _read(self) -> None:
        with self._status as lines:
            for line in lines:
                said = json.loads(line)
                if "code" in said:
                    self.fault = EngineFault(said["code"], f"Rank {self.rank}: {said['message']}", said["remedy"])
                elif "left" in said:
                    self.left, self.late = said["left"], said["late"]
                self._heard(self, said)
        self._process.wait()
        self._heard(self, None)

    def _log(self, output: IO[bytes]) -> None:
        """Keeps the level in front, where the log of whoever started the engine looks for it."""
        with output:
            for raw in output:
                text = raw.decode("utf-8", "replace").rstrip()
                level = next((level for level in _LEVELS if text.startswith(level)), "")
                print(f"{level}rank {self.rank}: {text.removeprefix(level)}", file=sys.stderr, flush=True)


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
        """Blocks until all have loaded. Raises `EngineFault` where one cannot."""
        self._await("ready")

    def _await(self, what: str) -> None:
        """Until all have said it. Raises `EngineFault` where one ends before."""
        waiting = {one.rank for one in self.all}
        while waiting:
            one, said = self._news.get()
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
        until = time.monotonic() + (0.0 if self._lost.is_set() else _STOP_SECONDS)
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
        ended = next((rank for rank in self.all if rank.ended and not rank.left), one)
        if ended is None:
            return EngineFault("rank_lost", "The ranks did not come together.", _REMEDY)
        return _loss(ended.rank, ended.pid, f"gave up: {ended.left}" if ended.left else ended.ended)

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


def _loss(rank: int, pid: int, how: str) -> EngineFault:
    return EngineFault("rank_lost", f"Rank {rank} (process {pid}) {how}.", _REMEDY)


def _pair(ours: contextlib.ExitStack, theirs: contextlib.ExitStack) -> tuple[socket.socket, int]:
    """(Our end, the descriptor of theirs), closed with `ours` and with `theirs`."""
    mine, other = socket.socketpair()
    theirs.callback(other.close)
    return ours.enter_context(mine), other.fileno()


def visible_gpus(rank: int, ranks: int) -> str:
    """For CUDA_VISIBLE_DEVICES of a rank: its own GPU first, which is the one that it takes. It sees the others behind
    it, for they write into each other's memory."""
    named = [one for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one]
    visible = named or [str(other) for other in range(ranks)]
    own = visible[rank] if rank < len(visible) else str(rank)
    return ",".join([own, *(one for one in visible if one != own)])


def _environment(options: RankOptions) -> dict[str, str]:
    said = with_import_path(os.environ)
    if options.device == "cuda":
        said["CUDA_VISIBLE_DEVICES"] = visible_gpus(options.rank, options.dp * options.tp)
    return said


def _resident(pid: int) -> int:
    """Bytes of memory that a process has; 0 where the system does not say."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")

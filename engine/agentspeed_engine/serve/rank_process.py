"""One rank beside rank 0 as a process: how it is started, what it says of its start and end, and how it is ended."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import IO, Any, Final, final

import msgspec

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.serve.import_path import with_import_path
from agentspeed_engine.serve.rank_options import Files, RankOptions

STOP_SECONDS = 2.0
"""What a rank gets to end by itself."""
_LEVELS: Final = ("DEBUG ", "INFO ", "WARNING ", "ERROR ", "CRITICAL ")


@final
class RankStart:
    """How far the start of a rank is, by what it said."""

    def __init__(self) -> None:
        self.doing = "nothing yet"
        self.ready = False
        self.heard = time.monotonic()
        """When it said something last."""

    def hear(self, said: Mapping[str, Any]) -> None:
        self.heard = time.monotonic()
        if "arrived" in said:
            self.doing = "meeting the others"
        elif "loaded" in said:
            self.doing = "capturing steps"
        else:
            self.doing = said.get("doing", said.get("progress", self.doing))
        self.ready |= "ready" in said


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
        self.start = RankStart()
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
                thread.join(STOP_SECONDS)
        if self._threads[-1].ident is None and self._process.stdout is not None:
            self._process.stdout.close()

    def _read(self) -> None:
        with self._status as lines:
            for line in lines:
                said = json.loads(line)
                self.start.hear(said)
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

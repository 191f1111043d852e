"""Engine processes: started by `subprocess`, shared by model and options, ended when nobody needs them."""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast, final
from weakref import WeakSet

from agentspeed import errors
from agentspeed.backends.faults import public_error

if TYPE_CHECKING:
    from io import BufferedReader, TextIOWrapper

_LOG = logging.getLogger("agentspeed.engine")
_IDLE_SECONDS = 60.0
_STOP_SECONDS = 5.0
ATTACH = "AGENTSPEED_ENGINE"
"""Environment variable: the socket path of a running engine to use instead of starting one."""
_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 36),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
"""glibc then keeps large tensors instead of giving their pages back and faulting them in again at every step; it reads
these once, at process start. What the user's environment says goes first."""
_SPINS = {"GOMP_SPINCOUNT": "1000"}
"""OpenMP's threads spin at every barrier, 300,000 times unless told otherwise. Where another process uses a core, that
is time the awaited thread does not get: beside one busy process on two cores a token of the shipped model took 10.9 ms,
and takes 4.3 with this; where nothing else runs it takes 4.6 instead of 2.9 (docs/performance.md). Whoever set
OMP_WAIT_POLICY has chosen, and this would override it."""


@final
class EngineProcess:
    """One engine process, which loads from now on, and the socket it will listen on."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        """Raises `ExtraMissing` where there is nothing to start."""
        if importlib.util.find_spec("torch") is None:
            raise errors.ExtraMissing("A local engine needs PyTorch, which is not installed.",
                                      remedy="Install agentspeed[engine].")
        self._maker = os.getpid()
        self._folder = Path(tempfile.mkdtemp(prefix="agentspeed-"))
        self.socket_path = self._folder / "engine.sock"
        command = [sys.executable, "-m", "agentspeed_engine.run", "--socket", str(self.socket_path),
                   "--options", json.dumps(dict(options))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         stderr=subprocess.PIPE, env=_environment(), text=True)
        assert self._process.stderr is not None
        self._complaints: list[str] = []
        self._recording: str | None = None
        self._log_thread = threading.Thread(target=self._log, args=(self._process.stderr,),
                                            name="agentspeed-engine-log", daemon=True)
        self._log_thread.start()
        _processes.add(self)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def wait_for_death(self) -> None:
        """A process whose link broke is likely dying: gives it a moment, so that nobody connects to a corpse."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)

    def obituary(self) -> str:
        """Of a process that is dead: how it ended, and where to look; empty after an orderly end."""
        status = self._process.poll()
        if not status:
            return ""
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        where = f" What its scheduler did until then: agentspeed replay {self._recording}" if self._recording else ""
        return f"The engine process {self.pid} {how}; sessions go on in a new one.{where}"

    def stop(self) -> None:
        """Ends the process: end of file, then SIGTERM, then SIGKILL, each given its time. Only its maker can."""
        if self._maker != os.getpid():
            return
        for end in (self._end_of_file, self._process.terminate, self._process.kill):
            if self._process.poll() is not None:
                break
            end()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_SECONDS)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._log_thread.join(_STOP_SECONDS)
        if self._process.stderr is not None:
            self._process.stderr.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _end_of_file(self) -> None:
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()

    def kill(self) -> None:
        """Ends it at once; who waits for it to be ready is told."""
        if self._maker == os.getpid():
            self._process.kill()

    def let_go(self) -> None:
        """In a process that was forked off, where the engine is the parent's: closes this copy of the pipes, so that
        their end is the parent's alone. It goes past the buffers, whose locks a thread that is not here may hold."""
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                cast("TextIOWrapper[BufferedReader]", pipe).buffer.raw.close()
        _ = self._process.poll()  # no child of this process: `subprocess` forgets it

    def await_readiness(self) -> None:
        """Blocks until it listens. Raises `EngineStartFailed`, or the public error of what the engine refused (model,
        options)."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            said = json.loads(line)
            if "ready" in said:
                self._recording = said["recording"]
                return
        status = self._process.wait()
        self._log_thread.join(_STOP_SECONDS)
        self.stop()
        refusal = _refusal(self._complaints)
        if refusal is not None:
            raise refusal
        tail = " | ".join(self._complaints[-3:])
        raise errors.EngineStartFailed(f"The engine process ended with status {status} before it was ready: {tail}",
                                       remedy="Its whole output is in the log `agentspeed.engine`.")

    def _log(self, output: IO[str]) -> None:
        for line in output:
            text = line.rstrip()
            self._complaints.append(text)
            del self._complaints[:-50]
            _LOG.info("engine %d: %s", self._process.pid, text)


def _refusal(complaints: list[str]) -> errors.AgentspeedError | None:
    """What the engine said when it refused to start, as a public error."""
    for line in reversed(complaints):
        if line.startswith("{"):
            with contextlib.suppress(ValueError):
                said = json.loads(line)
                if isinstance(said, dict) and "code" in said:
                    return public_error(said["code"], said["message"], said.get("remedy", ""))
    return None


def _environment() -> dict[str, str]:
    """The child finds the engine where this process found it, installed or not."""
    spec = importlib.util.find_spec("agentspeed_engine")
    kernels = importlib.util.find_spec("agentspeed_kernels")
    paths = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    for found in (spec, kernels):
        if found is not None and found.submodule_search_locations:
            paths.append(str(Path(next(iter(found.submodule_search_locations))).parent))
    spins = {} if "OMP_WAIT_POLICY" in os.environ else _SPINS
    return {**_MALLOC, **spins, **os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}


def open_socket(path: Path) -> socket.socket:
    """A connected socket. Raises `ConnectFailed` when nobody listens there."""
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        peer.connect(str(path))
    except OSError as error:
        peer.close()
        attached = bool(os.environ.get(ATTACH)) and Path(os.environ[ATTACH]).resolve() == path.resolve()
        raise errors.ConnectFailed(
            f"No engine listens at {path}: {error}.",
            remedy=f"Start one, or {f'unset {ATTACH}' if attached else 'give the path of another'}.") from error
    return peer


@final
class EngineSlot:
    """The place of one engine: its process is started on first use and again after a death."""

    def __init__(self, options: Mapping[str, Any], *, attach: Path | None = None) -> None:
        self.options = dict(options)
        self._maker = os.getpid()
        self._attach = attach
        self._process: EngineProcess | None = None
        self._lock = threading.Lock()
        self._wanted = 0
        self._starting: EngineProcess | None = None
        self._wanting = threading.Lock()
        """Around the two above; `_lock` may be held for as long as an engine takes to start."""
        self.users = 0
        self.idle_since: float | None = None
        self._closed = False

    @property
    def pid(self) -> int | None:
        """Of the engine process this slot started; None before the first use and for an attached engine."""
        process = self._process
        return None if process is None else process.pid

    def want(self, change: int) -> None:
        """See `local.Opener`."""
        if self._maker != os.getpid():
            return
        with self._wanting:
            self._wanted += change
            if self._wanted == 0 and self._starting is not None:
                self._starting.kill()

    def open(self, *, after_death: bool) -> socket.socket:
        """A socket to a living engine; starts one when there is none. `after_death`: a link to it just broke."""
        if self._attach is not None:
            return open_socket(self._attach)
        if self._maker != os.getpid():
            # Before any lock: a thread of the parent, which is not here, may hold it for ever.
            raise errors.SessionClosed(
                f"This engine belongs to process {self._maker}, which this one, {os.getpid()}, was forked off.",
                remedy="Open a session, or make an Engine, after the fork.")
        with self._lock:
            if self._closed:
                raise errors.SessionClosed("This engine was closed.", remedy="Make a new Engine.")
            if after_death and self._process is not None:
                self._process.wait_for_death()
            if self._process is not None and not self._process.alive:
                if news := self._process.obituary():
                    _LOG.warning("%s", news)
                self._process.stop()
                self._process = None
            if self._process is None:
                self._process = self._started()
            return open_socket(self._process.socket_path)

    def _started(self) -> EngineProcess:
        process = EngineProcess(self.options)
        with self._wanting:
            self._starting = process
            if self._wanted == 0:
                process.kill()
        try:
            process.await_readiness()
        finally:
            with self._wanting:
                self._starting = None
        return process

    def close(self) -> None:
        """Ends the process, if this slot started one. Blocks."""
        if self._maker != os.getpid():
            return
        with self._lock:
            self._closed = True
            process, self._process = self._process, None
        if process is not None:
            process.stop()


_processes: WeakSet[EngineProcess] = WeakSet()
_shared: dict[str, EngineSlot] = {}
_shared_lock = threading.Lock()


def acquire(options: Mapping[str, Any], files: str = "") -> EngineSlot:
    """The process-wide engine of these options, counted; give it back with `release`. `files` tells apart models that
    stood, one after the other, in the same folder."""
    attach = os.environ.get(ATTACH)
    if attach and (unused := sorted(set(options) - {"model"})):
        _LOG.warning("%s names a running engine, which has options of its own: %s of this one are not used.", ATTACH,
                     ", ".join(unused))
    key = attach or json.dumps([dict(options), files], sort_keys=True)
    with _shared_lock:
        slot = _shared.get(key)
        if slot is None:
            slot = _shared[key] = EngineSlot(options, attach=Path(attach) if attach else None)
        slot.users += 1
        slot.idle_since = None
        return slot


def release(slot: EngineSlot) -> None:
    """The last user's release ends the engine after a minute without use."""
    with _shared_lock:
        slot.users -= 1
        if slot.users == 0:
            slot.idle_since = time.monotonic()
            timer = threading.Timer(_IDLE_SECONDS, _end_idle)
            timer.daemon = True
            timer.start()


def _end_idle() -> None:
    now = time.monotonic()
    with _shared_lock:
        idle = [key for key, slot in _shared.items()
                if slot.idle_since is not None and now - slot.idle_since >= _IDLE_SECONDS - 0.5]
        slots = [_shared.pop(key) for key in idle]
    for slot in slots:
        slot.close()


@atexit.register
def _end_all() -> None:
    with _shared_lock:
        slots = list(_shared.values())
        _shared.clear()
    for slot in slots:
        slot.close()


def _forked() -> None:
    """A process that is forked off begins with no engine: those here are its parent's, which goes on using them."""
    global _shared_lock
    _shared_lock = threading.Lock()
    for process in list(_processes):
        process.let_go()
    _processes.clear()
    _shared.clear()  # last: what is dropped with it would close the pipes through their buffers


os.register_at_fork(after_in_child=_forked)

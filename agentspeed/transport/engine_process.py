"""Engine processes: started by `subprocess`, shared by model and options, ended when no session needs them."""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import logging
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import IO, Any, Final, final
from weakref import WeakSet

import anyio.to_thread

from agentspeed import errors
from agentspeed.transport import launch
from agentspeed.transport.base import Connection
from agentspeed.transport.error_map import public_error, shown_credential
from agentspeed.transport.socket_folder import SocketFolder
from agentspeed.transport.socket_link import open_link
from agentspeed.usage import Starting

_LOG = logging.getLogger("agentspeed.engine")
_IDLE_SECONDS = 60.0
_STOP_SECONDS = 5.0
_NOOP: Final = "noop:"
"""Models of this name compute nothing, and need no PyTorch."""
_LONGEST_LINE: Final = 1 << 16
"""Bytes of an engine's output that are one line of the log."""
_LEVEL: Final = re.compile(r"(DEBUG|INFO|WARNING|ERROR|CRITICAL) ")
ATTACH = "AGENTSPEED_ENGINE"
"""Environment variable: the socket path of a running engine to use instead of starting one."""


@final
class EngineProcess:
    """One engine process, which loads from now on, and the socket it will listen on.

    It has three pipes: stdin, whose end tells it to end; a status pipe of its own, on which it says how far it is; and
    one for all that it or a library prints, which a thread puts into the log."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        """Raises `ExtraMissing` where there is nothing to start, and `EngineStartFailed`."""
        if not str(options.get("model")).startswith(_NOOP) and importlib.util.find_spec("torch") is None:
            raise errors.ExtraMissing(
                "A local engine needs PyTorch, which is not installed.", remedy="Install agentspeed[engine]."
            )
        self._maker = os.getpid()
        self._complaints: list[str] = []
        self._recording: str | None = None
        self._folder = SocketFolder()
        self.socket_path = self._folder.socket
        try:
            self._status, theirs = _pipe()
            try:
                self._process = _spawned(options, self._folder, theirs)
            except BaseException:
                self._status.close()
                raise
            finally:
                os.close(theirs)
        except OSError as error:
            self._folder.remove()
            raise errors.EngineStartFailed(
                f"The engine process could not be started: {error}.",
                remedy=f"See that {launch.PYTHON} or sys.executable is a python, and that `ulimit -u` and `ulimit -n` "
                "leave room for a process.",
            ) from error
        except BaseException:
            self._folder.remove()
            raise
        assert self._process.stdout is not None
        self._log_thread = threading.Thread(
            target=self._log, args=(self._process.stdout,), name="agentspeed-engine-log", daemon=True
        )
        try:
            self._log_thread.start()
        except RuntimeError as error:
            self.stop()
            raise errors.EngineStartFailed(
                f"No thread could be started to read what the engine says: {error}.", remedy="Raise `ulimit -u`."
            ) from error
        _processes.add(self)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def wait_for_death(self) -> None:
        """Waits a moment for a process whose link broke: it is likely ending, and a new link would break too."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)

    def obituary(self) -> str:
        """How the process ended, if it is dead, and the command that replays its recording; empty after an orderly
        end."""
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
        self._status.close()
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        if self._log_thread.ident is not None:
            self._log_thread.join(_STOP_SECONDS)
        if self._process.stdout is not None and not self._log_thread.is_alive():
            self._process.stdout.close()
        self._folder.remove()

    def _end_of_file(self) -> None:
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        self._process.send_signal(signal.SIGCONT)  # one that is stopped would not see it

    def kill(self) -> None:
        """Ends it at once; who waits for it to be ready is told."""
        if self._maker == os.getpid():
            self._process.kill()

    def let_go(self) -> None:
        """In a process that was forked off, where the engine is the parent's: closes this copy of the pipes and of the
        hold on the folder, so that their end is the parent's alone."""
        for pipe in (self._process.stdin, self._process.stdout, self._status):
            if pipe is not None:
                pipe.close()
        self._folder.let_go()
        _ = self._process.poll()  # no child of this process: `subprocess` forgets it

    def await_readiness(self, told: Callable[[Starting], object] = lambda how: None) -> None:
        """Blocks until it listens; `told` hears how far it is. Raises `EngineStartFailed`, or the public error of what
        the engine refused (model, options)."""
        refusal: errors.AgentspeedError | None = None
        how = Starting(text="starting", part=None)
        for said in _status_lines(self._status):
            if "ready" in said:
                self._recording = said["recording"]
                self._status.close()
                return
            if "progress" in said:
                _LOG.info("engine %d: %s", self._process.pid, said["progress"])
            if "progress" in said or "part" in said:
                how = Starting(text=said.get("progress", how.text), part=said.get("part", how.part))
                told(how)
            if "code" in said:
                refusal = public_error(said["code"], said["message"], said["remedy"])
        status = self._process.wait()
        self._log_thread.join(_STOP_SECONDS)
        self.stop()
        if refusal is not None:
            raise refusal
        ended = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        said_last = " | ".join(self._complaints[-3:])
        raise errors.EngineStartFailed(
            f"The engine process {ended} before it was ready: {said_last or 'it said nothing.'}",
            remedy="Its whole output is in the log `agentspeed.engine`."
            if said_last
            else f"See that {launch.PYTHON} or sys.executable is a python: another program may end without a word.",
        )

    def _log(self, output: IO[bytes]) -> None:
        """Until the process ends: a full pipe would stop it."""
        while raw := output.readline(_LONGEST_LINE):
            text = raw.decode("utf-8", "replace").rstrip()
            self._complaints.append(text)
            del self._complaints[:-50]
            level = logging.INFO
            if said := _LEVEL.match(text):
                level, text = logging.getLevelNamesMapping()[said[1]], text[said.end() :]
            try:
                _LOG.log(level, "engine %d: %s", self._process.pid, text)
            except Exception as error:  # noqa: BLE001 - a filter or handler of the program's: the engine goes on
                self._complaints.append(f"the log agentspeed.engine raised {error!r}")


def _pipe() -> tuple[FileIO, int]:
    """A pipe's end to read from, and the other. Raises `OSError`."""
    ours, theirs = os.pipe()
    return FileIO(ours), theirs


def _spawned(options: Mapping[str, Any], folder: SocketFolder, status: int) -> subprocess.Popen[bytes]:
    """Raises `OSError`."""
    said = ["--socket", str(folder.socket), "--own-folder", "--status-fd", str(status), "--options"]
    return subprocess.Popen(
        [*launch.command(), *said, json.dumps(dict(options))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        bufsize=0,
        env=launch.environment(),
        pass_fds=(status, folder.descriptor),
    )


def _status_lines(status: FileIO) -> Iterator[dict[str, Any]]:
    """What an engine says of its start, until it is ready or has ended."""
    rest = b""
    while data := status.read(_LONGEST_LINE):
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            yield json.loads(line)


def open_socket(path: Path) -> socket.socket:
    """A connected socket. Raises `ConnectFailed` when no engine listens there."""
    peer: socket.socket | None = None
    try:
        peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        peer.connect(str(path))
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        if peer is not None:
            peer.close()
        attached = bool(os.environ.get(ATTACH)) and Path(os.environ[ATTACH]).resolve() == path.resolve()
        remedy = f"Start one, or {f'unset {ATTACH}' if attached else 'give the path of another'}."
        if attached and "://" in os.environ[ATTACH]:
            remedy = f"{ATTACH} is the path of a socket; give a server's address to Session instead."
        raise errors.ConnectFailed(f"No engine listens at {path}: {error}.", remedy=remedy) from error
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
        self.listeners: list[Callable[[Starting], object]] = []
        """Who is told how far a start is, in the thread that waits for it."""
        self.users = 0
        self.idle_since: float | None = None
        self._closed = False

    @property
    def pid(self) -> int | None:
        """Of the engine process this slot started; None before the first use and for an attached engine."""
        process = self._process
        return None if process is None else process.pid

    async def connect(self, *, after_death: bool) -> Connection:
        """See `base.Transport`."""
        return await open_link(self, after_death=after_death, client="agentspeed", credential=shown_credential())

    async def close(self) -> None:
        """Ends the process, if this slot started one."""
        await anyio.to_thread.run_sync(self.end)

    def want(self, change: int) -> None:
        """See `socket_link.SocketSource`."""
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
                remedy="Open a session, or make an Engine, after the fork.",
            )
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
            if self._process is not None:
                try:
                    return open_socket(self._process.socket_path)
                except errors.ConnectFailed:
                    # It listens no more and has not ended yet: an engine that lost a rank, say, ends those left first.
                    self._process.stop()
                    if news := self._process.obituary():
                        _LOG.warning("%s", news)
            self._process = self._started()
            return open_socket(self._process.socket_path)

    def _started(self) -> EngineProcess:
        process = EngineProcess(self.options)
        with self._wanting:
            self._starting = process
            if self._wanted == 0:
                process.kill()
        try:
            process.await_readiness(self._tell)
        finally:
            with self._wanting:
                self._starting = None
        return process

    def _tell(self, how: Starting) -> None:
        for listener in tuple(self.listeners):
            try:
                listener(how)
            except Exception:  # noqa: BLE001 - a hook's bug does not end the start that it watches
                _LOG.exception("on_start %r raised", listener)

    def end(self) -> None:
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
_next_look: float | None = None
"""When the thread that ends idle engines looks next; None where none waits."""


def acquire(options: Mapping[str, Any], files: str = "") -> EngineSlot:
    """The process-wide engine of these options, counted; give it back with `release`. `files` tells apart models that
    stood, one after the other, in the same folder."""
    attach = os.environ.get(ATTACH)
    if attach and (unused := sorted(set(options) - {"model"})):
        _LOG.warning(
            "%s names a running engine, which has options of its own: %s of this one are not used.",
            ATTACH,
            ", ".join(unused),
        )
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
            _look_at(slot.idle_since + _IDLE_SECONDS)


def _look_at(when: float) -> None:
    """One thread waits for all engines that are idle, however often they were used. To be called under the lock."""
    global _next_look
    if _next_look is None or when < _next_look:
        timer = threading.Timer(max(0.0, when - time.monotonic()), _end_idle)
        timer.daemon = True
        timer.start()
        _next_look = when


def _end_idle() -> None:
    global _next_look
    now = time.monotonic()
    with _shared_lock:
        idle = [
            key
            for key, slot in _shared.items()
            if slot.idle_since is not None and now - slot.idle_since >= _IDLE_SECONDS - 0.5
        ]
        slots = [_shared.pop(key) for key in idle]
        _next_look = None
        if waiting := [slot.idle_since for slot in _shared.values() if slot.idle_since is not None]:
            _look_at(min(waiting) + _IDLE_SECONDS)
    for slot in slots:
        slot.end()


@atexit.register
def _end_all() -> None:
    with _shared_lock:
        slots = list(_shared.values())
        _shared.clear()
    for slot in slots:
        slot.end()


def _forked() -> None:
    """A process that is forked off begins with no engine: those here are its parent's, which goes on using them."""
    global _shared_lock, _next_look
    _shared_lock, _next_look = threading.Lock(), None
    for process in list(_processes):
        process.let_go()
    _processes.clear()
    _shared.clear()  # last: what is dropped with it would close the pipes through their buffers


os.register_at_fork(after_in_child=_forked)

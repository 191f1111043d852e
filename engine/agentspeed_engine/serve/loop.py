"""The loop thread: commands in, plans to the worker, results to the core, events out. It never blocks on a step."""

from __future__ import annotations

import contextlib
import dataclasses
import hmac
import logging
import os
import queue
import selectors
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import final

from msgspec.structs import replace

from agentspeed_engine.clock import Clock, MonotonicClock
from agentspeed_engine.errors import Code, EngineFault
from agentspeed_engine.exec.cpu import CpuExecutor
from agentspeed_engine.exec.executor import Executor
from agentspeed_engine.ids import LinkId
from agentspeed_engine.protocol.credential import CREDENTIAL_FILE
from agentspeed_engine.protocol.frames import BadFrame
from agentspeed_engine.protocol.messages import (
    PROTOCOL,
    Command,
    Failed,
    FilePart,
    GetModelFiles,
    GetStats,
    Hello,
    Look,
    Picture,
    ReadModelFile,
    Stats,
    Welcome,
    as_text,
)
from agentspeed_engine.sched.state import Out
from agentspeed_engine.serve.connections import Link
from agentspeed_engine.serve.listener import Listener
from agentspeed_engine.serve.model_files import ServedFiles
from agentspeed_engine.serve.options import Built
from agentspeed_engine.serve.recording import RecordingOrder
from agentspeed_engine.serve.schedulers import Heard, Schedulers
from agentspeed_engine.wording import counted

_LOG = logging.getLogger("agentspeed.engine")
_SWITCH_SECONDS = 0.0005
"""How soon a busy worker thread yields the interpreter to the loop thread."""
_JOIN_SECONDS = 5.0
"""How long a step in flight may take to end when the engine stops; the process ends anyway."""
_LONGEST_NAP = 3600.0
"""Seconds; a selector does not take what is over its 24 days, and asking again costs nothing."""
_MOST_STRANGERS = 64
"""Links that have not said Hello yet, beside `max_links`; one more turns the oldest of them away."""

_SAME_VERSION = "Use a client of the same version as the engine."
_LATER = "Close links that are not needed, raise max_links or `ulimit -n`, or try again later."


@final
class EngineLoop:
    """One engine: one core, one worker, any number of links."""

    def __init__(
        self,
        built: Built,
        *,
        outbox_bytes: int = 1 << 20,
        check: bool = False,
        clock: Clock | None = None,
        idle_seconds: float | None = None,
        recording: RecordingOrder | None = None,
        credential: str = "",
        executor: Executor | None = None,
    ) -> None:
        """`check`: run the ledger after every event. `idle_seconds` without a session end the loop. `credential`: what
        every greeting must show; empty asks for none. `executor`: None is one on this process's CPU. Raises
        `EngineFault` when the recording cannot be begun."""
        self._credential = credential.encode()
        self._source = built.source
        self._files = ServedFiles(Path(built.source) if built.source else None)
        self._idle_seconds = idle_seconds
        self._idle_since: float | None = None
        self._last_words = "The engine was told to stop."
        self._clock: Clock = clock if clock is not None else MonotonicClock()
        executors = (executor,) if executor is not None else built.executors
        self._schedulers = Schedulers(
            dataclasses.replace(built.core, prepares=True),
            executors or (CpuExecutor(built.model, built.vocabulary, depth=built.core.depth),),
            built.lock_step,
            recording=recording,
            clock=self._clock,
            report=self._report,
        )
        self._cores = self._schedulers.cores
        self._built, self._ranks = built, built.ranks
        self._check = check
        self._outbox_bytes = outbox_bytes
        self._selector = selectors.DefaultSelector()
        self._doors: list[Listener] = []
        self._links: dict[LinkId, Link] = {}
        self._next_link = 0
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self._reports: queue.SimpleQueue[Heard] = queue.SimpleQueue()
        self._stopping = False
        self._closed = False
        self._pipe = threading.RLock()
        """Held by a thread that writes to the wake pipe or closes it: the number of a closed one may be another file's.
        Reentrant, because a signal handler also wakes the loop."""

    @property
    def recordings(self) -> tuple[Path, ...]:
        """Where this run is recorded: a folder for each dp rank."""
        return self._schedulers.recordings

    # ---- what the process or a test hands in ----------------------------------------------------------------------
    def listen(self, server: socket.socket) -> None:
        """Accepts links from a listening socket."""
        self._doors.append(Listener(server, self._selector, self._clock, self.connect))

    def connect(self, peer: socket.socket, room: int = sys.maxsize) -> None:
        """Adds one link that is already connected (a socket pair). `room`: for how many there are descriptors."""
        peer.setblocking(False)
        self._next_link += 1
        link = Link(LinkId(self._next_link), peer, self._outbox_bytes)
        self._links[link.id] = link
        self._selector.register(peer, selectors.EVENT_READ, lambda: self._readable(link))
        strangers = [other for other in self._links.values() if not other.greeted and not other.closing]
        if len(strangers) > _MOST_STRANGERS or len(self._links) > room:
            self._refuse(strangers[0], "too_many_links", "The engine has no room for another link.", _LATER)

    def stop_at_eof(self, descriptor: int) -> None:
        """Ends the loop when the other side of a pipe is gone: an engine never outlives who started it."""

        def readable() -> None:
            if not os.read(descriptor, 4096):
                self._stopping = True

        self._selector.register(descriptor, selectors.EVENT_READ, readable)

    def stop(self) -> None:
        """Asks the loop to end; callable from any thread and from a signal handler."""
        self._stopping = True
        self._wake()

    # ---- the loop -------------------------------------------------------------------------------------------------
    def run(self) -> None:
        """Until `stop` or end of file. Raises what broke: our bug is never swallowed, every link is told."""
        sys.setswitchinterval(_SWITCH_SECONDS)
        self._selector.register(self._wake_read, selectors.EVENT_READ, self._woken)
        self._schedulers.start()
        if self._ranks is not None:
            self._ranks.watch(lambda fault: self._report(Heard(0, fault)))
        try:
            while not self._stopping:
                for key, _ in self._selector.select(self._patience()):
                    callback: Callable[[], None] = key.data
                    callback()
                for door in self._doors:
                    door.open_if_due()
                self._collect()
                now = self._clock.now()  # after the ends of copies were heard: the core's time does not go back
                self._schedulers.copies_begun()  # after the clock was read: who began by then has said so
                self._deliver(self._schedulers.plan(now))
                self._schedulers.flush()  # first: what a client has heard of is in the recording
                self._flush()
                self._end_if_idle()
            self._tell_all("engine_stopping", self._last_words, "Start another engine.")
        except BaseException as error:
            self._broke(error)
            raise
        finally:
            self._close()

    def _broke(self, error: BaseException) -> None:
        """Every link hears it, and where to look."""
        where = self._schedulers.broke(error)
        if isinstance(error, EngineFault):  # the world's: a GPU that has no room, or is gone
            self._tell_all(error.code, error.message, f"{error.remedy} The engine stops.{where}".strip())
            _LOG.critical("The engine stops: %s%s", error, where, exc_info=error)
            return
        self._tell_all("internal", f"{type(error).__name__}: {error}", f"This is a bug of the engine; it stops.{where}")
        _LOG.critical("The engine stops by a bug of its own.%s", where, exc_info=error)

    def _patience(self) -> float | None:
        """Seconds to wait for an event before the core wants to be asked again."""
        now = self._clock.now()
        wishes = [self._cores.wake_at(now), *(door.opens_at for door in self._doors)]
        if self._idle_seconds is not None and self._idle_since is not None:
            wishes.append(self._idle_since + self._idle_seconds)
        times = [wish for wish in wishes if wish is not None]
        return min(max(0.0, min(times) - now), _LONGEST_NAP) if times else None

    def _end_if_idle(self) -> None:
        """Links without a session do not count: a watcher keeps nothing alive."""
        if self._idle_seconds is None or not self._cores.idle:
            self._idle_since = None
            return
        now = self._clock.now()
        if self._idle_since is None:
            self._idle_since = now
        if now - self._idle_since >= self._idle_seconds:
            self._stopping = True
            self._last_words = f"The engine had no session for {self._idle_seconds:g} s (idle_seconds) and ended."

    def _collect(self) -> None:
        while True:
            try:
                report = self._reports.get_nowait()
            except queue.Empty:
                return
            self._deliver(self._schedulers.heard(report))

    def _deliver(self, out: Out) -> None:
        if self._check:
            self._cores.check()
        for to, message in out:
            link = self._links.get(to)
            if link is not None and not link.closing:  # why it is closed is the last thing it hears
                link.put(message)

    def _flush(self) -> None:
        for link in list(self._links.values()):
            if (link.has_output and not link.write()) or (link.closing and not link.has_output):
                self._drop(link)
            else:
                self._watch(link)

    def _watch(self, link: Link) -> None:
        """Reads while the peer keeps up, writes while something waits."""
        events = 0 if link.closing or link.behind else selectors.EVENT_READ
        if link.has_output:
            events |= selectors.EVENT_WRITE
        key = self._selector.get_key(link.socket)
        if key.events != events:
            self._selector.modify(link.socket, events, key.data)

    # ---- links ----------------------------------------------------------------------------------------------------
    def _readable(self, link: Link) -> None:
        if link.closing or link.behind:
            return
        commands = link.read()
        if commands is None:
            self._drop(link)
            return
        try:
            for command in commands:
                self._handle(link, command)
                if link.id not in self._links or link.closing:
                    return
        except BadFrame as error:
            self._refuse(link, "bad_frame", f"This is no frame of the protocol: {error}.", _SAME_VERSION)

    def _handle(self, link: Link, command: Command) -> None:
        if not link.greeted:
            self._greet(link, command)
        elif isinstance(command, GetStats):
            link.put(self._stats(command.request))
        elif isinstance(command, Look):
            self._look(link, command)
        elif isinstance(command, GetModelFiles):
            link.put(self._files.listed(command))
        elif isinstance(command, ReadModelFile):
            self._read_file(link, command)
        else:
            self._deliver(self._cores.handle(link.id, command, self._clock.now()))

    def _greet(self, link: Link, command: Command) -> None:
        if not isinstance(command, Hello):
            self._refuse(link, "bad_frame", "The first frame of a link is Hello.", _SAME_VERSION)
            return
        if command.protocol != PROTOCOL:
            self._refuse(
                link,
                "protocol_mismatch",
                f"The client speaks protocol {command.protocol}, this engine {PROTOCOL}.",
                _SAME_VERSION,
                command.request,
            )
            return
        if self._credential and not hmac.compare_digest(command.credential.encode(), self._credential):
            self._refuse(
                link,
                "bad_credential",
                "The engine asks for a credential, and this is not it.",
                f"Name the file that the engine reads it from in {CREDENTIAL_FILE}.",
                command.request,
            )
            return
        config = self._cores.config
        if sum(other.greeted for other in self._links.values()) >= config.max_links:
            there = f"The engine has {counted(config.max_links, 'link')} (max_links)."
            self._refuse(link, "too_many_links", there, _LATER, command.request)
            return
        link.greeted = True
        dp = len(self._cores.cores)
        link.put(
            Welcome(
                request=command.request,
                protocol=PROTOCOL,
                engine="agentspeed",
                model=as_text(config.model),
                vocab_size=config.vocab_size,
                context_limit=config.context_limit,
                page_tokens=config.page_tokens,
                pages=dp * config.pages,
                host_slots=dp * config.host_slots,
                pid=os.getpid(),
                limits={
                    "sessions": dp * config.max_sessions,
                    "branches": config.max_branches,
                    "waiting": dp * config.max_waiting,
                    "firm_pages": dp * config.firm_budget(),
                    "links": config.max_links,
                },
                source=as_text(self._source),
            )
        )

    def _refuse(self, link: Link, code: Code, message: str, remedy: str, request: int = 0) -> None:
        """Tells a link why it is closed, and closes it once that was sent."""
        link.put(Failed(request=request, code=code, message=message, remedy=remedy))
        link.closing = True
        if link.greeted:
            self._deliver(self._cores.drop_link(link.id, self._clock.now()))

    def _drop(self, link: Link) -> None:
        if self._links.pop(link.id, None) is None:
            return
        self._selector.unregister(link.socket)
        link.socket.close()
        self._deliver(self._cores.drop_link(link.id, self._clock.now()))

    def _stats(self, request: int) -> Stats:
        counts, each = self._schedulers.counts()
        counts |= {"links": len(self._links), "ranks": 1 if self._ranks is None else 1 + len(self._ranks.all)}
        seconds = self._schedulers.seconds() | {"clock": self._clock.now()}
        return Stats(request=request, counts=counts, seconds=seconds, dp=each)

    def _owes(self, link: Link, kind: type[Picture | FilePart], what: str, request: int) -> bool:
        """Whether it has not read the last of these, which it is told: they must not pile up here."""
        if not link.owes(kind):
            return False
        message = f"The last {what} was not read yet."
        link.put(Failed(request=request, code="overloaded", message=message, remedy="Read it first."))
        return True

    def _look(self, link: Link, command: Look) -> None:
        if self._owes(link, Picture, "picture", command.request):
            return
        picture = self._cores.picture(command, self._clock.now())
        counts = picture.counts | {"steps": self._schedulers.steps, "tokens_drawn": self._schedulers.tokens}
        link.put(replace(picture, counts=counts, ranks=() if self._ranks is None else self._ranks.views()))

    def _read_file(self, link: Link, command: ReadModelFile) -> None:
        if self._owes(link, FilePart, "part", command.request):
            return
        try:
            link.put(self._files.part(command))
        except EngineFault as fault:
            link.put(
                Failed(request=command.request, code=fault.code, message=as_text(fault.message), remedy=fault.remedy)
            )

    def _tell_all(self, code: Code, message: str, remedy: str) -> None:
        """The last words to every link, as far as its socket takes them."""
        for link in list(self._links.values()):
            link.put(Failed(request=0, code=code, message=as_text(message), remedy=as_text(remedy)))
            link.write()

    # ---- the other threads ----------------------------------------------------------------------------------------
    def _report(self, report: Heard) -> None:
        self._reports.put(report)
        self._wake()

    def _wake(self) -> None:
        with self._pipe:
            if self._closed:
                return
            # A full pipe wakes the loop as well as one more byte would.
            with contextlib.suppress(BlockingIOError):
                os.write(self._wake_write, b"\0")

    def _woken(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_read, 4096)

    def _close(self) -> None:
        self._schedulers.no_more_plans()
        if self._ranks is not None:  # a step or a copy that waits for a rank which hangs shall not be waited for
            self._ranks.abandon()
        self._schedulers.join(_JOIN_SECONDS)
        self._built.close()
        self._schedulers.close_recordings()
        for link in self._links.values():
            link.socket.close()
        self._links.clear()
        self._selector.close()
        with self._pipe:
            self._closed = True
            os.close(self._wake_read)
            os.close(self._wake_write)

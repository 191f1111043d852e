"""The loop thread: commands in, plans to the worker, results to the core, events out. It never blocks on a step."""

from __future__ import annotations

import contextlib
import os
import queue
import selectors
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from typing import final

from agentspeed_engine.clock import Clock, MonotonicClock
from agentspeed_engine.ids import LinkId
from agentspeed_engine.run.links import BadFrame, Link
from agentspeed_engine.run.worker import Worker
from agentspeed_engine.sched.config import CoreConfig
from agentspeed_engine.sched.core import Core
from agentspeed_engine.sched.plan import StepPlan, StepResult
from agentspeed_engine.sched.world import Out
from agentspeed_engine.wire import PROTOCOL, Command, Failed, GetStats, Hello, Stats, Welcome

_SWITCH_SECONDS = 0.0005
"""How soon a busy worker thread yields the interpreter to the loop thread."""


@final
class EngineLoop:
    """One engine: one core, one worker, any number of links."""

    def __init__(self, config: CoreConfig, worker: Worker, *, outbox_bytes: int = 1 << 20, check: bool = False,
                 clock: Clock | None = None) -> None:
        self._core = Core(config)
        self._worker = worker
        self._clock: Clock = clock if clock is not None else MonotonicClock()
        self._check = check
        self._outbox_bytes = outbox_bytes
        self._selector = selectors.DefaultSelector()
        self._links: dict[LinkId, Link] = {}
        self._next_link = 0
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self._plans: queue.SimpleQueue[StepPlan | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[StepResult | BaseException] = queue.SimpleQueue()
        self._stopping = False
        self._steps = 0
        self._tokens = 0
        self._thread = threading.Thread(target=self._work, name="agentspeed-worker", daemon=True)

    # ---- what the process or a test hands in ----------------------------------------------------------------------
    def listen(self, server: socket.socket) -> None:
        """Accepts links from a listening socket."""
        server.setblocking(False)
        self._selector.register(server, selectors.EVENT_READ, lambda: self._accept(server))

    def connect(self, peer: socket.socket) -> None:
        """Adds one link that is already connected (a socket pair)."""
        peer.setblocking(False)
        self._next_link += 1
        link = Link(LinkId(self._next_link), peer, self._outbox_bytes)
        self._links[link.id] = link
        self._selector.register(peer, selectors.EVENT_READ, lambda: self._readable(link))

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
        self._thread.start()
        try:
            while not self._stopping:
                for key, _ in self._selector.select():
                    callback: Callable[[], None] = key.data
                    callback()
                self._collect()
                self._plan()
                self._flush()
        except BaseException as error:
            self._tell_all(Failed(request=0, code="internal", message=f"{type(error).__name__}: {error}",
                                  remedy="This is a bug of the engine; it stops."))
            traceback.print_exc()
            raise
        finally:
            self._close()

    def _collect(self) -> None:
        while True:
            try:
                result = self._results.get_nowait()
            except queue.Empty:
                return
            if isinstance(result, BaseException):
                raise result
            self._tokens += len(result.drawn)
            self._deliver(self._core.apply(result, self._clock.now()))

    def _plan(self) -> None:
        while True:
            plan = self._core.plan(self._clock.now())
            self._deliver(self._core.events())
            if plan is None:
                return
            self._steps += 1
            self._plans.put(plan)

    def _deliver(self, out: Out) -> None:
        if self._check:
            self._core.check()
        for to, message in out:
            link = self._links.get(to)
            if link is not None:
                link.put(message)

    def _flush(self) -> None:
        for link in list(self._links.values()):
            if not link.has_output:
                continue
            if not link.write():
                self._drop(link)
            elif link.has_output:
                self._watch(link, selectors.EVENT_READ | selectors.EVENT_WRITE)
            else:
                self._watch(link, selectors.EVENT_READ)
                if link.closing:
                    self._drop(link)

    def _watch(self, link: Link, events: int) -> None:
        key = self._selector.get_key(link.socket)
        if key.events != events:
            self._selector.modify(link.socket, events, key.data)

    # ---- links ----------------------------------------------------------------------------------------------------
    def _accept(self, server: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            peer, _ = server.accept()
            self.connect(peer)

    def _readable(self, link: Link) -> None:
        if link.closing:
            return
        try:
            commands = link.read()
        except BadFrame as error:
            self._refuse(link, "bad_frame", str(error))
            return
        if commands is None:
            self._drop(link)
            return
        for command in commands:
            if link.id not in self._links or link.closing:
                return
            self._handle(link, command)

    def _handle(self, link: Link, command: Command) -> None:
        if not link.greeted:
            self._greet(link, command)
        elif isinstance(command, GetStats):
            link.put(self._stats(command.request))
        else:
            self._deliver(self._core.handle(link.id, command, self._clock.now()))

    def _greet(self, link: Link, command: Command) -> None:
        if not isinstance(command, Hello):
            self._refuse(link, "bad_frame", "the first frame of a link is Hello")
            return
        if command.protocol != PROTOCOL:
            self._refuse(link, "protocol_mismatch",
                         f"the client speaks protocol {command.protocol}, this engine {PROTOCOL}", command.request)
            return
        link.greeted = True
        config = self._core.config
        link.put(Welcome(
            request=command.request, protocol=PROTOCOL, engine="agentspeed", model=config.model,
            vocab_size=config.vocab_size, context_limit=config.context_limit, page_tokens=config.page_tokens,
            pages=config.pages, host_slots=config.host_slots, pid=os.getpid(),
            limits={"sessions": config.max_sessions, "branches": config.max_branches, "waiting": config.max_waiting,
                    "firm_pages": config.firm_budget()},
        ))

    def _refuse(self, link: Link, code: str, message: str, request: int = 0) -> None:
        """Tells a link why it is closed, and closes it once that was sent."""
        link.put(Failed(request=request, code=code, message=message,
                        remedy="Use a client of the same version as the engine."))
        link.closing = True
        if link.greeted:
            self._deliver(self._core.drop_link(link.id, self._clock.now()))

    def _drop(self, link: Link) -> None:
        if self._links.pop(link.id, None) is None:
            return
        self._selector.unregister(link.socket)
        link.socket.close()
        self._deliver(self._core.drop_link(link.id, self._clock.now()))

    def _stats(self, request: int) -> Stats:
        counts = self._core.counts() | {"steps": self._steps, "tokens_drawn": self._tokens, "links": len(self._links)}
        seconds = {"model": self._worker.model_seconds, "draw": self._worker.draw_seconds}
        return Stats(request=request, counts=counts, seconds=seconds)

    def _tell_all(self, message: Failed) -> None:
        for link in list(self._links.values()):
            link.put(message)
            link.write()

    # ---- the worker thread ----------------------------------------------------------------------------------------
    def _work(self) -> None:
        while (plan := self._plans.get()) is not None:
            try:
                result: StepResult | BaseException = self._worker.execute(plan)
            except BaseException as error:  # handed to the loop thread, which raises it
                result = error
            self._results.put(result)
            self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError, OSError):
            os.write(self._wake_write, b"\0")

    def _woken(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_read, 4096)

    def _close(self) -> None:
        self._plans.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout=5.0)
        for link in self._links.values():
            link.socket.close()
        self._links.clear()
        self._selector.close()
        os.close(self._wake_read)
        os.close(self._wake_write)

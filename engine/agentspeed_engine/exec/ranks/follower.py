"""A rank that is told what to do: steps in the order they come, and host copies beside them."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

import msgspec

from agentspeed_engine.exec.executor import CopyFailed
from agentspeed_engine.exec.ranks.group import Group, GroupBroken
from agentspeed_engine.exec.ranks.launches import Launcher
from agentspeed_engine.exec.ranks.model import ShardModel, draw_together, shard_logits
from agentspeed_engine.exec.ranks.orders import Channel, CopyDone, CopyOrder, StepDone, StepOrder, batch_of, step_done
from agentspeed_engine.kv.views import PageCopy


@final
class Follower:
    def __init__(
        self,
        model: ShardModel,
        group: Group,
        steps: Channel,
        copies: Channel,
        *,
        heartbeat: float | None = None,
        launcher: Launcher | None = None,
    ) -> None:
        """`launcher`: carries steps out that are drawn on every GPU; None: all draw together.
        `heartbeat`: this rank tells rank 0 what its dp rank has drawn, and says so often, in seconds, that it is at
        work; None: rank 0 is of the same dp rank and draws itself."""
        self._model, self._group, self._steps, self._copies = model, group, steps, copies
        self._heartbeat = heartbeat
        self._launcher = launcher
        self._beat = threading.Lock()
        """Held by who sends, for a frame goes out whole."""
        self._ended = threading.Event()
        self._at_work = False
        self._failed: Exception | None = None
        """What went wrong in a host copy that is no `CopyFailed`."""

    def run(self) -> None:
        """Until rank 0 closes its line. Raises `GroupBroken` when another rank is lost, and what a step or a copy
        raises."""
        threading.Thread(target=self._copy, name="agentspeed-copies", daemon=True).start()
        if self._heartbeat is not None:
            threading.Thread(target=self._tell, args=(self._heartbeat,), name="agentspeed-beat", daemon=True).start()
        try:
            self._follow()
        except GroupBroken:
            if self._failed is None:
                raise
        finally:
            self._ended.set()
        if self._failed is not None:
            raise self._failed

    def _follow(self) -> None:
        decoder, encoder = msgspec.msgpack.Decoder(StepOrder), msgspec.msgpack.Encoder()
        while (frame := self._steps.receive()) is not None:
            if self._launcher is not None:
                self._launcher.carry_out(frame)
                continue
            with self._beating():
                done = self._step(decoder.decode(frame))
            if self._heartbeat is not None:
                try:
                    self._steps.send(encoder.encode(done))
                except ConnectionError:
                    return  # rank 0 is gone

    def _step(self, order: StepOrder) -> StepDone:
        started = time.perf_counter()
        logits = shard_logits(self._model, batch_of(order), (PageCopy(*copy) for copy in order.copies))
        computed = time.perf_counter()
        drawn = draw_together(self._group, self._model, logits, order.samples)
        return step_done(drawn, computed - started, time.perf_counter() - computed)

    @contextmanager
    def _beating(self) -> Iterator[None]:
        """Rank 0 hears meanwhile that this process is there: how long a step may take is nobody's to say."""
        if self._heartbeat is None:
            yield
            return
        with self._beat:
            self._at_work = True
        try:
            yield
        finally:
            with self._beat:  # none is sent behind this
                self._at_work = False

    def _tell(self, seconds: float) -> None:
        while not self._ended.wait(seconds):
            with self._beat:
                if self._at_work:
                    with contextlib.suppress(OSError):  # rank 0 is gone, which the line of the steps tells too
                        self._steps.send(b"")

    def _copy(self) -> None:
        try:
            self._carry_out()
        except ConnectionError:
            pass  # rank 0 is gone, which the line of the steps tells too
        except Exception as error:  # noqa: BLE001 - our bug: handed to the thread of the steps, which raises it
            self._failed = error
            self._group.abandon()
            self._steps.end()

    def _carry_out(self) -> None:
        decoder, encoder = msgspec.msgpack.Decoder(CopyOrder), msgspec.msgpack.Encoder()
        while (frame := self._copies.receive()) is not None:
            order, failed = decoder.decode(frame), None
            try:
                if order.direction == "save":
                    self._model.save(order.pages, order.slots)
                else:
                    self._model.load(order.slots, order.pages)
            except CopyFailed as reason:
                failed = str(reason)
            self._copies.send(encoder.encode(CopyDone(failed)))

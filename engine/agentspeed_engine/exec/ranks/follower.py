"""A rank that is told what to do: steps in the order they come, and host copies beside them."""

from __future__ import annotations

import threading
from typing import final

import msgspec

from agentspeed_engine.exec.executor import CopyFailed
from agentspeed_engine.exec.ranks.group import Group, GroupBroken
from agentspeed_engine.exec.ranks.model import ShardModel, draw_together, shard_logits
from agentspeed_engine.exec.ranks.orders import Channel, CopyDone, CopyOrder, StepOrder, batch_of
from agentspeed_engine.kv.views import PageCopy


@final
class Follower:
    def __init__(self, model: ShardModel, group: Group, steps: Channel, copies: Channel) -> None:
        self._model, self._group, self._steps, self._copies = model, group, steps, copies
        self._failed: Exception | None = None
        """What went wrong in a host copy that is no `CopyFailed`."""

    def run(self) -> None:
        """Until rank 0 closes its line. Raises `GroupBroken` when another rank is lost, and what a step or a copy
        raises."""
        threading.Thread(target=self._copy, name="agentspeed-copies", daemon=True).start()
        try:
            self._follow()
        except GroupBroken:
            if self._failed is None:
                raise
        if self._failed is not None:
            raise self._failed

    def _follow(self) -> None:
        decoder = msgspec.msgpack.Decoder(StepOrder)
        while (frame := self._steps.receive()) is not None:
            order = decoder.decode(frame)
            logits = shard_logits(self._model, batch_of(order), (PageCopy(*copy) for copy in order.copies))
            draw_together(self._group, self._model, logits, order.samples)

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

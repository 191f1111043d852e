"""The typed events of a streamed response: items that open, grow and close, each event with its number."""

from __future__ import annotations

from collections.abc import Awaitable, Iterable
from typing import Any, Literal, final

from agentspeed import events
from agentspeed.server.openai import items
from agentspeed.server.streaming import Emitter
from agentspeed.turn import Reply

_Kind = Literal["message", "reasoning", "call"]


@final
class ResponseEvents:
    """Follows one turn. Without an emitter it only gathers the items."""

    def __init__(self, head: dict[str, Any]) -> None:
        self._head = head
        self._sequence = -1
        self._output: list[dict[str, Any]] = []
        self._open: _Kind | None = None
        self._number = ""
        self._text: list[str] = []
        self._call: tuple[str, str] = ("", "")
        self.call_ids: list[str] = []
        """Of the calls, as the client knows them."""

    async def begin(self, emit: Emitter | None) -> None:
        """The first two."""
        for kind in ("response.created", "response.in_progress"):
            await self._send(emit, kind, {"response": self._head})

    async def told(self, batch: Iterable[events.AnyEvent], emit: Emitter | None) -> None:
        """Events of the turn."""
        for event in batch:
            await self._told(event, emit)

    async def _told(self, event: events.AnyEvent, emit: Emitter | None) -> None:
        match event:
            case events.TextDelta(text=text):
                if self._open != "message":
                    await self._begin_item("message", emit)
                self._text.append(text)
                await self._send(emit, "response.output_text.delta", {**self._place, "delta": text, "logprobs": []})
            case events.ReasoningDelta(text=text):
                if self._open != "reasoning":
                    await self._begin_item("reasoning", emit)
                self._text.append(text)
                await self._send(emit, "response.reasoning_text.delta", {**self._place, "delta": text})
            case events.ToolCallStarted(name=name):
                await self._end_item(emit)
                self._call = (items.new_id("call"), name)
                self.call_ids.append(self._call[0])
                await self._begin_item("call", emit)
            case events.ToolCallDelta(arguments=text):
                self._text.append(text)
                await self._send(
                    emit,
                    "response.function_call_arguments.delta",
                    {"item_id": self._number, "output_index": len(self._output), "delta": text},
                )
            case _:
                pass

    async def finish(self, reply: Reply[Any], emit: Emitter | None) -> list[dict[str, Any]]:
        """Closes what is open; the output items."""
        await self._end_item(emit)
        if not self._output:  # the model said nothing at all
            await self._begin_item("message", emit)
            await self._end_item(emit)
        return self._output

    async def end(self, kind: str, response: dict[str, Any], emit: Emitter | None) -> None:
        """The last one."""
        await self._send(emit, kind, {"response": response})

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self._number, "output_index": len(self._output), "content_index": 0}

    async def _begin_item(self, kind: _Kind, emit: Emitter | None) -> None:
        await self._end_item(emit)
        self._open, self._text = kind, []
        self._number = items.new_id({"message": "msg", "reasoning": "rs", "call": "fc"}[kind])
        await self._send(
            emit, "response.output_item.added", {"output_index": len(self._output), "item": self._item("in_progress")}
        )
        if kind != "call":
            part = items.text_part("") if kind == "message" else {"type": "reasoning_text", "text": ""}
            await self._send(emit, "response.content_part.added", {**self._place, "part": part})

    async def _end_item(self, emit: Emitter | None) -> None:
        if self._open is None:
            return
        text = "".join(self._text)
        if self._open == "call":
            await self._send(
                emit,
                "response.function_call_arguments.done",
                {"item_id": self._number, "output_index": len(self._output), "arguments": text, "name": self._call[1]},
            )
        else:
            message = self._open == "message"
            kind = "response.output_text.done" if message else "response.reasoning_text.done"
            await self._send(emit, kind, {**self._place, "text": text, **({"logprobs": []} if message else {})})
            part = items.text_part(text) if message else {"type": "reasoning_text", "text": text}
            await self._send(emit, "response.content_part.done", {**self._place, "part": part})
        item = self._item("completed")
        await self._send(emit, "response.output_item.done", {"output_index": len(self._output), "item": item})
        self._output.append(item)
        self._open = None

    def _item(self, status: str) -> dict[str, Any]:
        text = "" if status == "in_progress" else "".join(self._text)
        if self._open == "message":
            return items.message_item(text, status=status, number=self._number)
        if self._open == "reasoning":
            return items.reasoning_item(text, status=status, number=self._number)
        return items.call_item(*self._call, text, status=status, number=self._number)

    def _send(self, emit: Emitter | None, kind: str, value: dict[str, Any]) -> Awaitable[None]:
        self._sequence += 1
        numbered = {"type": kind, "sequence_number": self._sequence, **value}
        return _nothing() if emit is None else emit(numbered, kind)


async def _nothing() -> None:
    return

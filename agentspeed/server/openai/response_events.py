"""The typed events of a streamed response: items that open, grow and close, each event with its number."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, final

from agentspeed import events
from agentspeed.server.openai import items
from agentspeed.server.problems import Problem
from agentspeed.server.streaming import framed

_Kind = Literal["message", "reasoning", "call"]


@final
class ResponseEvents:
    """Follows one turn, and writes its events down until they are taken. Not `streamed`, it only gathers the items."""

    def __init__(self, head: dict[str, Any], *, streamed: bool) -> None:
        self._head = head
        self._streamed = streamed
        self._waiting = bytearray()
        self._sequence = -1
        self._output: list[dict[str, Any]] = []
        self._open: _Kind | None = None
        self._number = ""
        self._text: list[str] = []
        self._call: tuple[str, str] = ("", "")
        self.call_ids: list[str] = []
        """Of the calls, as the client knows them."""

    def taken(self) -> bytes:
        """What was written down since it was last called."""
        data, self._waiting = bytes(self._waiting), bytearray()
        return data

    def begin(self) -> None:
        """The first two."""
        for kind in ("response.created", "response.in_progress"):
            self._tell(kind, {"response": self._head})

    def told(self, batch: Iterable[events.AnyEvent]) -> None:
        """Events of the turn."""
        for event in batch:
            self._told(event)

    def _told(self, event: events.AnyEvent) -> None:
        match event:
            case events.TextDelta(text=text):
                if self._open != "message":
                    self._begin_item("message")
                self._text.append(text)
                self._tell("response.output_text.delta", {**self._place, "delta": text, "logprobs": []})
            case events.ReasoningDelta(text=text):
                if self._open != "reasoning":
                    self._begin_item("reasoning")
                self._text.append(text)
                self._tell("response.reasoning_text.delta", {**self._place, "delta": text})
            case events.ToolCallStarted(name=name):
                self._end_item()
                self._call = (items.new_id("call"), name)
                self.call_ids.append(self._call[0])
                self._begin_item("call")
            case events.ToolCallDelta(arguments=text):
                self._text.append(text)
                self._tell(
                    "response.function_call_arguments.delta",
                    {"item_id": self._number, "output_index": len(self._output), "delta": text},
                )
            case _:
                pass

    def finish(self) -> list[dict[str, Any]]:
        """Closes what is open; the output items."""
        self._end_item()
        if not self._output:  # the model said nothing at all
            self._begin_item("message")
            self._end_item()
        return self._output

    def end(self, kind: str, response: dict[str, Any]) -> None:
        """The last one, and the word that ends such a stream."""
        self._tell(kind, {"response": response})
        if self._streamed:
            self._waiting += b"data: [DONE]\n\n"

    def failed(self, problem: Problem) -> dict[str, Any]:
        """What is told when the turn fails: OpenAI's clients read the fields, those of Open Responses the error."""
        self._sequence += 1
        said = {"code": problem.code, "message": problem.message, "param": problem.param}
        return {"type": "error", "sequence_number": self._sequence, **said, **problem.openai()}

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self._number, "output_index": len(self._output), "content_index": 0}

    def _begin_item(self, kind: _Kind) -> None:
        self._end_item()
        self._open, self._text = kind, []
        self._number = items.new_id({"message": "msg", "reasoning": "rs", "call": "fc"}[kind])
        self._tell("response.output_item.added", {"output_index": len(self._output), "item": self._item("in_progress")})
        if kind != "call":
            part = items.text_part("") if kind == "message" else {"type": "reasoning_text", "text": ""}
            self._tell("response.content_part.added", {**self._place, "part": part})

    def _end_item(self) -> None:
        if self._open is None:
            return
        text = "".join(self._text)
        if self._open == "call":
            self._tell(
                "response.function_call_arguments.done",
                {"item_id": self._number, "output_index": len(self._output), "arguments": text, "name": self._call[1]},
            )
        else:
            message = self._open == "message"
            kind = "response.output_text.done" if message else "response.reasoning_text.done"
            self._tell(kind, {**self._place, "text": text, **({"logprobs": []} if message else {})})
            part = items.text_part(text) if message else {"type": "reasoning_text", "text": text}
            self._tell("response.content_part.done", {**self._place, "part": part})
        item = self._item("completed")
        self._tell("response.output_item.done", {"output_index": len(self._output), "item": item})
        self._output.append(item)
        self._open = None

    def _item(self, status: str) -> dict[str, Any]:
        text = "" if status == "in_progress" else "".join(self._text)
        if self._open == "message":
            return items.message_item(text, status=status, number=self._number)
        if self._open == "reasoning":
            return items.reasoning_item(text, status=status, number=self._number)
        return items.call_item(*self._call, text, status=status, number=self._number)

    def _tell(self, kind: str, value: dict[str, Any]) -> None:
        self._sequence += 1
        if self._streamed:
            self._waiting += framed({"type": kind, "sequence_number": self._sequence, **value}, kind)

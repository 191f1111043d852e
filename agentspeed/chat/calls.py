"""How a family writes tool calls: one record by which the grammar lets a model write them and the parser reads them.

It is read off the model's own template (`chat.call_forms`), so what the model is shown is what it may write.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias, final

from agentspeed.errors import InvalidRequest
from agentspeed.messages import ToolCall

Kind: TypeAlias = Literal["object", "framed", "keys"]
_TAG: Final = re.compile(r"<[^<>\s\"]+>|\[/?[A-Z_]+\]")
_NAMED: Final = re.compile(r"<[A-Za-z_:]+=\Z")
"""A tag that holds the name of the tool."""
_TOKEN_IN_JSON: Final = re.compile(r'("(?:[^"\\]|\\.)*")|\s+|([,:])')
"""Also matches whole strings, in which space stays."""
_NUMBERED: Final = re.compile(r"functions\.(.+):(\d+)")
MAX_CALLS: Final = 16


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """Arguments that are written one by one: `key_open` key `text_open` text, or `json_open` JSON, `value_close`."""

    key_open: str
    text_open: str
    json_open: str
    value_close: str
    joint: str
    """Between one value and the next key."""
    words: tuple[tuple[str, str], ...] = ()
    """(true, false or null, how such a value is spelt), for a template that writes it as Python does. Inside of arrays
    and objects it is JSON."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class CallFormat:
    """`section_open` (`call_open` name `name_end` arguments `call_close`) `joint` ... `section_close`.

    `kind`: a call is one JSON object with a name and its arguments ("object"), a name and a JSON object in frames of
    their own ("framed"), or a name and arguments key by key ("keys")."""

    kind: Kind = "object"
    lead: str = ""
    """Space between a text and the calls after it."""
    section_open: str = ""
    call_open: str = '<tool_call>{"name":"'
    name_end: str = '","arguments":'
    call_close: str = "}</tool_call>"
    joint: str = ""
    section_close: str = ""
    keys: Keys | None = None
    spaced: bool = False
    """JSON has a space after each comma and colon."""
    numbered: bool = False
    """A name is written `functions.NAME:NUMBER`, which is the call's id."""
    restarts: bool = False
    """The template counts the calls of each message anew, whatever their ids are."""
    text_beside: bool = True
    """A message may have both text and calls."""
    most: int = MAX_CALLS
    """Calls in one message."""

    @property
    def opening(self) -> str:
        """Everything before the name of a message's first call, without the space before it."""
        return self.section_open + self.call_open

    @property
    def trigger(self) -> str:
        """What in a text begins calls: the tags of `opening`, or all of it where it has none."""
        return _to_last_tag(self.opening)

    @property
    def next_trigger(self) -> str:
        """What begins a further call."""
        return _to_last_tag(self.call_open)

    @property
    def only_at_start(self) -> bool:
        """Without a tag a call is only told from text where the message begins."""
        return _TAG.search(self.opening) is None and _NAMED.search(self.opening) is None

    @property
    def close_mark(self) -> str:
        """The tag that ends a call; empty where its JSON ends it."""
        return self.call_close.strip().lstrip("}`").strip()

    @property
    def fields(self) -> tuple[str, str]:
        """The keys of a call that is one JSON object."""
        found = re.findall(r'"([a-z_]+)"\s*:', self.call_open + self.name_end)
        return (found[0], found[-1]) if len(found) > 1 else ("name", "arguments")

    def written(self, calls: Sequence[ToolCall]) -> list[str]:
        """The text of calls, cut where contents begin and end: every second piece is content."""
        pieces = [self.section_open]
        for number, call in enumerate(calls):
            pieces[-1] += (self.joint if number else "") + self.call_open
            pieces += [
                json.dumps(call.name, ensure_ascii=False)[1:-1],
                self.name_end,
                self.styled(call),
                self.call_close,
            ]
        pieces[-1] += self.section_close
        return pieces

    def styled(self, call: ToolCall) -> str:
        """The arguments of a call with the space that the model puts into JSON. Raises `InvalidRequest`."""
        text = call.arguments.strip() or "{}"
        try:
            given: object = json.loads(text, parse_int=str, parse_float=str, parse_constant=finite)
        except (ValueError, RecursionError) as error:
            raise _no_object(call, error) from error
        if not isinstance(given, dict):
            raise _no_object(call)
        after = " " if self.spaced else ""
        return _TOKEN_IN_JSON.sub(lambda found: found[1] or (found[2] + after if found[2] else ""), text)

    def read(self, call: ToolCall) -> object:
        """The arguments as a value, for a template that writes them itself. Raises `InvalidRequest`."""
        text = self.styled(call)
        try:
            value: object = json.loads(text, parse_float=finite)
        except (ValueError, RecursionError) as error:  # a number larger than Python reads
            raise _no_object(call, error) from error
        return value

    def called(self, name: str) -> tuple[str, str | None]:
        """A tool's name and the call's id, of the name that a model wrote."""
        found = _NUMBERED.fullmatch(name) if self.numbered else None
        return (found[1], name) if found is not None else (name, None)


DEFAULT_CALLS: Final = CallFormat()


def finite(text: str) -> float:
    """A number of JSON as Python has it. Raises ValueError for one that is too large, and for what is none (`NaN`)."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no finite number")
    return value


def numbered_id(call: ToolCall, number: int) -> str:
    """The id under which a template with `numbered` ids shows a call."""
    found = _NUMBERED.fullmatch(call.id)
    return call.id if found is not None and found[1] == call.name else f"functions.{call.name}:{number}"


def _to_last_tag(text: str) -> str:
    tags = list(_TAG.finditer(text))
    return text[: tags[-1].end()] if tags else text


def _no_object(call: ToolCall, error: Exception | None = None) -> InvalidRequest:
    shown = call.arguments if len(call.arguments) < 200 else f"{call.arguments[:200]}..."
    why = "" if error is None else f" ({str(error) or type(error).__name__})"
    return InvalidRequest(
        f"The arguments of the call of {call.name} are not an object of JSON: {shown!r}{why}.",
        remedy="Give the JSON text of an object, such as '{\"a\": 1}', whose numbers are finite.",
    )

"""A conversation as its template writes it, with a slot where each content stands.

The template is run with slots instead of contents, so what it decides by is kept (who speaks, which calls there are,
whether there is reasoning) and what the messages say is not. Everything between the slots is text of the template,
where control tokens count; what fills a slot is content, where they do not. So no document can forge a turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, Literal, NamedTuple, TypeAlias, final

from agentspeed.messages import Role

Slot: TypeAlias = tuple[int, str]
"""The message's place in the conversation, and which of its contents."""
Empty: TypeAlias = Literal["text", "none", "absent"]
"""How a template is told that a message with calls has no text."""
_SLOT: Final = re.compile('\ue000(\\\\*)"([0-9]+)\\.([a-z0-9.]+)\ue001')
"""Private-use characters that no template writes. The quote tells whether the template made JSON of the content: then
it has a backslash before it."""
_HELD: Final = re.compile("\ue002([0-9]+)\ue003")
"""The place of a string in the skeleton of a call's arguments."""
_KEPT: Final = 4096


class TextMissing(ValueError):
    """The template leaves out a content that it was given: `field` says which."""

    def __init__(self, place: int, field: str) -> None:
        super().__init__(f"it does not write the {field} of message {place}")
        self.place, self.field = place, field


@final
class Shape(NamedTuple):
    """What of a message a template may decide by. A tuple: shapes of whole conversations are compared in each turn."""

    role: Role
    text: bool = True
    """An assistant's message may have none beside its calls."""
    reasoning: bool = False
    calls: tuple[str, ...] = ()
    """Of each call, its arguments with numbers for its strings (`arguments_skeleton`); empty for one text."""
    awaits: int = 0
    """Calls that wait for results, whether the template writes calls or not."""


@final
@dataclass(frozen=True, slots=True)
class Part:
    """Text of the template, or a slot; `depth` is how often the template makes a JSON string of what fills it."""

    text: str
    slot: Slot | None = None
    depth: int = 0


@final
@dataclass(frozen=True, slots=True)
class Script:
    """Parts of each message, from the end of the one before to the end of its own last content; then what follows."""

    regions: tuple[tuple[Part, ...], ...]
    tail: str


def arguments_skeleton(arguments: object) -> tuple[str, tuple[str, ...]]:
    """Arguments as JSON with numbered places for their strings, keys included, and the strings."""
    strings: list[str] = []

    def held(text: str) -> str:
        strings.append(text)
        return f"\ue002{len(strings) - 1}\ue003"

    return json.dumps(_mapped(arguments, held), ensure_ascii=False), tuple(strings)


def _mapped(value: object, of: Callable[[str], str]) -> object:
    """The same value with `of` applied to every string, in the order in which JSON writes them."""
    match value:
        case str():
            return of(value)
        case list():
            return [_mapped(item, of) for item in value]
        case dict():
            return {of(key): _mapped(item, of) for key, item in value.items()}
        case _:
            return value


@final
class Skeletons:
    """Runs one template, under one set of variables, over conversations without contents.

    `render` is given messages, tools or None, and whether the model speaks next; it raises ValueError for what the
    template refuses. `as_text`: whether arguments of calls are given as one text rather than as an object."""

    def __init__(
        self,
        render: Callable[[list[dict[str, Any]], bool, bool], str],
        *,
        system: bool,
        tools: bool,
        empty: Empty = "text",
        as_text: bool = True,
    ) -> None:
        self._render = render
        self._system, self._tools = system, tools
        self.empty: Empty = empty
        self.as_text = as_text
        self._cached = lru_cache(maxsize=_KEPT)(self._script)

    def with_objects(self) -> Skeletons:
        """The same, with the arguments of calls given as objects."""
        return Skeletons(self._render, system=self._system, tools=self._tools, empty=self.empty, as_text=False)

    def script(self, shapes: Sequence[Shape], *, generate: bool = False) -> Script:
        """Raises ValueError for what the template refuses, `TextMissing` for a message that it leaves out."""
        return self._cached(tuple(shapes), generate)

    def rendered(
        self, shapes: Sequence[Shape], contents: Sequence[Mapping[str, str]], *, generate: bool = False
    ) -> str:
        """What the template writes when it is given the contents themselves: what must come of slots, too."""
        messages = [
            self._dict(place, shape, lambda at, field: contents[at][field]) for place, shape in enumerate(shapes)
        ]
        return self._text(messages, generate)

    def _text(self, messages: list[dict[str, Any]], generate: bool) -> str:
        first = [{"role": "system", "content": "\ue004"}] if self._system else []
        return self._render([*first, *messages], self._tools, generate)

    def _script(self, shapes: tuple[Shape, ...], generate: bool) -> Script:
        messages = [self._dict(place, shape, _slot) for place, shape in enumerate(shapes)]
        parts = _parts(self._text(messages, generate))
        regions: list[tuple[Part, ...]] = []
        done = 0
        for place, shape in enumerate(shapes):
            last = (place, self._last(shape))
            end = next((n + 1 for n in range(done, len(parts)) if parts[n].slot == last), None)
            if end is None:
                raise TextMissing(place, _named(last[1]))
            region = tuple(parts[done:end])
            written = {part.slot[1] for part in region if part.slot is not None and part.slot[0] == place}
            for field in self._needed(shape):
                if field not in written:
                    raise TextMissing(place, _named(field))
            regions.append(region)
            done = end
        if any(part.slot is not None for part in parts[done:]):
            raise ValueError("it writes contents of earlier messages after the last one")
        return Script(tuple(regions), "".join(part.text for part in parts[done:]))

    def _dict(self, place: int, shape: Shape, of: Callable[[int, str], str]) -> dict[str, Any]:
        message: dict[str, Any] = {"role": shape.role}
        if shape.text or self.empty != "absent":
            message["content"] = of(place, "text") if shape.text else "" if self.empty == "text" else None
        if shape.role == "tool":
            message |= {"tool_call_id": of(place, "id"), "name": of(place, "name")}
        if shape.reasoning:
            message["reasoning_content"] = of(place, "reasoning")
        if shape.calls:
            message["tool_calls"] = [
                {
                    "id": of(place, f"id{number}"),
                    "type": "function",
                    "function": {
                        "name": of(place, f"name{number}"),
                        "arguments": self._arguments(place, number, skeleton, of),
                    },
                }
                for number, skeleton in enumerate(shape.calls)
            ]
        return message

    def _arguments(self, place: int, number: int, skeleton: str, of: Callable[[int, str], str]) -> object:
        if self.as_text:
            return of(place, f"arguments{number}")

        def filled(held: str) -> str:
            return _HELD.sub(lambda found: of(place, f"string{number}.{found[1]}"), held)

        return _mapped(json.loads(skeleton), filled)

    def _last(self, shape: Shape) -> str:
        """The content of a message that its template writes last."""
        if not shape.calls:
            return "text"
        number = len(shape.calls) - 1
        if self.as_text:
            return f"arguments{number}"
        strings = len(_HELD.findall(shape.calls[-1]))
        return f"string{number}.{strings - 1}" if strings else f"name{number}"

    def _needed(self, shape: Shape) -> list[str]:
        fields = ["text"] if shape.text else []
        for number, skeleton in enumerate(shape.calls):
            if self.as_text:
                fields.append(f"arguments{number}")
            else:
                fields += [f"string{number}.{at}" for at in range(len(_HELD.findall(skeleton)))]
        return fields


def _named(field: str) -> str:
    """A content's name for people."""
    return field if field in ("text", "reasoning") else "calls"


def _slot(place: int, field: str) -> str:
    return f'\ue000"{place}.{field}\ue001'


def _parts(text: str) -> list[Part]:
    parts: list[Part] = []
    done = 0
    for found in _SLOT.finditer(text):
        if found.start() > done:
            parts.append(Part(text[done : found.start()]))
        # Every time a string is written as JSON, n backslashes before its quote become 2n + 1.
        parts.append(Part("", (int(found[2]), found[3]), (len(found[1]) + 1).bit_length() - 1))
        done = found.end()
    if done < len(text):
        parts.append(Part(text[done:]))
    return parts

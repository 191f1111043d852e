"""A log's first ids: what stands before the first message, with the system text and the definitions of tools.

Definitions are rendered twice, so that no text of theirs ever counts as a control token (`chat.provenance`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any, Final, TypeAlias, final

from agentspeed.chat import provenance
from agentspeed.chat.environment import ChatTemplate
from agentspeed.chat.frames import TRIMS
from agentspeed.chat.tokenizer import TextTokenizer
from agentspeed.errors import InvalidRequest, TemplateUnstable

_SLOT: Final = "\ue000content\ue001"
"""Stands for the system text; private-use characters that no template writes."""
_USER: Final[dict[str, Any]] = {"role": "user", "content": "a"}
_SAID: Final = "\ue010"
_ASSISTANT: Final[dict[str, Any]] = {"role": "assistant", "content": _SAID}
_TOOL: Final[dict[str, Any]] = {
    "name": "look_up_probe",
    "description": "Looks something up.",
    "parameters": {"type": "object", "properties": {"probe_word": {"type": "string"}}, "required": ["probe_word"]},
}
"""A definition whose name no template writes by itself."""
_SPACED: Final = ("\n x \n", " x\n", "\n\nx", "x  ")
_KEPT: Final = 16
_Shape: TypeAlias = Callable[[dict[str, Any]], dict[str, Any]]
_SHAPES: Final[tuple[_Shape, ...]] = (
    lambda definition: {"type": "function", "function": definition},
    lambda definition: definition,
)
"""How templates expect tools: wrapped as most do (and as models were trained with them), or plain."""


@final
class Opening:
    """Of one template under one set of variables."""

    def __init__(
        self, template: ChatTemplate, tokenizer: TextTokenizer, variables: Mapping[str, Any], *, tells: bool = False
    ) -> None:
        """`tells`: where the template does not show tools, the system text does."""
        self.tells = tells
        self._template = template
        self._tokenizer = tokenizer
        self._variables = variables
        self._shape: _Shape | None = None
        self._cached = lru_cache(maxsize=_KEPT)(self._timeless)
        """Agents of one kind begin alike, and an opening takes a dozen renders."""

    def ids(self, system: str | None, tools: list[dict[str, Any]], *, now: datetime) -> list[int]:
        """Raises `InvalidRequest` for a system text or tools that the template does not show to the model."""
        if self._template.tells_time:
            return self._ids(system, tools, now)
        try:
            written = json.dumps(tools)
        except (TypeError, ValueError):  # no JSON: what the template makes of it is not looked up
            return self._ids(system, tools, now)
        return list(self._cached(system, written))

    def _timeless(self, system: str | None, written: str) -> tuple[int, ...]:
        return tuple(self._ids(system, json.loads(written), self._template.loaded))

    def _ids(self, system: str | None, tools: list[dict[str, Any]], now: datetime) -> list[int]:
        system, tools = self.described(system, tools)
        messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": _SLOT}]
        shape = self.shape() if tools else None
        text = self._head(messages, shape, tools, now)
        system = None if system is None else self._trimmed(system, shape, now)
        if shape is None:
            return self._around_system(text, text, system)
        shadow = self._head(messages, shape, [provenance.veiled(tool) for tool in tools], now)
        if provenance.unveiled(shadow) == text:
            return self._around_system(text, shadow, system)
        # The template rewrites definitions, so places do not tell; control tokens that are not its own are still seen.
        written, own = ([number for _, _, number in self._tokenizer.read_template(one)[1]] for one in (text, shadow))
        if written != own:
            extra = self._tokenizer.text(
                [number for number in written if written.count(number) > own.count(number)][:1]
            )
            raise InvalidRequest(
                f"A tool's definition becomes a control token of this model{f', {extra}' if extra else ''}.",
                remedy="Take it out: this model's template rewrites definitions, so it could not be told from its own.",
            )
        return self._around_system(text, text, system)

    def shape(self) -> _Shape:
        """The first one with which the template writes a tool's name; templates leave out what they do not find."""
        if self._shape is not None:
            return self._shape
        why = "it writes no tool's name"
        for shape in _SHAPES:
            try:
                text = self._render([_USER], [shape(_TOOL)])
            except ValueError as error:
                why = str(error)
                continue
            if _TOOL["name"] in text:
                self._shape = shape
                return shape
        raise InvalidRequest(
            f"This model's chat template does not show tools to the model: {why}.",
            remedy="Use a template that writes `tools` (as tool.function.name or tool.name), or describe them in the "
            "system text and parse the answer yourself.",
        )

    def shows_tools(self) -> bool:
        """Whether the template writes definitions of tools itself."""
        try:
            _ = self.shape()
        except InvalidRequest:
            return False
        return True

    def described(self, system: str | None, tools: list[dict[str, Any]]) -> tuple[str | None, list[dict[str, Any]]]:
        """The system text and the tools that the template is given: it may write calls, and no definitions."""
        if not tools or not self.tells or self.shows_tools():
            return system, tools
        lines = [json.dumps(tool, ensure_ascii=False) for tool in tools]
        told = "\n".join(["## Tools", "", "You can call these functions:", "", *lines])
        return (told if not system else f"{system}\n\n{told}"), []

    def wrapped(self, tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Definitions in the shape that the template takes them in. Raises `InvalidRequest` where it takes none."""
        return [self.shape()(tool) for tool in tools] if tools else []

    def probes(self) -> list[dict[str, Any]]:
        """One tool, as the template expects it, for renders in which only messages matter."""
        return [self.shape()(_TOOL)]

    def _render(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, now: datetime | None = None
    ) -> str:
        return self._template(messages, tools=tools, variables=self._variables, now=now)

    def _head(
        self, messages: list[dict[str, Any]], shape: _Shape | None, tools: list[dict[str, Any]], now: datetime
    ) -> str:
        """What the template writes before the first user's message."""
        given = None if shape is None else [shape(tool) for tool in tools]
        try:
            text = self._render([*messages, _USER], given, now)
            answered = self._render([*messages, _USER, _ASSISTANT], given, now)
            again = self._render([*messages, _USER, _ASSISTANT, _USER], given, now)
        except ValueError as error:
            raise InvalidRequest(f"This model's template refuses a system message or tools: {error}.") from error
        frame = self._frame(text, answered, again)
        if frame is None:
            raise TemplateUnstable(
                "The template writes the first message differently from later ones.",
                remedy="Give the system text in the first user message, or fix the template.",
            )
        return text[: -len(frame)]

    @staticmethod
    def _frame(text: str, answered: str, again: str) -> str | None:
        """A user's message as the template writes it, which must be the end of `text`."""
        silent, later = answered.rpartition(_SAID)[2], again.rpartition(_SAID)[2]
        frame = later.removeprefix(silent)
        return frame if frame and text.endswith(frame) else None

    def _trimmed(self, system: str, shape: _Shape | None, now: datetime) -> str:
        """The system text with the space around it that the template leaves."""
        given = None if shape is None else [shape(_TOOL)]

        def written(text: str) -> str:
            return self._render([{"role": "system", "content": text}, _USER], given, now)

        slotted = written(_SLOT)
        for trim in TRIMS.values():
            if all(written(text) == slotted.replace(_SLOT, trim(text)) for text in _SPACED):
                return trim(system)
        return system

    def _around_system(self, text: str, shadow: str, system: str | None) -> list[int]:
        """`text` with the system text in its place; `shadow` is as long and tells what of it is the template's own."""
        if system is None:
            return self._own_controls(text, shadow)
        if shadow.count(_SLOT) != 1:
            raise InvalidRequest(
                "This model's template does not write a system text exactly once.",
                remedy="Give the system text in the first user message, or fix the template.",
            )
        start = shadow.index(_SLOT)
        whole = text[:start] + system + text[start + len(_SLOT) :]
        # Control tokens that the system text has by chance are content, as those of definitions are.
        veiled = shadow[:start] + provenance.covered(system) + shadow[start + len(_SLOT) :]
        return self._own_controls(whole, veiled)

    def _own_controls(self, text: str, shadow: str) -> list[int]:
        """Ids of a text in which only the control tokens count that the template wrote itself."""
        ids: list[int] = []
        done = 0
        for start, end, number in self._tokenizer.read_template(shadow)[1]:
            if provenance.is_content(shadow[start:end]):
                continue
            ids += [*self._tokenizer.content_ids(text[done:start]), number]
            done = end
        return [*ids, *self._tokenizer.content_ids(text[done:])]

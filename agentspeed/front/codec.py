"""Messages to ids, appended: derived from the model's own chat template and checked to be prefix-stable.

A template is run with placeholders instead of contents. What it writes around a placeholder is template text, where
control tokens count; what replaces the placeholder is content, where they do not. So no document can forge a turn.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias, final

from agentspeed.errors import ExtraMissing, InvalidRequest, ModelBroken, TemplateUnstable
from agentspeed.front.tags import DEFAULT_TAGS, Tags
from agentspeed.front.tokenizer import TextTokenizer
from agentspeed.messages import Assistant, Message, System, ToolMessage, User, role_of

_SLOT = "\ue000content\ue001"
"""Stands for a message's content; private-use characters that no template writes."""
_OPENERS: tuple[dict[str, Any], ...] = (
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
)
_TOOL: dict[str, Any] = {
    "name": "look_up_probe", "description": "Looks something up.",
    "parameters": {"type": "object", "properties": {"probe_word": {"type": "string"}}, "required": ["probe_word"]},
}
"""A definition whose name no template writes by itself."""
_Shape: TypeAlias = Callable[[dict[str, Any]], dict[str, Any]]
_SHAPES: tuple[_Shape, ...] = (
    lambda definition: {"type": "function", "function": definition},
    lambda definition: definition,
)
"""How templates expect tools: wrapped as most do (and as models were trained with them), or plain."""
_CONVERSATION: list[dict[str, Any]] = [
    {"role": "user", "content": "Some words, and more."},
    {"role": "assistant", "content": "<think>Hm.</think>Other words, and more."},
] * 2 + [{"role": "user", "content": "The end."}]


class Render(Protocol):
    """A chat template, ready to be run."""

    def __call__(self, messages: list[dict[str, Any]], *, tools: list[dict[str, Any]] | None = None,
                 generate: bool = False) -> str: ...


@final
@dataclass(frozen=True, slots=True)
class _Frame:
    """What the template writes before and after a content."""

    before: str
    after: str


@final
class ChatCodec:
    """For one model folder. Every method returns ids that are appended to what the log holds already."""

    def __init__(self, folder: Path) -> None:
        """Raises `ModelBroken` without a template, `TemplateUnstable` when its messages are not append-only."""
        self.tokenizer = TextTokenizer(folder)
        self._shape: _Shape | None = None
        self._render = load_template(folder)
        self._generation = self._generation_prompt()
        self._assistant = self._frame("assistant")
        if self._assistant.before != self._generation:
            raise TemplateUnstable(
                f"The template opens an assistant message with {self._assistant.before!r} but asks for one with "
                f"{self._generation!r}.",
                remedy="Generated ids could not stay in the log as they are; fix the template.")
        self._user = self._frame("user")
        self._check_stable("user", self._user)
        self._check_prefixes()
        self.generation_ids = tuple(self.tokenizer.template_ids(self._generation))
        self._end_ids = tuple(self.tokenizer.template_ids(self._assistant.after))
        self.stop_ids = self._stop_ids(folder)
        marks = (DEFAULT_TAGS.call_open, DEFAULT_TAGS.call_close, DEFAULT_TAGS.think_open, DEFAULT_TAGS.think_close)
        found = {mark: self.tokenizer.token_id(mark) for mark in marks}
        self.tags = Tags(ids={mark: number for mark, number in found.items() if number is not None})

    # ---- pieces ---------------------------------------------------------------------------------------------------
    def opening(self, system: str | None, tools: list[dict[str, Any]]) -> list[int]:
        """The log's first ids: what stands before the first message, with system text and tool definitions."""
        messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": _SLOT}]
        messages.append(dict(_OPENERS[0]))
        shape = self._shape_of_tools(messages) if tools else None
        try:
            text = self._render(messages, tools=None if shape is None else [shape(tool) for tool in tools])
        except ValueError as error:
            raise InvalidRequest(f"This model's template refuses a system message or tools: {error}.") from error
        tail = self._user.before + "a" + self._user.after
        if not text.endswith(tail):
            raise TemplateUnstable("The template writes the first message differently from later ones.",
                                   remedy="Give the system text in the first user message, or fix the template.")
        return self._filled(text[: -len(tail)], system or "")

    def message(self, message: Message) -> list[int]:
        """One whole message."""
        match message:
            case User():
                return self._framed(self._user, message.text)
            case Assistant():
                return self._framed(self._assistant, message.raw or message.text)
            case ToolMessage() | System():
                frame = self._frame(role_of(message))
                return self._framed(frame, message.text)

    def closing(self, drawn_end: int | None) -> list[int]:
        """What ends an assistant message: all of it for a cut one, the rest after its drawn end id otherwise."""
        if drawn_end is None:
            return list(self._end_ids)
        if drawn_end in self._end_ids:
            return list(self._end_ids[self._end_ids.index(drawn_end) + 1 :])
        return []

    def _shape_of_tools(self, messages: list[dict[str, Any]]) -> _Shape:
        """The first one with which the template writes a tool's name; templates leave out what they do not find."""
        if self._shape is not None:
            return self._shape
        why = "it writes no tool's name"
        for shape in _SHAPES:
            try:
                text = self._render(messages, tools=[shape(_TOOL)])
            except ValueError as error:
                why = str(error)
                continue
            if _TOOL["name"] in text:
                self._shape = shape
                return shape
        raise InvalidRequest(
            f"This model's chat template does not show tools to the model: {why}.",
            remedy="Use a template that writes `tools` (as tool.function.name or tool.name), or describe them in the "
                   "system text and parse the answer yourself.")

    # ---- deriving -------------------------------------------------------------------------------------------------
    def _frame(self, role: str) -> _Frame:
        """What the template writes around a message of `role` that follows a user and an assistant message."""
        history = list(_OPENERS) if role != "assistant" else list(_OPENERS[:1])
        extra = {"tool_call_id": "c", "name": "t"} if role == "tool" else {}
        try:
            before = self._render(history)
            after = self._render([*history, {"role": role, "content": _SLOT, **extra}])
        except ValueError as error:
            raise InvalidRequest(f"This model's template has no {role} messages here: {error}.") from error
        if not after.startswith(before) or after.count(_SLOT) != 1:
            raise TemplateUnstable(f"The template changes earlier text when a {role} message follows.",
                                   remedy="Use a template whose messages only append.")
        head, tail = after[len(before) :].split(_SLOT)
        return _Frame(head, tail)

    def _generation_prompt(self) -> str:
        history = list(_OPENERS[:1])
        plain, asking = self._render(history), self._render(history, generate=True)
        if not asking.startswith(plain) or asking == plain:
            raise TemplateUnstable("The template has no generation prompt that only appends.",
                                   remedy="It must honour add_generation_prompt.")
        return asking[len(plain) :]

    def _check_stable(self, role: str, frame: _Frame) -> None:
        """The same message must look the same after any history."""
        user, assistant = _OPENERS
        for history in ([user, assistant], [user, assistant, user, assistant], [user]):
            text = self._render([*history, {"role": role, "content": "x"}])
            if text != self._render(list(history)) + frame.before + "x" + frame.after:
                raise TemplateUnstable(
                    f"The template writes a {role} message differently after {len(history)} messages.",
                    remedy="Use a template whose messages only append.")

    def _check_prefixes(self) -> None:
        """What was rendered stays as it was when later messages come, whatever it contains."""
        for number in range(1, len(_CONVERSATION)):
            before, after = self._render(_CONVERSATION[:number]), self._render(_CONVERSATION[: number + 1])
            if not after.startswith(before):
                role = _CONVERSATION[number]["role"]
                raise TemplateUnstable(
                    f"The template writes {number} earlier messages differently once a {role} message follows.",
                    remedy="Use a template that neither cuts nor drops what was said, reasoning included.")

    def _filled(self, text: str, content: str) -> list[int]:
        if _SLOT not in text:
            return self.tokenizer.template_ids(text)
        head, tail = text.split(_SLOT)
        return [*self.tokenizer.template_ids(head), *self.tokenizer.content_ids(content),
                *self.tokenizer.template_ids(tail)]

    def _framed(self, frame: _Frame, content: str) -> list[int]:
        return self._filled(f"{frame.before}{_SLOT}{frame.after}", content)

    def _stop_ids(self, folder: Path) -> tuple[int, ...]:
        """Ids that end a turn: the end of an assistant message, and the model's own end-of-sequence ids."""
        stops = set(self._end_ids[:1])
        for name in ("generation_config.json", "config.json"):
            path = folder / name
            if path.is_file():
                eos = _read_json(path).get("eos_token_id")
                stops.update(eos if isinstance(eos, list) else [] if eos is None else [eos])
        return tuple(sorted(stops))


def load_template(folder: Path) -> Render:
    """The folder's chat template in a sandbox. Raises `ModelBroken` when there is none or it does not parse."""
    try:
        from jinja2 import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise ExtraMissing("Local models need the jinja2 package.", remedy="Install agentspeed[engine].") from error

    def refuse(reason: str) -> None:
        raise TemplateError(reason)

    settings = _read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    file = folder / "chat_template.jinja"
    source = file.read_text(encoding="utf-8") if file.is_file() else settings.get("chat_template")
    if not isinstance(source, str):
        raise ModelBroken(f"{folder} has no chat template.",
                          remedy="Put one into chat_template.jinja or tokenizer_config.json.")
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = refuse
    try:
        template = environment.from_string(source)
    except TemplateError as error:
        raise ModelBroken(f"The chat template of {folder} does not parse: {str(error).rstrip('.')}.",
                          remedy="Correct it; it is a Jinja template.") from error
    constants = {name: _token_text(settings.get(name)) for name in ("bos_token", "eos_token", "pad_token")}

    def render(messages: list[dict[str, Any]], *, tools: list[dict[str, Any]] | None = None,
               generate: bool = False) -> str:
        try:
            return template.render(messages=messages, tools=tools, add_generation_prompt=generate, **constants)
        except (TemplateError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
            # What a template's own expressions do with values they did not expect.
            raise ValueError(str(error)) from error

    return render


def _tojson(value: object, ensure_ascii: bool = False, indent: int | None = None,
            separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    """As chat templates expect it: plain JSON, without HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _token_text(value: object) -> str:
    """A token in tokenizer_config.json is a string, or an object with its content."""
    if isinstance(value, dict):
        return str(value.get("content", ""))
    return value if isinstance(value, str) else ""


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelBroken(f"{path} cannot be read: {error}.", remedy="Download it again.") from error
    if not isinstance(data, dict):
        raise ModelBroken(f"{path} holds a {type(data).__name__}, not an object.", remedy="Download it again.")
    return data

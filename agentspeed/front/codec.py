"""Messages to ids, appended: derived from the model's own chat template and checked to be prefix-stable.

A template is run with placeholders instead of contents. What it writes around a placeholder is template text, where
control tokens count; what replaces the placeholder is content, where they do not. So no document can forge a turn, and
no tool's description (`front.origins`). The marks of an assistant's calls and reasoning are written here, by their ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias, final

from agentspeed._base.validate import is_whole
from agentspeed.errors import ExtraMissing, InvalidRequest, ModelBroken, TemplateUnstable
from agentspeed.front import origins
from agentspeed.front.parser import CallReady, TurnParser
from agentspeed.front.tags import DEFAULT_TAGS, Tags
from agentspeed.front.tokenizer import TextTokenizer
from agentspeed.messages import Assistant, Message, System, ToolCall, ToolMessage, User, role_of

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
_SPACE_IN_JSON = re.compile(r'("(?:[^"\\]|\\.)*")|\s+')
"""Also matches whole strings, in which space stays."""
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
        text = self._head(messages, shape, tools)
        if shape is None:
            return self._around_system(text, text, system)
        shadow = self._head(messages, shape, [origins.veiled(tool) for tool in tools])
        if origins.unveiled(shadow) == text:
            return self._around_system(text, shadow, system)
        # The template rewrites definitions, so places do not tell; control tokens that are not its own are still seen.
        written, own = ([number for _, _, number in self.tokenizer.read_template(one)[1]] for one in (text, shadow))
        if written != own:
            extra = self.tokenizer.text([number for number in written if written.count(number) > own.count(number)][:1])
            raise InvalidRequest(
                f"A tool's definition becomes a control token of this model{f', {extra}' if extra else ''}.",
                remedy="Take it out: this model's template rewrites definitions, so it could not be told from its own.")
        return self._around_system(text, text, system)

    def message(self, message: Message) -> list[int]:
        """One whole message."""
        match message:
            case User():
                return self._framed(self._user, self.tokenizer.content_ids(message.text))
            case Assistant():
                return self._framed(self._assistant, self._said(message))
            case ToolMessage() | System():
                return self._framed(self._frame(role_of(message)), self.tokenizer.content_ids(message.text))

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

    def _head(self, messages: list[dict[str, Any]], shape: _Shape | None, tools: list[dict[str, Any]]) -> str:
        """What the template writes before the first user's message, the last of `messages`."""
        try:
            text = self._render(messages, tools=None if shape is None else [shape(tool) for tool in tools])
        except ValueError as error:
            raise InvalidRequest(f"This model's template refuses a system message or tools: {error}.") from error
        tail = self._user.before + "a" + self._user.after
        if not text.endswith(tail):
            raise TemplateUnstable("The template writes the first message differently from later ones.",
                                   remedy="Give the system text in the first user message, or fix the template.")
        return text[: -len(tail)]

    def _around_system(self, text: str, shadow: str, system: str | None) -> list[int]:
        """`text` with the system text in its place; `shadow` is as long and tells what of it is the template's own."""
        if system is None:
            return self._own_controls(text, shadow)
        if shadow.count(_SLOT) != 1:
            raise InvalidRequest("This model's template does not write a system text exactly once.",
                                 remedy="Give the system text in the first user message, or fix the template.")
        start = shadow.index(_SLOT)
        end = start + len(_SLOT)
        return [*self._own_controls(text[:start], shadow[:start]), *self.tokenizer.content_ids(system),
                *self._own_controls(text[end:], shadow[end:])]

    def _own_controls(self, text: str, shadow: str) -> list[int]:
        """Ids of a text in which only the control tokens count that the template wrote itself."""
        ids, found = self.tokenizer.read_template(text)
        if not any(origins.is_content(shadow[start:end]) for start, end, _ in found):
            return ids
        ids, done = [], 0
        for start, end, number in self.tokenizer.read_template(shadow)[1]:
            ids += [*self.tokenizer.content_ids(text[done:start]), number]
            done = end
        return [*ids, *self.tokenizer.content_ids(text[done:])]

    def _said(self, message: Assistant) -> list[int]:
        """What the model would have drawn to say this: each mark as its own id where it has one, all else content."""
        self._check_raw(message)
        tags = self.tags
        parts: list[str | int] = []
        if message.reasoning:
            parts += [self._mark(tags.think_open), message.reasoning, self._mark(tags.think_close)]
        parts.append(message.text)
        for call in message.tool_calls:
            parts += [self._mark(tags.call_open), _written(call), self._mark(tags.call_close)]
        ids: list[int] = []
        spelt = ""  # marks without an id are ordinary text, and text is tokenised in one piece
        for part in parts:
            if isinstance(part, str):
                spelt += part
            else:
                ids += [*self.tokenizer.content_ids(spelt), part]
                spelt = ""
        return [*ids, *self.tokenizer.content_ids(spelt)]

    def _mark(self, mark: str) -> str | int:
        return self.tags.ids.get(mark, mark)

    def _check_raw(self, message: Assistant) -> None:
        """`raw` tells how a model wrote it; what is written here is the text and the calls, which must be the same."""
        if message.raw in ("", message.text):
            return
        parser = TurnParser(self.tags, reasoning=bool(message.reasoning))
        calls = [piece for piece in (*parser.feed(message.raw), *parser.finish()) if isinstance(piece, CallReady)]
        if [call.name for call in calls] != [call.name for call in message.tool_calls]:
            raise InvalidRequest("An assistant message's raw text has other calls than its tool_calls.",
                                 remedy="Leave raw out and give tool_calls=(ToolCall(...), ...).")

    # ---- deriving -------------------------------------------------------------------------------------------------
    def _frame(self, role: str) -> _Frame:
        """What the template writes around a message of `role` that follows a user and an assistant message."""
        history = list(_OPENERS) if role != "assistant" else list(_OPENERS[:1])
        extra = {"tool_call_id": "c", "name": "t"} if role == "tool" else {}
        try:
            before = self._render(history)
            after = self._render([*history, {"role": role, "content": _SLOT, **extra}])
        except ValueError as error:
            if role in ("user", "assistant"):
                raise _refused(role, error) from error
            raise InvalidRequest(f"This model's template has no {role} messages here: {error}.",
                                 remedy="Say it in a user message, or use a template that has them.") from error
        if not after.startswith(before) or after.count(_SLOT) != 1:
            raise TemplateUnstable(f"The template changes earlier text when a {role} message follows.",
                                   remedy="Use a template whose messages only append.")
        head, tail = after[len(before) :].split(_SLOT)
        return _Frame(head, tail)

    def _generation_prompt(self) -> str:
        history = list(_OPENERS[:1])
        try:
            plain, asking = self._render(history), self._render(history, generate=True)
        except ValueError as error:
            raise ModelBroken(f"The chat template cannot write a single user message: {error}.",
                              remedy="Correct it; it is the folder's chat_template.jinja, or in tokenizer_config.json."
                              ) from error
        if not asking.startswith(plain) or asking == plain:
            raise TemplateUnstable("The template has no generation prompt that only appends.",
                                   remedy="It must honour add_generation_prompt.")
        return asking[len(plain) :]

    def _check_stable(self, role: str, frame: _Frame) -> None:
        """The same message must look the same after any history."""
        user, assistant = _OPENERS
        for history in ([user, assistant], [user, assistant, user, assistant], [user]):
            try:
                text = self._render([*history, {"role": role, "content": "x"}])
                before = self._render(list(history))
            except ValueError as error:
                raise _refused(f"{role} after {history[-1]['role']}", error) from error
            if text != before + frame.before + "x" + frame.after:
                raise TemplateUnstable(
                    f"The template writes a {role} message differently after {len(history)} messages.",
                    remedy="Use a template whose messages only append.")

    def _check_prefixes(self) -> None:
        """What was rendered stays as it was when later messages come, whatever it contains."""
        for number in range(1, len(_CONVERSATION)):
            role = _CONVERSATION[number]["role"]
            try:
                before, after = self._render(_CONVERSATION[:number]), self._render(_CONVERSATION[: number + 1])
            except ValueError as error:
                raise _refused(role, error) from error
            if not after.startswith(before):
                raise TemplateUnstable(
                    f"The template writes {number} earlier messages differently once a {role} message follows.",
                    remedy="Use a template that neither cuts nor drops what was said, reasoning included.")

    def _framed(self, frame: _Frame, content: list[int]) -> list[int]:
        return [*self.tokenizer.template_ids(frame.before), *content, *self.tokenizer.template_ids(frame.after)]

    def _stop_ids(self, folder: Path) -> tuple[int, ...]:
        """Ids that end a turn: the end of an assistant message, and the model's own end-of-sequence ids."""
        stops = set(self._end_ids[:1])
        for name in ("generation_config.json", "config.json"):
            path = folder / name
            if path.is_file():
                eos = _read_json(path).get("eos_token_id")
                numbers = eos if isinstance(eos, list) else [] if eos is None else [eos]
                if not all(is_whole(number) and number >= 0 for number in numbers):
                    raise ModelBroken(f"{path} says eos_token_id is {eos!r}; it must be the number of a token, or "
                                      "several.", remedy="Correct it; tokenizer.json has the numbers of its tokens.")
                stops.update(numbers)
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
    source = _read_text(file) if file.is_file() else settings.get("chat_template")
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
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError
                ) as error:
            # What a template's own expressions do with values they did not expect.
            raise ValueError(str(error).rstrip(".") or type(error).__name__) from error

    return render


def _refused(where: str, error: ValueError) -> TemplateUnstable:
    """For a template that raises, with its own words, where others append."""
    return TemplateUnstable(f"The chat template refuses a message ({where}): {error}.",
                            remedy="A session appends any message to any other; use a template that writes them all.")


def _tojson(value: object, ensure_ascii: bool = False, indent: int | None = None,
            separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    """As chat templates expect it: plain JSON, without HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _token_text(value: object) -> str:
    """A token in tokenizer_config.json is a string, or an object with its content."""
    if isinstance(value, dict):
        return str(value.get("content", ""))
    return value if isinstance(value, str) else ""


def _written(call: ToolCall) -> str:
    """A call between its marks as the grammar has a model write it: compact, `arguments` otherwise as given."""
    try:
        arguments: object = json.loads(call.arguments or "{}")
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        raise InvalidRequest(f"The arguments of the call of {call.name} are not an object: {call.arguments!r}.",
                             remedy='Give the JSON text of an object, such as \'{"a": 1}\'.')
    compact = _SPACE_IN_JSON.sub(lambda found: found[1] or "", call.arguments or "{}")
    return f'{{"name":{json.dumps(call.name)},"arguments":{compact}}}'


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelBroken(f"{path} cannot be read: {error}.", remedy="Download it again.") from error


def _read_json(path: Path) -> dict[str, Any]:
    text = _read_text(path)
    try:
        data: object = json.loads(text)
    except ValueError as error:
        raise ModelBroken(f"{path} cannot be read: {error}.", remedy="Download it again.") from error
    if not isinstance(data, dict):
        raise ModelBroken(f"{path} holds a {type(data).__name__}, not an object.", remedy="Download it again.")
    return data

"""Messages to ids, only ever appended: what the model's own chat template writes, token by token.

Nothing about a family is written down here: frames of every role, the format of calls and the marks of reasoning are
read off the template (`chat.frames`, `chat.call_forms`) and proven on generated conversations (`chat.proof`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import copy
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeAlias, final

from agentspeed.chat.calls import numbered_id
from agentspeed.chat.environment import ChatTemplate
from agentspeed.chat.frames import ANSWER, RESULT, THOUGHT, USER
from agentspeed.chat.key_values import ArgumentKinds, closing, write_text
from agentspeed.chat.parser import CallReady, TurnParser
from agentspeed.chat.skeleton import Part, Shape, arguments_skeleton
from agentspeed.chat.tags import Tags
from agentspeed.chat.template_reading import ChatModel, read, tags_of
from agentspeed.errors import InvalidRequest
from agentspeed.messages import Assistant, Message, System, ToolCall, ToolMessage, User, role_of

History: TypeAlias = Literal["template", "keep"]
"""What becomes of earlier reasoning: what the template does with it, or it stays."""


@final
class ChatCodec:
    """For one model folder and one kind of session. Every method returns ids that are appended to a log."""

    def __init__(
        self,
        folder: Path,
        *,
        reasoning: bool | None = None,
        history: History = "template",
        variables: Mapping[str, Any] | None = None,
        system: bool = False,
        tools: bool = False,
    ) -> None:
        """Raises `ModelBroken` without a template, `TemplateUnstable` when its messages are not append-only.

        `reasoning`: turns it on or off where the template can; None leaves the template its own choice. `variables` are
        given to the template. `system` and `tools`: whether the session has them."""
        model = ChatModel.of(folder)
        self._set(model, {}, reasoning, history, variables or {}, system, tools)

    def view(
        self,
        *,
        reasoning: bool | None,
        history: History,
        variables: Mapping[str, Any] | None,
        system: bool,
        tools: bool,
    ) -> ChatCodec:
        """The codec of another kind of session of the same model, made once. Raises as the constructor does, and
        `InvalidRequest` for variables that are no JSON."""
        given = dict(variables or {})
        key = (reasoning, history, _written(given) if given else "{}", system, tools)
        if key not in self._views:
            made = object.__new__(ChatCodec)
            made._set(self._model, self._views, reasoning, history, given, system, tools)
            self._views[key] = made
        return self._views[key]

    def _set(
        self,
        model: ChatModel,
        views: dict[tuple[object, ...], ChatCodec],
        reasoning: bool | None,
        history: History,
        variables: Mapping[str, Any],
        system: bool,
        tools: bool,
    ) -> None:
        self._model, self._views, self.history = model, views, history
        self.tokenizer = model.tokenizer
        reading = read(model, reasoning, variables, system, tools)
        self._reading, self._frames, self._opening = reading, reading.frames, reading.opening
        self._calls, self._format, self._thinks = reading.calls, reading.form, reading.thinks
        self.tags, self.stop_ids, self.switch = reading.tags, reading.stop_ids, reading.switch
        self._kinds: ArgumentKinds | None = None
        self.generation_ids = tuple(self._frames.text_ids(self._frames.prompt([USER])))

    def with_tools(self, kinds: ArgumentKinds) -> ChatCodec:
        """The same codec, which writes texts among the arguments of calls so that they are read back as what they are.
        Without, they are written as the template writes them."""
        made = copy(self)
        made._kinds = kinds
        return made

    # ---- pieces ---------------------------------------------------------------------------------------------------
    def opening(self, system: str | None, tools: list[dict[str, Any]]) -> list[int]:
        """The log's first ids: what stands before the first message, with system text and tool definitions.

        Raises `InvalidRequest` for a system text or tools that the template does not show to the model."""
        return self._opening.ids(system, tools, now=datetime.now().astimezone())

    def append(self, history: Sequence[Message], new: Sequence[Message], *, generate: bool = False) -> list[list[int]]:
        """The ids of each new message, to be appended to a log of `history` that is closed (`closing`).

        `generate`: the model speaks next, and `prompt` follows. Raises `InvalidRequest` for a message that this model's
        template has not."""
        messages = [*history, *new]
        start = len(history)
        shapes, contents = self.shapes(messages), self._contents(messages, start)
        self._check(messages, start)
        try:
            regions = self._frames.parts(shapes, start, generate=generate)
            ids: list[list[int]] = []
            for number, region in enumerate(regions):
                place = start + number
                parts = self._completed(place, messages[place], self._cut(region, shapes, place, number))
                parts.append(Part(self._frames.closing(shapes[: place + 1])))
                ids.append(self._frames.ids(parts, contents, [shape.role for shape in shapes]))
        except ValueError as error:
            raise self._refusal(messages[start:], error) from error
        return ids

    def system(self, text: str) -> list[int]:
        """A system text that comes first, after an opening without one."""
        without, whole = self.opening(None, []), self.opening(text, [])
        if whole[: len(without)] != without:
            raise InvalidRequest(
                "This model's template writes a system text before what the log has already.",
                remedy="Give the text to Session(system=...).",
            )
        return whole[len(without) :]

    def message(self, message: Message) -> list[int]:
        """One whole message, as it stands after a question, or after an answer."""
        history: list[Message] = [User("a"), Assistant("b")]
        match message:
            case System(text=text):
                return self.system(text)
            case Assistant():
                history = history[:1]
            case ToolMessage(call_id=call_id, name=name):
                history = [User("a"), Assistant("", tool_calls=(ToolCall(id=call_id, name=name, arguments="{}"),))]
            case User():
                pass
        return self.append(history, [message])[0]

    def prompt(self, history: Sequence[Message]) -> list[int]:
        """What makes the model speak, after a log of `history` that is closed."""
        try:
            return self._frames.text_ids(self._frames.prompt(self.shapes(history) or [USER]))
        except ValueError as error:
            raise self._refusal(history[-1:], error) from error

    def closing(self, history: Sequence[Message] = ()) -> list[int]:
        """The ids that follow an answer of the model after `history`, the same for every next speaker."""
        shapes = self.shapes(history) or [USER]
        return self._frames.text_ids(self._frames.closing([*shapes, ANSWER]))

    def owed(self, drawn: Sequence[int], history: Sequence[Message] = ()) -> list[int]:
        """What of `closing` the ids that a model drew have not yet."""
        closing = self.closing(history)
        said = list(drawn[-len(closing) - 1 :])
        if self.stray_end(said, history):
            _ = said.pop()
        shared = next(n for n in range(len(closing), -1, -1) if n == 0 or said[-n:] == closing[:n])
        if not shared and said and said[-1] in self.stop_ids and said[-1] in closing:
            shared = closing.index(said[-1]) + 1  # it left out what the template writes before its end
        return closing[shared:]

    def stray_end(self, drawn: Sequence[int], history: Sequence[Message] = ()) -> bool:
        """Whether the last id that a model drew ends its turn and is no part of what its template writes there."""
        return bool(drawn) and drawn[-1] in self.stop_ids and drawn[-1] not in self.closing(history)

    def first_changed(
        self,
        history: Sequence[Message],
        new: Sequence[Message],
        drawn: Mapping[int, Sequence[int]],
        *,
        generate: bool,
    ) -> int | None:
        """The first message of `history` that the template writes differently now that `new` follows.

        `drawn` has the ids, the prompt's included, of answers that the model drew, or that have reasoning: they stay as
        they are unless the template leaves out the reasoning in them."""
        if self.history == "keep" or not history:
            return None
        try:
            before, after = self.shapes(history), self.shapes([*history, *new])
            changed = self._frames.changed(before, after, generate=generate)
            regions = self._frames.skeletons.script(after, generate=generate).regions
        except ValueError:
            return None  # it will be refused when it is appended
        hidden = next((n for n, ids in drawn.items() if self._hides(history[n], n, regions[n], ids)), None)
        return min((n for n in (changed, hidden) if n is not None), default=None)

    def _hides(self, message: Message, place: int, region: Sequence[Part], ids: Sequence[int]) -> bool:
        """Whether the template leaves out reasoning, or its marks, that the ids of an answer have."""
        if not self._thinks:
            return False
        text = "".join(part.text for part in region)
        shown = any(part.slot == (place, "reasoning") for part in region)
        marks = (self.tags.think_open, self.tags.think_close)
        written = [mark in text for mark in marks]
        thought = message.reasoning if isinstance(message, Assistant) else ""
        hidden = bool(thought) and not shown and thought.strip() in self.tokenizer.text(list(ids))
        return hidden or written != [self._holds(ids, mark) for mark in marks]

    # ---- what it is -----------------------------------------------------------------------------------------------
    @property
    def variables(self) -> Mapping[str, Any]:
        """What the template is given beside messages and tools."""
        return self._reading.variables

    @property
    def thinks(self) -> bool:
        """Whether the template knows reasoning."""
        return self._thinks

    def described(self, system: str | None, tools: list[dict[str, Any]]) -> tuple[str | None, list[dict[str, Any]]]:
        """The system text and the tools that the template itself is given (`Opening.described`)."""
        return self._opening.described(system, tools)

    def wrapped(self, tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Definitions of tools in the shape that the template takes them in."""
        return self._opening.wrapped(tools)

    @property
    def has_calls(self) -> bool:
        """Whether the template writes calls; else they stand in the log in a form of our own."""
        return self._calls

    @property
    def as_text(self) -> bool:
        """Whether the template takes the arguments of calls as text, or as an object."""
        return self._frames.skeletons.as_text

    @property
    def empty(self) -> str | None:
        """What the template takes for the text of a message that has only calls."""
        return "" if self._frames.skeletons.empty == "text" else None

    def tags_after(self, history: Sequence[Message]) -> Tags:
        """The marks of an answer to `history`: a prompt may open the reasoning, or not."""
        shapes = self.shapes(history)
        while shapes and shapes[-1].role == "assistant":
            _ = shapes.pop()  # an answer that goes on, or follows another
        try:
            return tags_of(self._frames, self.tags, shapes or [USER])
        except ValueError:
            return self.tags  # it will be refused when it is asked

    # ---- shapes and contents --------------------------------------------------------------------------------------
    def shapes(self, messages: Sequence[Message]) -> list[Shape]:
        """What of messages the template may decide by."""
        return [
            USER
            if isinstance(message, User)
            else RESULT
            if isinstance(message, ToolMessage)
            else self._answered(message)
            for message in messages
            if not isinstance(message, System)
        ]

    def _answered(self, message: Assistant) -> Shape:
        if not message.tool_calls:
            return THOUGHT if message.reasoning and self._thinks else ANSWER
        calls = message.tool_calls if self._calls else ()
        as_text = self._frames.skeletons.as_text
        skeletons = tuple("" if as_text else arguments_skeleton(self._format.read(call))[0] for call in calls)
        text = bool(message.text) or not calls
        return Shape("assistant", text, bool(message.reasoning) and self._thinks, skeletons, len(message.tool_calls))

    def _contents(self, messages: Sequence[Message], start: int) -> list[dict[str, str]]:
        """Of each message by field. Those before `start` stand in the log already, as they were written."""
        contents: list[dict[str, str]] = []
        ids: dict[str, str] = {}
        count = 0
        for place, message in enumerate(messages):
            match message:
                case Assistant(text=text, reasoning=reasoning, tool_calls=calls):
                    fields = {"text": text, "reasoning": reasoning}
                    for number, call in enumerate(calls):
                        if self._format.restarts and not message.raw:
                            ids[call.id] = f"functions.{call.name}:{number}"
                        else:
                            ids[call.id] = numbered_id(call, count) if self._format.numbered else call.id
                        fields |= {f"name{number}": call.name, f"id{number}": ids[call.id]}
                        fields |= {f"arguments{number}": self._format.styled(call)}
                        if self._calls and not self._frames.skeletons.as_text:
                            given = self._carried(call) if place >= start else self._format.read(call)
                            strings = arguments_skeleton(given)[1]
                            fields |= {f"string{number}.{at}": string for at, string in enumerate(strings)}
                        count += 1
                case ToolMessage(text=text, name=name, call_id=call_id):
                    fields = {"text": text, "name": name, "id": ids.get(call_id, call_id)}
                case User(text=text) | System(text=text):
                    fields = {"text": text}
            contents.append(fields)
        return contents

    def _carried(self, call: ToolCall) -> object:
        """The arguments of a call as the template is given them. Raises `InvalidRequest` for a text that the model's
        format has no way to write."""
        given, keys = self._format.read(call), self._format.keys
        if keys is None or self._kinds is None or not isinstance(given, dict):
            return given
        carried: dict[str, object] = {}
        for key, value in given.items():
            carried[key] = value
            if isinstance(value, str):
                carried[key] = said = write_text(value, self._kinds.of(call.name, key), keys)
                if said is None:
                    raise InvalidRequest(
                        f"{key} of the call of {call.name} holds {closing(keys)!r}, which ends a value in this model's "
                        "format of calls.",
                        remedy="Leave the mark out of the text, or take the text in an array, where it has quotes.",
                    )
        return carried

    def _cut(self, region: tuple[Part, ...], shapes: Sequence[Shape], place: int, number: int) -> list[Part]:
        """A message's parts without what closed the one before it."""
        if not number:
            return list(region)
        done = self._frames.closing(shapes[:place])
        first = region[0].text if region and region[0].slot is None else ""
        if not first.startswith(done):
            raise ValueError(f"it writes {first!r} where {done!r} was certain")
        return [Part(first[len(done) :]), *region[1:]] if first else list(region)

    def _completed(self, place: int, message: Message, parts: list[Part]) -> list[Part]:
        """For a template that writes no calls, or knows no reasoning: both stand where a model draws them."""
        if not isinstance(message, Assistant):
            return parts
        if message.reasoning and not self._thinks:
            thought = [Part(self.tags.think_open), Part("", (place, "reasoning")), Part(self.tags.think_close)]
            head = parts[0].text if parts and parts[0].slot is None else ""
            at = head.find(self._format.opening) if message.tool_calls and not message.text else -1
            begun = head if at < 0 else head[:at]
            parts = [Part(begun), *thought, Part(head[len(begun) :]), *parts[bool(head) :]]
        if message.tool_calls and not self._calls:
            pieces = self._format.written(message.tool_calls)
            parts = [*parts, Part(pieces[0])]
            for number in range(len(message.tool_calls)):
                parts += [Part("", (place, f"name{number}"), 1), Part(pieces[4 * number + 2])]
                parts += [Part("", (place, f"arguments{number}")), Part(pieces[4 * number + 4])]
        return parts

    def _holds(self, ids: Sequence[int], mark: str) -> bool:
        number = self.tags.ids.get(mark)
        return number in ids if number is not None else mark in self.tokenizer.text(list(ids))

    # ---- refusing -------------------------------------------------------------------------------------------------
    def _check(self, messages: Sequence[Message], start: int) -> None:
        """Raises `InvalidRequest` for an answer that the template cannot write as it is."""
        for message in messages[start:]:
            if not isinstance(message, Assistant):
                continue
            self._check_raw(message)
            calls, form = len(message.tool_calls), self._format
            if calls > form.most:
                raise InvalidRequest(
                    f"A message has {calls} calls, and this model's template writes {form.most}.",
                    remedy="Give parallel_calls=1, or one message for each call.",
                )
            if calls and message.text and not form.text_beside:
                raise InvalidRequest(
                    "A message has text beside its calls, and this model's template drops one of them.",
                    remedy="Give a message with calls no text.",
                )

    def _check_raw(self, message: Assistant) -> None:
        """`raw` tells how a model wrote it; what is written here is the text and the calls, which must be the same."""
        if message.raw in ("", message.text):
            return
        parser = TurnParser(self.tags, reasoning=bool(message.reasoning))
        calls = [piece for piece in (*parser.feed(message.raw), *parser.finish()) if isinstance(piece, CallReady)]
        if [call.name for call in calls] != [call.name for call in message.tool_calls]:
            raise InvalidRequest(
                "An assistant message's raw text has other calls than its tool_calls.",
                remedy="Leave raw out and give tool_calls=(ToolCall(...), ...).",
            )

    @staticmethod
    def _refusal(messages: Sequence[Message], error: ValueError) -> InvalidRequest:
        if isinstance(error, InvalidRequest):
            return error
        role = role_of(messages[-1]) if messages else "user"
        return InvalidRequest(
            f"This model's template has no {role} messages here: {error}.",
            remedy="Say it in a user message, or use a template that has them.",
        )


def _written(variables: Mapping[str, Any]) -> str:
    """A template's variables as JSON. Raises `InvalidRequest` for what is none, and for names that are taken."""
    if taken := sorted(ChatTemplate.RESERVED & variables.keys()):
        raise InvalidRequest(
            f"A template's variables cannot be called {', '.join(taken)}.",
            remedy="These names are what every template is given: messages, tools, the vocabulary's own tokens.",
        )
    try:
        return json.dumps(variables, sort_keys=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"A template's variables must be values of JSON: {error}.") from error

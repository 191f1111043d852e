"""Messages to ids, only ever appended: what the model's own chat template writes, token by token.

Nothing about a family is written down here: frames of every role, the format of calls and the marks of reasoning are
read off the template (`chat.frames`, `chat.call_forms`) and proven on generated conversations (`chat.proof`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, final

from agentspeed._base.validate import is_whole
from agentspeed.chat.call_forms import call_format
from agentspeed.chat.calls import DEFAULT_CALLS, numbered_id
from agentspeed.chat.environment import ChatTemplate, read_json
from agentspeed.chat.environment import load_template as load_template
from agentspeed.chat.frames import ANSWER, USER, Frames
from agentspeed.chat.opening import Opening
from agentspeed.chat.parser import CallReady, TurnParser
from agentspeed.chat.proof import check_base, problem, trims, ways_of_calls
from agentspeed.chat.skeleton import Part, Shape, Skeletons, TextMissing, arguments_skeleton
from agentspeed.chat.tags import Tags
from agentspeed.chat.tokenizer import TextTokenizer
from agentspeed.errors import InvalidRequest, ModelBroken, TemplateUnstable
from agentspeed.messages import Assistant, Message, System, ToolCall, ToolMessage, User, role_of

History: TypeAlias = Literal["template", "keep"]
"""What becomes of earlier reasoning: what the template does with it, or it stays."""
_SWITCHES: Final = ("enable_thinking", "thinking")
"""Variables by which published templates turn reasoning on and off."""
_VARIABLES: Final = {"tools_in_user_message": False}
"""Given to every template: tools stand above the conversation, where no message of it has to be known."""
_PAIRS: Final = (("<think>", "</think>"), ("◁think▷", "◁/think▷"), ("[THINK]", "[/THINK]"))


@final
@dataclass(frozen=True, slots=True)
class _Model:
    """What all codecs of one folder share."""

    tokenizer: TextTokenizer
    template: ChatTemplate
    end_ids: frozenset[int]
    """The model's own end-of-sequence ids."""
    views: dict[tuple[object, ...], ChatCodec]


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
        model = _Model(TextTokenizer(folder), load_template(folder), frozenset(_end_ids(folder)), {})
        self._set(model, reasoning, history, variables or {}, system, tools)

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
        try:
            written = json.dumps(given, sort_keys=True)
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidRequest(f"A template's variables must be values of JSON: {error}.") from error
        key = (reasoning, history, written, system, tools)
        if key not in self._model.views:
            made = object.__new__(ChatCodec)
            made._set(self._model, reasoning, history, given, system, tools)
            self._model.views[key] = made
        return self._model.views[key]

    def _set(
        self,
        model: _Model,
        reasoning: bool | None,
        history: History,
        variables: Mapping[str, Any],
        system: bool,
        tools: bool,
    ) -> None:
        self._model, self.history = model, history
        self._calls = False
        self.tokenizer = model.tokenizer
        self._variables = {**_VARIABLES, **variables}
        self.switch = self._switch()
        if reasoning is not None and self.switch is not None and self.switch not in variables:
            self._variables[self.switch] = reasoning
        self._opening = Opening(model.template, self.tokenizer, self._variables, tells=self._writes_calls())
        if tools and not self._opening.shows_tools():
            if not self._opening.tells:
                _ = self._opening.shape()  # raises what is missing
            system, tools_shown = True, False
        else:
            tools_shown = tools
        think = next((pair for pair in _PAIRS if pair[0] in model.template.source), _PAIRS[0])
        self._thinks = think[0] in model.template.source or think[1] in model.template.source
        self._frames = self._framed(think[1], system, tools_shown)
        check_base(self._frames, think)
        derived = call_format(self._frames, lambda text: text) if self._calls else None
        self._calls = derived is not None
        self._format = derived or DEFAULT_CALLS
        self._frames.trims.update(trims(self._frames, self._format if self._calls else None))
        self._prove(tools)
        self.tags = self._base_tags(think, tools)
        self.tags = self._tags_of([USER])
        self.generation_ids = tuple(self._frames.text_ids(self._frames.prompt([USER])))
        self.stop_ids = self._stop_ids(tools)

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
        shapes, contents = self.shapes(messages), self._contents(messages)
        start = len(history)
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
        return self._variables

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

    # ---- shapes and contents --------------------------------------------------------------------------------------
    def shapes(self, messages: Sequence[Message]) -> list[Shape]:
        """What of messages the template may decide by."""
        return [self._shape(message) for message in messages if not isinstance(message, System)]

    def _shape(self, message: Message) -> Shape:
        if not isinstance(message, Assistant):
            return Shape(role_of(message))
        calls = message.tool_calls if self._calls else ()
        as_text = self._frames.skeletons.as_text
        skeletons = tuple("" if as_text else arguments_skeleton(self._format.read(call))[0] for call in calls)
        text = bool(message.text) or not calls
        return Shape("assistant", text, bool(message.reasoning) and self._thinks, skeletons, len(message.tool_calls))

    def _contents(self, messages: Sequence[Message]) -> list[dict[str, str]]:
        contents: list[dict[str, str]] = []
        ids: dict[str, str] = {}
        count = 0
        for message in messages:
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
                            strings = arguments_skeleton(self._format.read(call))[1]
                            fields |= {f"string{number}.{at}": string for at, string in enumerate(strings)}
                        count += 1
                case ToolMessage(text=text, name=name, call_id=call_id):
                    fields = {"text": text, "name": name, "id": ids.get(call_id, call_id)}
                case User(text=text) | System(text=text):
                    fields = {"text": text}
            contents.append(fields)
        return contents

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

    # ---- deriving -------------------------------------------------------------------------------------------------
    def _switch(self) -> str | None:
        """The template's variable for reasoning, if it has one."""
        question = [{"role": "user", "content": "a"}]
        for name in _SWITCHES:
            if name not in self._model.template.source:
                continue
            try:
                on, off = (
                    self._model.template(question, generate=True, variables={**self._variables, name: value})
                    for value in (True, False)
                )
            except ValueError:
                continue
            if on != off:
                return name
        return None

    def _writes_calls(self) -> bool:
        def render(messages: list[dict[str, Any]], tools: bool, generate: bool) -> str:
            return self._model.template(messages, generate=generate, variables=self._variables)

        return (
            ways_of_calls(lambda empty, text: Skeletons(render, system=False, tools=False, empty=empty, as_text=text))
            is not None
        )

    def _render(self, messages: list[dict[str, Any]], tools: bool, generate: bool) -> str:
        given = self._opening.probes() if tools else None
        return self._model.template(messages, tools=given, generate=generate, variables=self._variables)

    def _prove(self, tools: bool) -> None:
        """Raises `TemplateUnstable` where slots do not tell what the template writes. Calls are proven where some may
        come."""
        told = problem(self._frames, None, reasoning=False)
        if told is not None:
            raise TemplateUnstable(
                f"The template cannot be appended to: {told}.", remedy="Use a template that only frames what is said."
            )
        told = problem(self._frames, self._format, reasoning=False) if tools and self._calls else None
        if told is not None:
            raise InvalidRequest(
                f"This model's template cannot hold calls and their results: {told}.",
                remedy="Open the session without tools, or use a template that only frames what is said.",
            )

    def _framed(self, think_close: str, system: bool, tools: bool) -> Frames:
        """Frames under the way of giving calls that the template understands."""
        found = ways_of_calls(
            lambda empty, as_text: Skeletons(self._render, system=system, tools=tools, empty=empty, as_text=as_text)
        )
        self._calls = found is not None
        skeletons = found or Skeletons(self._render, system=system, tools=tools)
        try:
            return Frames(skeletons, self.tokenizer, think_close)
        except TextMissing as error:
            raise TemplateUnstable(
                f"The template leaves out what is said: {error}.", remedy="Use a template that writes every message."
            ) from error
        except TemplateUnstable:
            raise
        except ValueError as error:
            raise self._unusable(error, system, tools) from error

    def _unusable(self, error: ValueError, system: bool, tools: bool) -> Exception:
        """Why a template cannot write the simplest conversations."""
        try:
            _ = self._model.template([{"role": "user", "content": "a"}], variables=self._variables)
        except ValueError:
            return ModelBroken(
                f"The chat template cannot write a single user message: {error}.",
                remedy="Correct it; it is the folder's chat_template.jinja, or in tokenizer_config.json.",
            )
        if system or tools:
            return InvalidRequest(f"This model's template refuses a system message or tools: {error}.")
        return TemplateUnstable(
            f"The chat template refuses a message (assistant after user): {error}.",
            remedy="A session appends any message to any other; use a template that writes them all.",
        )

    def tags_after(self, history: Sequence[Message]) -> Tags:
        """The marks of an answer to `history`: a prompt may open the reasoning, or not."""
        shapes = self.shapes(history)
        while shapes and shapes[-1].role == "assistant":
            _ = shapes.pop()  # an answer that goes on, or follows another
        try:
            return self._tags_of(shapes or [USER])
        except ValueError:
            return self.tags  # it will be refused when it is asked

    def _tags_of(self, shapes: Sequence[Shape]) -> Tags:
        opened, closed = self.tags.think_open, self.tags.think_close
        prompt = self._frames.prompt(shapes)
        answer = self._frames.before(shapes, ANSWER).removeprefix(self._frames.closing(shapes))
        lead = answer.removeprefix(prompt) if answer.startswith(prompt) else ""
        bare = lead.rpartition(closed)[2]
        return replace(
            self.tags,
            lead=bare if bare.isspace() else "",
            thinking=prompt.rstrip().endswith(opened),
            thinks=opened in lead,
        )

    def _base_tags(self, think: tuple[str, str], tools: bool) -> Tags:
        """Without what depends on the prompt."""
        opened, closed = think
        form = self._format
        tail = self._frames.closing([USER, ANSWER])
        follows = tools and self._calls and tail and form.opening.startswith(tail)
        # Only where something else can end the turn.
        ends = self._model.end_ids - set(self._frames.text_ids(tail)[:1])
        text_end = tail if follows and ends else ""
        texts = [form.opening, form.name_end, form.call_close, form.joint, form.section_close, opened, closed, text_end]
        if form.keys is not None:
            texts += [form.keys.key_open, form.keys.text_open, form.keys.json_open, form.keys.value_close]
        ids = {
            text[start:end]: number for text in texts for start, end, number in self.tokenizer.read_template(text)[1]
        }
        return Tags(
            calls=form, think_open=opened, think_close=closed, roomy=self._is_roomy(closed), text_end=text_end, ids=ids
        )

    def _is_roomy(self, closed: str) -> bool:
        """Whether ends of lines stand around reasoning: always where the template hides how it is written."""
        try:
            region = self._frames.skeletons.script([USER, Shape("assistant", reasoning=True)]).regions[1]
        except ValueError:
            return True
        text = "".join("\0" if part.slot else part.text for part in region)
        return "\0" not in text[:-1] or f"\0\n{closed}" in text or f"{closed}\n" in text

    def _stop_ids(self, tools: bool) -> tuple[int, ...]:
        """Ids that end a turn: the end of an assistant message, and the model's own end-of-sequence ids."""
        stops = set(self._model.end_ids)
        closing = self.closing()
        if not self.tags.text_end:
            stops.update(closing[:1])
        elif stops >= set(closing[:1]):
            stops -= set(closing[:1])
        if not closing:  # the family's messages end where the next one begins
            for shapes, following in self._followers():
                try:
                    stops.update(self._frames.text_ids(self._frames.before(shapes, following))[:1])
                except ValueError:
                    continue
        return tuple(sorted(stops))

    def _followers(self) -> list[tuple[list[Shape], Shape]]:
        pairs = [([USER, ANSWER], USER)]
        if self._calls:
            calls = ("" if self._frames.skeletons.as_text else arguments_skeleton({"k": "v"})[0],)
            pairs.append(([USER, Shape("assistant", False, False, calls, 1)], Shape("tool")))
        return pairs


def _end_ids(folder: Path) -> set[int]:
    """The end-of-sequence ids that the folder's configuration names."""
    ends: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if path.is_file():
            eos = read_json(path).get("eos_token_id")
            numbers = eos if isinstance(eos, list) else [] if eos is None else [eos]
            if not all(is_whole(number) and number >= 0 for number in numbers):
                raise ModelBroken(
                    f"{path} says eos_token_id is {eos!r}; it must be the number of a token, or several.",
                    remedy="Correct it; tokenizer.json has the numbers of its tokens.",
                )
            ends.update(numbers)
    return ends

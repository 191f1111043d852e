"""What a codec must know of a chat template, read off it once and proven: frames, calls, marks, ids that end a turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, final

from agentspeed._base.validate import is_whole
from agentspeed.chat.call_forms import call_format
from agentspeed.chat.calls import DEFAULT_CALLS, CallFormat
from agentspeed.chat.environment import ChatTemplate, load_template, read_json
from agentspeed.chat.frames import ANSWER, USER, Frames
from agentspeed.chat.opening import Opening
from agentspeed.chat.proof import check_base, problem, trims, unread, ways_of_calls
from agentspeed.chat.skeleton import Shape, Skeletons, TextMissing, arguments_skeleton
from agentspeed.chat.tags import Tags
from agentspeed.chat.tokenizer import TextTokenizer
from agentspeed.errors import AgentspeedError, InvalidRequest, ModelBroken, TemplateUnstable

_SWITCHES: Final = ("enable_thinking", "thinking")
"""Variables by which published templates turn reasoning on and off."""
_VARIABLES: Final = {"tools_in_user_message": False}
"""Given to every template: tools stand above the conversation, where no message of it has to be known."""
_PAIRS: Final = (("<think>", "</think>"), ("◁think▷", "◁/think▷"), ("[THINK]", "[/THINK]"))


@final
@dataclass(frozen=True, slots=True)
class ChatModel:
    """A folder's tokenizer and template: what the readings for all kinds of session share."""

    tokenizer: TextTokenizer
    template: ChatTemplate
    end_ids: frozenset[int]
    """The model's own end-of-sequence ids."""

    @classmethod
    def of(cls, folder: Path) -> ChatModel:
        """Raises `ModelBroken` without a template, or for a configuration that cannot be read."""
        return cls(TextTokenizer(folder), load_template(folder), frozenset(_end_ids(folder)))


def read(
    model: ChatModel, reasoning: bool | None, variables: Mapping[str, Any], system: bool, tools: bool
) -> TemplateReading:
    """Raises `ModelBroken`, `TemplateUnstable` and `InvalidRequest` for a template that cannot be appended to, and with
    its own words for one that refuses what every session needs."""
    try:
        return TemplateReading(model, reasoning, variables, system, tools)
    except AgentspeedError:
        raise
    except ValueError as error:
        raise TemplateUnstable(
            f"The chat template refuses what a session with{'' if tools else 'out'} tools writes: {error}.",
            remedy="Use a template that writes every message after any other.",
        ) from error


@final
class TemplateReading:
    """Of one template under one set of variables, for sessions with or without a system text and tools. Made by `read`;
    nothing of it changes afterwards."""

    def __init__(
        self, model: ChatModel, reasoning: bool | None, variables: Mapping[str, Any], system: bool, tools: bool
    ) -> None:
        self._model = model
        self.calls = False
        """Whether the template writes calls."""
        self.variables = {**_VARIABLES, **variables}
        self.switch = self._switch()
        """The variable by which the template turns reasoning on and off."""
        if reasoning is not None and self.switch is not None and self.switch not in variables:
            self.variables[self.switch] = reasoning
        self.opening = Opening(model.template, model.tokenizer, self.variables, tells=self._writes_calls())
        if tools and not self.opening.shows_tools():
            if not self.opening.tells:
                _ = self.opening.shape()  # raises what is missing
            system, tools_shown = True, False
        else:
            tools_shown = tools
        think = next((pair for pair in _PAIRS if pair[0] in model.template.source), _PAIRS[0])
        self.thinks = think[0] in model.template.source or think[1] in model.template.source
        """Whether the template knows reasoning."""
        self.frames = self._framed(think[1], system, tools_shown)
        check_base(self.frames, think)
        derived = call_format(self.frames, lambda text: text) if self.calls else None
        self.calls = derived is not None
        self.form = derived or DEFAULT_CALLS
        """How calls are written."""
        self.frames.trims.update(trims(self.frames, self.form if self.calls else None))
        self._prove(tools, think)
        base = self._base_tags(think, tools)
        if tools and self.calls:
            self.form = self._read_back(base)
        self.tags = tags_of(self.frames, replace(base, calls=self.form), [USER])
        """The marks of an answer to a question."""
        self.stop_ids = self._stop_ids()
        """Ids that end a turn."""

    def _switch(self) -> str | None:
        """The template's variable for reasoning, if it has one."""
        question = [{"role": "user", "content": "a"}]
        for name in _SWITCHES:
            if name not in self._model.template.source:
                continue
            try:
                on, off = (
                    self._model.template(question, generate=True, variables={**self.variables, name: value})
                    for value in (True, False)
                )
            except ValueError:
                continue
            if on != off:
                return name
        return None

    def _writes_calls(self) -> bool:
        def render(messages: list[dict[str, Any]], tools: bool, generate: bool) -> str:
            return self._model.template(messages, generate=generate, variables=self.variables)

        return (
            ways_of_calls(lambda empty, text: Skeletons(render, system=False, tools=False, empty=empty, as_text=text))
            is not None
        )

    def _render(self, messages: list[dict[str, Any]], tools: bool, generate: bool) -> str:
        given = self.opening.probes() if tools else None
        return self._model.template(messages, tools=given, generate=generate, variables=self.variables)

    def _read_back(self, tags: Tags) -> CallFormat:
        """The format, with no more calls in a message than are read back as they are written. Raises `InvalidRequest`
        where none are."""
        raw = unread(self.frames, tags, 1)
        if raw is not None:
            raise self._no_calls(f"a call is not read back as it is written: {raw!r}")
        several = any(unread(self.frames, tags, count) is not None for count in range(2, min(3, self.form.most) + 1))
        return replace(self.form, most=1) if several else self.form

    @staticmethod
    def _no_calls(why: str) -> InvalidRequest:
        return InvalidRequest(
            f"This model's template cannot hold calls and their results: {why}.",
            remedy="Open the session without tools, or use a template that only frames what is said.",
        )

    def _prove(self, tools: bool, think: tuple[str, str]) -> None:
        """Raises `TemplateUnstable` where slots do not tell what the template writes. Calls are proven where some may
        come."""
        told = problem(self.frames, None, think, reasoning=False)
        if told is not None:
            raise TemplateUnstable(
                f"The template cannot be appended to: {told}.", remedy="Use a template that only frames what is said."
            )
        told = problem(self.frames, self.form, think, reasoning=False) if tools and self.calls else None
        if told is not None:
            raise self._no_calls(told)

    def _framed(self, think_close: str, system: bool, tools: bool) -> Frames:
        """Frames under the way of giving calls that the template understands."""
        found = ways_of_calls(
            lambda empty, as_text: Skeletons(self._render, system=system, tools=tools, empty=empty, as_text=as_text)
        )
        self.calls = found is not None
        skeletons = found or Skeletons(self._render, system=system, tools=tools)
        try:
            return Frames(skeletons, self._model.tokenizer, think_close)
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
            _ = self._model.template([{"role": "user", "content": "a"}], variables=self.variables)
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

    def _base_tags(self, think: tuple[str, str], tools: bool) -> Tags:
        """Without what depends on the prompt."""
        opened, closed = think
        form = self.form
        tail = self.frames.closing([USER, ANSWER])
        follows = tools and self.calls and tail and form.opening.startswith(tail)
        # Only where something else can end the turn.
        ends = self._model.end_ids - set(self._end_of(tail))
        text_end = tail if follows and ends else ""
        texts = [form.opening, form.name_end, form.call_close, form.joint, form.section_close, opened, closed, text_end]
        if form.keys is not None:
            texts += [form.keys.key_open, form.keys.text_open, form.keys.json_open, form.keys.value_close]
        ids = {
            text[start:end]: number
            for text in texts
            for start, end, number in self._model.tokenizer.read_template(text)[1]
        }
        return Tags(
            calls=form, think_open=opened, think_close=closed, roomy=self._is_roomy(closed), text_end=text_end, ids=ids
        )

    def _is_roomy(self, closed: str) -> bool:
        """Whether ends of lines stand around reasoning: always where the template hides how it is written."""
        try:
            region = self.frames.skeletons.script([USER, Shape("assistant", reasoning=True)]).regions[1]
        except ValueError:
            return True
        text = "".join("\0" if part.slot else part.text for part in region)
        return "\0" not in text[:-1] or f"\0\n{closed}" in text or f"{closed}\n" in text

    def _stop_ids(self) -> tuple[int, ...]:
        """Ids that end a turn: the end of an assistant message, and the model's own end-of-sequence ids. An ordinary
        token is none: it would end answers that merely have it."""
        stops = set(self._model.end_ids)
        closing = self.frames.closing([USER, ANSWER])
        if not self.tags.text_end:
            stops.update(self._end_of(closing))
        elif stops >= set(self._end_of(closing)):
            stops -= set(self._end_of(closing))
        if not closing:  # the family's messages end where the next one begins
            for shapes, following in self._followers():
                try:
                    stops.update(self._end_of(self.frames.before(shapes, following)))
                except ValueError:
                    continue
        return tuple(sorted(stops))

    def _end_of(self, text: str) -> list[int]:
        """The first control token that a template writes there, if any."""
        return [number for _, _, number in self._model.tokenizer.read_template(text)[1][:1]]

    def _followers(self) -> list[tuple[list[Shape], Shape]]:
        pairs = [([USER, ANSWER], USER)]
        if self.calls:
            calls = ("" if self.frames.skeletons.as_text else arguments_skeleton({"k": "v"})[0],)
            pairs.append(([USER, Shape("assistant", False, False, calls, 1)], Shape("tool")))
        return pairs


def tags_of(frames: Frames, tags: Tags, shapes: Sequence[Shape]) -> Tags:
    """The marks of an answer after these messages: a prompt may open the reasoning, or not. Raises ValueError where the
    template has no answer there."""
    opened, closed = tags.think_open, tags.think_close
    prompt = frames.prompt(shapes)
    answer = frames.before(shapes, ANSWER).removeprefix(frames.closing(shapes))
    lead = answer.removeprefix(prompt) if answer.startswith(prompt) else ""
    bare = lead.rpartition(closed)[2]
    return replace(
        tags,
        lead=bare if bare.isspace() else "",
        thinking=prompt.rstrip().endswith(opened),
        thinks=opened in lead,
    )


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

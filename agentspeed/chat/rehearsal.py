"""Random conversations, written into a log message by message as a session does it, beside what a template renders.

`rehearse` tells of a model folder which kinds of sessions its template can hold, and whether their logs are what the
template writes of the whole conversation, id by id.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from pathlib import Path
from typing import Any, Final, final

from agentspeed.chat import transcript
from agentspeed.chat.codec import ChatCodec, History
from agentspeed.chat.environment import ChatTemplate, load_template
from agentspeed.chat.parser import CallReady, ReasoningPiece, TextPiece, TurnParser
from agentspeed.chat.tags import Tags
from agentspeed.chat.token_log import TokenLog
from agentspeed.errors import AgentspeedError
from agentspeed.messages import Assistant, Message, ToolCall, ToolMessage, User

WORDS: Final = (
    "Some words.", "é 😀, and more", "two\nlines here", "a {b} | c", "1", "Is it? It is", "日本語", "x" * 40,
)  # fmt: skip
ARGUMENTS: Final[tuple[dict[str, Any], ...]] = (
    {"word": "a"},
    {"word": "two\nlines", "count": 2},
    {"word": 'quo"ted \\ back', "count": -1, "items": [1, "x", {"deep": None}]},
    {"word": "é 😀 5", "flag": True},
    {"flag": False, "count": None, "items": []},
    {"count": 1.5, "items": [True, None, {"a": {"b": [1, False]}}], "word": "True"},
    {},
)
TOOLS: Final[list[dict[str, Any]]] = [
    {
        "name": name,
        "description": "Looks it up.",
        "parameters": {
            "type": "object",
            "properties": {
                "word": {"type": "string"},
                "count": {"type": "integer"},
                "items": {"type": "array", "items": {"type": "string"}},
                "flag": {"type": "boolean"},
            },
            "required": [],
        },
    }
    for name in ("look_up", "count_them")
]
_SYSTEM: Final = "Be brief."
_AROUND: Final = 120
"""Characters that are shown before the place where two texts differ."""


class Differs(AssertionError):
    """A log is not what its template renders, or a turn was not read as it was meant; the message shows where."""


@final
class Log:
    """A log that is written as a session writes it; `drawn` plays the model."""

    def __init__(
        self,
        codec: ChatCodec,
        template: ChatTemplate,
        *,
        reasoning: bool | None,
        system: str | None,
        tools: bool,
        history: History = "template",
    ) -> None:
        """Raises what a session of this kind would raise. `codec` is any of the folder's."""
        self.system, self.tools, self.reasoning, self.template = system, tools, bool(reasoning), template
        self.codec = codec.view(
            reasoning=reasoning, history=history, variables=None, system=system is not None, tools=tools
        )
        self.tags = self.codec.tags
        self.mirror = TokenLog()
        self.mirror.append(self.codec.opening(system, TOOLS if tools else []))
        self.revisions = 0

    def add(self, *messages: Message) -> None:
        self._revise(messages, complete=False)
        transcript.write(self.mirror, self.codec, messages)

    def ask(self, *messages: Message) -> None:
        """Ready for the model to speak."""
        self._revise(messages, complete=True)
        self.tags = transcript.tags_for(self.mirror, self.codec, messages)
        _ = transcript.open_reply(self.mirror, self.codec, messages)

    def drawn(self, said: Assistant, end: int) -> None:
        """The model says this, in its family's way, and ends its turn with `end`, after what its
        template writes before that."""
        raw = written(self.codec, self.tags, [span.message for span in self.mirror.spans], said)
        opened = self.mirror.open_at
        if opened is None:
            raise ValueError("nobody asked the model to speak")
        closing = self.codec.closing([span.message for span in self.mirror.spans])
        ends = closing[: closing.index(end) + 1] if end in closing else [end]
        self.mirror.drew([*self.codec.tokenizer.template_ids(raw), *ends], [], [])
        transcript.settle(self.mirror, self.codec, "stop_id")
        transcript.record(self.mirror, self.parsed(raw, said), opened)

    def parsed(self, raw: str, said: Assistant) -> Assistant:
        """What a turn makes of what was drawn. Raises `Differs` where that is not what was meant."""
        parser = TurnParser(
            self.tags, reasoning=self.reasoning, tools={tool["name"]: tool["parameters"] for tool in TOOLS}
        )
        pieces = [*parser.feed(raw), *parser.finish()]
        calls = tuple(
            ToolCall(id=piece.id or said.tool_calls[at].id, name=piece.name, arguments=piece.arguments)
            for at, piece in enumerate(piece for piece in pieces if isinstance(piece, CallReady))
            if piece.id or at < len(said.tool_calls)
        )
        text = "".join(piece.text for piece in pieces if isinstance(piece, TextPiece))
        thought = "".join(piece.text for piece in pieces if isinstance(piece, ReasoningPiece))
        read = [(call.name, json.loads(call.arguments)) for call in calls]
        meant = [(call.name, json.loads(call.arguments)) for call in said.tool_calls]
        if (text, thought.strip("\n"), read) != (said.text, said.reasoning, meant):
            raise Differs(f"a turn is read otherwise than it was meant: {raw!r} as {pieces}")
        return Assistant(text, calls, said.reasoning, raw)

    def rendered(self, *, generate: bool) -> list[int]:
        """The ids of the whole conversation as the template renders it."""
        system, tools = self.codec.described(self.system, TOOLS if self.tools else [])
        messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
        messages += as_dicts(self.codec, [span.message for span in self.mirror.spans])
        wrapped = self.codec.wrapped(tools) or None
        text = self.template(messages, tools=wrapped, generate=generate, variables=self.codec.variables)
        return self.codec.tokenizer.template_ids(text)

    def check(self) -> None:
        """Raises `Differs` unless the log is the whole conversation as the template renders it."""
        ours, theirs = list(self.mirror.ids), self.rendered(generate=True)
        if ours == theirs:
            return
        tokenizer = self.codec.tokenizer
        a, b = tokenizer.text(ours), tokenizer.text(theirs)
        at = next((n for n, (one, other) in enumerate(zip(a, b, strict=False)) if one != other), min(len(a), len(b)))
        shown = [type(span.message).__name__ for span in self.mirror.spans]
        first = max(0, at - _AROUND)
        raise Differs(
            f"{shown}\n at {at} of {len(a)}, {len(b)}\n ours   {a[first : at + 80]!r}\n theirs {b[first : at + 80]!r}"
        )

    def _revise(self, messages: Sequence[Message], *, complete: bool) -> None:
        found = transcript.revision(self.mirror, self.codec, messages, complete=complete)
        if found is not None:
            self.revisions += 1
            transcript.revise(self.mirror, found)


def written(codec: ChatCodec, tags: Tags, history: Sequence[Message], said: Assistant) -> str:
    """What the model draws to say this after its prompt: as the template shows it, with the reasoning where it goes."""
    tokenizer = codec.tokenizer
    prompt = tokenizer.text(codec.prompt(history))
    whole = tokenizer.text(codec.append(history, [said])[0])
    whole = whole.removesuffix(tokenizer.text(codec.closing(history)))
    hidden = bool(said.reasoning) and said.reasoning not in whole
    if whole.startswith(prompt) and not hidden:
        return whole[len(prompt) :]
    begun = commonprefix([prompt, whole])  # noqa: RUF071
    at = begun.rfind("<")
    rest = whole[len(begun) if at < 0 or ">" in begun[at:] else at :]
    for mark in (tags.think_open, tags.think_close):
        rest = rest.lstrip("\n").removeprefix(mark)
    if not tags.thinking and not hidden:
        return rest
    around = ("\n", "\n\n") if tags.roomy else ("", "")
    opened = "" if tags.thinking else tags.think_open + around[0]
    return f"{opened}{said.reasoning}{around[0]}{tags.think_close}{around[1]}{rest}"


def as_dicts(codec: ChatCodec, messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as templates are given them. Raises ValueError for a system message."""
    made: list[dict[str, Any]] = []
    ids: dict[str, str] = {}
    for message in messages:
        match message:
            case User(text=text):
                made.append({"role": "user", "content": text})
            case ToolMessage(text=text, name=name, call_id=call_id):
                made.append({"role": "tool", "content": text, "name": name, "tool_call_id": ids.get(call_id, call_id)})
            case Assistant(text=text, tool_calls=calls, reasoning=reasoning):
                said: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else codec.empty}
                if reasoning:
                    said["reasoning_content"] = reasoning
                for place, call in enumerate(calls):
                    number = place if codec.tags.calls.restarts else len(ids)
                    ids[call.id] = f"functions.{call.name}:{number}" if codec.tags.calls.numbered else call.id
                    arguments = call.arguments if codec.as_text else json.loads(call.arguments)
                    function = {"name": call.name, "arguments": arguments}
                    said.setdefault("tool_calls", []).append(
                        {"id": ids[call.id], "type": "function", "function": function}
                    )
                made.append(said)
            case _:
                raise ValueError(f"a {type(message).__name__} stands in the opening")
    return made


def converse(log: Log, chance: random.Random, *, most: int = 12, compared: bool = True) -> None:
    """Messages in any order that a session can have; at every prompt the log is what the template renders.

    Raises `Differs` where it is not, unless it is not `compared`."""
    form = log.codec.tags.calls
    waiting: list[ToolCall] = []
    names = [tool["name"] for tool in TOOLS]
    for _ in range(chance.randint(1, most)):
        if waiting:
            call = waiting.pop(0)
            log.add(ToolMessage(call_id=call.id, name=call.name, text=chance.choice((*WORDS, ""))))
            continue
        if not log.mirror.spans or chance.random() < 0.3:
            log.add(User(chance.choice(WORDS)))
            continue
        made = chance.randint(0, min(3, form.most)) if log.tools and log.codec.has_calls else 0
        beside = not made or (form.text_beside and chance.random() < 0.5)
        count = len([span for span in log.mirror.spans if isinstance(span.message, Assistant)])
        style = (", ", ": ") if form.spaced else (",", ":")
        waiting = [
            ToolCall(
                id=f"call_{count}_{at}",
                name=name,
                arguments=json.dumps(chance.choice(ARGUMENTS), ensure_ascii=False, separators=style),
            )
            for at, name in enumerate(chance.choices(names, k=made))
        ]
        thought = f"Hm: {chance.choice(WORDS)}" if log.codec.thinks and log.reasoning and chance.random() < 0.6 else ""
        said = Assistant(chance.choice(WORDS) if beside else "", tuple(waiting), thought)
        if chance.random() < 0.4 or isinstance(log.mirror.spans[-1].message, Assistant):
            log.add(said)
            continue
        log.ask()
        if compared:
            log.check()
        log.drawn(said, chance.choice(log.codec.stop_ids))
        last = log.mirror.spans[-1].message
        waiting = list(last.tool_calls) if isinstance(last, Assistant) else []
    for call in waiting:
        log.add(ToolMessage(call_id=call.id, name=call.name, text="Last."))
    log.ask(User("The end."))
    if compared:
        log.check()


@final
@dataclass(frozen=True, slots=True)
class Rehearsed:
    """One kind of session of one template."""

    kind: str
    """As a user would say it: "tools, a system text, reasoning on"."""
    conversations: int
    equal: int
    recomputed: int
    """Conversations of which a part was written again, because the template leaves out earlier reasoning."""
    refused: str
    """Why such a session cannot be opened; empty where it can."""
    differs: str
    """The first conversation that was not as the template writes it; empty where there is none."""

    @property
    def holds(self) -> bool:
        """Whether every conversation is as the template writes it."""
        return not self.refused and self.equal == self.conversations


def rehearse(folder: Path, conversations: int) -> Iterator[Rehearsed]:
    """Every kind of session in turn, each with so many random conversations (the same at every call).

    Raises what opening any session of the folder raises: `ModelBroken`, `TemplateUnstable`."""
    codec, template = ChatCodec(folder), load_template(folder)
    switches: tuple[bool | None, ...] = (False, True) if codec.switch is not None or codec.thinks else (None,)
    for tools, system, reasoning in itertools.product((False, True), (None, _SYSTEM), switches):
        kind = ", ".join(
            (
                "tools" if tools else "no tools",
                "no system text" if system is None else "a system text",
                *(() if reasoning is None else ("reasoning on" if reasoning else "reasoning off",)),
            )
        )
        given = {"reasoning": reasoning, "system": system, "tools": tools}
        yield _rehearsed(kind, codec, template, given, conversations)


def _rehearsed(
    kind: str, codec: ChatCodec, template: ChatTemplate, given: Mapping[str, Any], conversations: int
) -> Rehearsed:
    equal = recomputed = 0
    differs = ""
    for seed in range(conversations):
        try:
            log = Log(codec, template, **given)
        except AgentspeedError as error:
            return Rehearsed(kind, 0, 0, 0, str(error), "")
        try:
            converse(log, random.Random(seed))
            equal += 1
        except (Differs, AgentspeedError, ValueError) as error:
            differs = differs or f"conversation {seed}: {error}"
        recomputed += bool(log.revisions)
    return Rehearsed(kind, conversations, equal, recomputed, "", differs)

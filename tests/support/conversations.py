"""Random conversations, written into a log message by message, beside what the template writes at once."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from functools import lru_cache
from os.path import commonprefix
from pathlib import Path
from typing import Any

from agentspeed import Assistant, ToolCall, ToolMessage, User
from agentspeed.chat import transcript
from agentspeed.chat.codec import ChatCodec
from agentspeed.chat.environment import ChatTemplate, load_template
from agentspeed.chat.parser import CallReady, ReasoningPiece, TextPiece, TurnParser
from agentspeed.chat.tags import Tags
from agentspeed.chat.token_log import TokenLog
from agentspeed.engine import NANO
from agentspeed.messages import Message

WORDS = ("Some words.", "é 😀, and more", "two\nlines here", "a {b} | c", "1", "Is it? It is", "日本語", "x" * 40)
ARGUMENTS: tuple[dict[str, Any], ...] = (
    {"word": "a"},
    {"word": "two\nlines", "count": 2},
    {"word": 'quo"ted \\ back', "count": -1, "items": [1, "x", {"deep": None}]},
    {"word": "é 😀 5", "flag": True},
    {},
)
TOOLS: list[dict[str, Any]] = [
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


def folder_of(
    folder: Path, template: str, controls: Sequence[str], *, end: str = "", plain: Sequence[str] = ()
) -> Path:
    """A model folder without weights: the shipped model's vocabulary with a family's control tokens. `plain` ones are
    added tokens that are not special."""
    raw = json.loads((NANO / "tokenizer.json").read_text())
    known = raw["model"]["vocab"]
    free = itertools.count(len(known))
    raw["added_tokens"] = []
    for token in ("<BOS>", "<EOS>", *controls, *plain):
        if any(token == other["content"] for other in raw["added_tokens"]):
            continue
        raw["added_tokens"].append(
            {
                "id": known[token] if token in known else next(free),
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": token not in plain,
            }
        )
    numbers = {token["content"]: token["id"] for token in raw["added_tokens"]}
    folder.mkdir(parents=True, exist_ok=True)
    _ = (folder / "tokenizer.json").write_text(json.dumps(raw))
    _ = (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    _ = (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<BOS>", "eos_token": "<EOS>"}))
    _ = (folder / "config.json").write_text(json.dumps({"eos_token_id": numbers[end or "<EOS>"]}))
    return folder


@lru_cache(maxsize=4)
def _codec(folder: Path) -> ChatCodec:
    return ChatCodec(folder)


@lru_cache(maxsize=4)
def _template(folder: Path) -> ChatTemplate:
    return load_template(folder)


class Log:
    """A log that is written as a session writes it; `drawn` plays the model."""

    def __init__(self, folder: Path, *, reasoning: bool, system: str | None, tools: bool, history: str = "template"):
        self.system, self.tools, self.reasoning = system, tools, reasoning
        self.codec = _codec(folder).view(
            reasoning=reasoning,
            history=history,
            variables=None,
            system=system is not None,
            tools=tools,  # type: ignore[arg-type]
        )
        self.template = _template(folder)
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
        """The model says this, in its family's way, and ends its turn with `end`."""
        raw = written(self.codec, self.tags, [span.message for span in self.mirror.spans], said)
        assert self.mirror.open_at is not None
        opened = self.mirror.open_at
        self.mirror.drew([*self.codec.tokenizer.template_ids(raw), end], [], [])
        transcript.settle(self.mirror, self.codec, "stop_id")
        transcript.record(self.mirror, self.parsed(raw, said), opened)

    def parsed(self, raw: str, said: Assistant) -> Assistant:
        """What a turn makes of what was drawn, which must be what was meant."""
        parser = TurnParser(
            self.tags, reasoning=self.reasoning, tools={tool["name"]: tool["parameters"] for tool in TOOLS}
        )
        pieces = [*parser.feed(raw), *parser.finish()]
        calls = tuple(
            ToolCall(id=piece.id or said.tool_calls[at].id, name=piece.name, arguments=piece.arguments)
            for at, piece in enumerate(piece for piece in pieces if isinstance(piece, CallReady))
        )
        text = "".join(piece.text for piece in pieces if isinstance(piece, TextPiece))
        thought = "".join(piece.text for piece in pieces if isinstance(piece, ReasoningPiece))
        read = [(call.name, json.loads(call.arguments)) for call in calls]
        meant = [(call.name, json.loads(call.arguments)) for call in said.tool_calls]
        assert (text, thought.strip("\n"), read) == (said.text, said.reasoning, meant), (raw, pieces)
        return Assistant(text, calls, said.reasoning, raw)

    def rendered(self, *, generate: bool) -> list[int]:
        """The ids of the whole conversation as the template renders it."""
        system, tools = self.codec.described(self.system, TOOLS if self.tools else [])
        messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
        messages += dicts(self.codec, [span.message for span in self.mirror.spans])
        wrapped = [{"type": "function", "function": tool} for tool in tools] or None
        text = self.template(messages, tools=wrapped, generate=generate, variables=self.codec.variables)
        return self.codec.tokenizer.template_ids(text)

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


def dicts(codec: ChatCodec, messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as templates are given them."""
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
                for call in calls:
                    number = len(ids)
                    ids[call.id] = f"functions.{call.name}:{number}" if codec.tags.calls.numbered else call.id
                    arguments = call.arguments if codec.as_text else json.loads(call.arguments)
                    function = {"name": call.name, "arguments": arguments}
                    said.setdefault("tool_calls", []).append(
                        {"id": ids[call.id], "type": "function", "function": function}
                    )
                made.append(said)
            case _:
                raise AssertionError(message)
    return made


def converse(log: Log, chance: random.Random, *, most: int = 12, calls: bool = True) -> None:
    """Messages in any order that a session can have; at every prompt the log is what the template renders."""
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
        made = chance.randint(0, min(3, form.most)) if calls and log.tools else 0
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
        check(log)
        log.drawn(said, chance.choice(log.codec.stop_ids))
        last = log.mirror.spans[-1].message
        assert isinstance(last, Assistant)
        waiting = list(last.tool_calls)
    for call in waiting:
        log.add(ToolMessage(call_id=call.id, name=call.name, text="Last."))
    log.ask(User("The end."))
    check(log)


def check(log: Log) -> None:
    """The log is the whole conversation as the template renders it."""
    ours, theirs = list(log.mirror.ids), log.rendered(generate=True)
    if ours != theirs:
        tokenizer = log.codec.tokenizer
        a, b = tokenizer.text(ours), tokenizer.text(theirs)
        at = next((n for n, (one, other) in enumerate(zip(a, b, strict=False)) if one != other), min(len(a), len(b)))
        shown = [type(span.message).__name__ for span in log.mirror.spans]
        raise AssertionError(
            f"{shown}\n at {at} of {len(a)}, {len(b)}\n ours   {a[max(0, at - 120) : at + 80]!r}"
            f"\n theirs {b[max(0, at - 120) : at + 80]!r}"
        )

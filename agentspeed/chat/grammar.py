"""Writes the grammar of one turn: tool calls, a tool choice, an output shape, in the language llguidance reads.

The engine runs what is written here without knowing what it means. Whitespace is compact and every schema is closed
(`tools.schema`), so a constrained part always comes to an end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from agentspeed.chat.call_grammar import CallRules, Marks, ending, literal, quoted, without
from agentspeed.chat.output import Choice, OutputSpec, Regex, Schema
from agentspeed.chat.regex_rule import regex_rule
from agentspeed.chat.tags import DEFAULT_TAGS, Tags
from agentspeed.errors import InvalidRequest
from agentspeed.tools.grammars import HEAD, check_grammar
from agentspeed.tools.schema import DEFAULT_BOUNDS, Bounds
from agentspeed.tools.tool import Tool

MAX_PARALLEL_CALLS: Final = 16


def turn_grammar(
    *,
    tools: Sequence[Tool] = (),
    tool_choice: str = "auto",
    parallel_calls: int = MAX_PARALLEL_CALLS,
    output: OutputSpec | None = None,
    reasoning: bool = False,
    tags: Tags = DEFAULT_TAGS,
    bounds: Bounds = DEFAULT_BOUNDS,
) -> str | None:
    """The grammar's source, or None when any text will do.

    `tool_choice`: "auto" (free text or an output, or calls), "required", "none", or a tool's name. A call is
    constrained from its opening mark on. Raises `InvalidRequest` for a choice that cannot be, `SchemaUnsupported` for a
    shape that no grammar can hold."""
    offered = _offered(tools, tool_choice)
    if not 1 <= parallel_calls <= MAX_PARALLEL_CALLS:
        raise InvalidRequest(f"parallel_calls is {parallel_calls}; it must be 1 to {MAX_PARALLEL_CALLS}.")
    if output is None and not tools:
        return None
    must_call = tool_choice not in ("auto", "none")
    rules = _Rules(tags, reasoning)
    ends: list[str] = []
    if not must_call:
        ends.append(rules.free_text() if output is None else rules.output(output))
    if offered:
        lead = not must_call and output is None
        ends.append(rules.calls(offered, parallel_calls, bounds, after_text=lead))
    source = rules.source(ends)
    check_grammar(source)
    return source


def _offered(tools: Sequence[Tool], tool_choice: str) -> tuple[Tool, ...]:
    if tool_choice == "none":
        return ()
    if tool_choice in ("auto", "required"):
        if tool_choice == "required" and not tools:
            raise InvalidRequest("tool_choice is 'required' but there are no tools.", remedy="Pass tools=[...].")
        return tuple(tools)
    chosen = tuple(tool for tool in tools if tool.name == tool_choice)
    if not chosen:
        names = ", ".join(tool.name for tool in tools) or "none"
        raise InvalidRequest(
            f"tool_choice is {tool_choice!r}, which is not a tool of this turn (they are: {names}).",
            remedy="Use 'auto', 'required', 'none' or one of these names.",
        )
    return chosen


class _Rules:
    """Collects the rules of one turn; each method adds what it needs and names the rule that starts it."""

    def __init__(self, tags: Tags, reasoning: bool) -> None:
        self._tags = tags
        self._reasoning = reasoning or tags.thinking or tags.thinks
        self._rules: dict[str, str] = {}
        self._marks = Marks(tags.ids)
        # Beside a reasoning rule other text must not begin as reasoning, or a mark inside it would count as a call.
        apart = self._reasoning and not tags.thinking
        not_thought = f" & ~/{literal(tags.think_open)}(?s:.*)/" if apart else ""
        self._any = f"/(?s:.*)/{not_thought}"

    def free_text(self) -> str:
        """Any text in which no call is opened."""
        trigger, form = self._tags.call_open, self._tags.calls
        no_call = f" & ~/\\s*{literal(trigger)}(?s:.*)/" if form.only_at_start else without(trigger)
        free = self._add("FREE", f"{self._any}{no_call}")
        return f"{free} {self._marks.rule(self._tags.text_end)}?" if self._tags.text_end else free

    def output(self, spec: OutputSpec) -> str:
        """Exactly one value of the shape."""
        match spec:
            case Schema():
                compiled = spec.compiled()
                self._rules.update(compiled.rules)
                return compiled.start
            case Regex():
                return self._add("OUTPUT", regex_rule(spec.pattern, spec.max_chars))
            case Choice():
                return self._add("output", " | ".join(quoted(option) for option in spec.options))

    def calls(self, tools: Sequence[Tool], most: int, bounds: Bounds, *, after_text: bool) -> str:
        """One to `most` calls, the first perhaps after some text."""
        form = self._tags.calls
        rules = CallRules(form, self._marks, self._add)
        names = [rules.body(number, tool, bounds) for number, tool in enumerate(tools)]
        body = f"({' | '.join(names)})"
        most = min(most, form.most)
        _ = self._add("call", f"{self._marks.rule(form.joint + form.call_open)} {body}")
        rest = (f" call{{0,{most - 1}}}" if most > 1 else "") + self._marks.after(form.section_close)
        opening = form.opening
        if not after_text or not form.text_beside or form.only_at_start:
            return self._add("calls", f"{self._marks.rule(opening)} {body}{rest}")
        spelt, special = self._marks.first_special(opening)
        if special is not None:
            text = self._add("TEXT", f"{self._any}{without(self._tags.call_open)}{ending(spelt)}")
            return self._add("calls", f"{text} {self._marks.rule(opening[len(spelt) :])} {body}{rest}")
        trigger = self._tags.call_open
        _ = self._add("TEXT", self._any)
        _ = self._add("opening[lazy]", f"TEXT {self._marks.rule(trigger)}")
        return self._add("calls", f"opening{self._marks.after(opening[len(trigger) :])} {body}{rest}")

    def source(self, ends: Sequence[str]) -> str:
        """The whole grammar: reasoning if it is allowed, then one of the ends."""
        before = ""
        if self._reasoning:
            room = self._add("ROOM", r"/\n{0,2}/") if self._tags.roomy else ""
            before = f"({self._thought()} {room}){'' if self._tags.thinking else '?'} "
        if self._tags.lead and not self._tags.thinking:
            before += f"{quoted(self._tags.lead)}? "
        start = f"start: {before}({' | '.join(ends)})"
        return "\n".join([HEAD, start, *(f"{name}: {rule}" for name, rule in self._rules.items())]) + "\n"

    def _thought(self) -> str:
        closing = self._tags.think_close
        opened = "" if self._tags.thinking else f"{self._marks.rule(self._tags.think_open)} "
        if closing in self._tags.ids:
            _ = self._add("THOUGHT", f"/(?s:.*)/{without(closing)}")
            return self._add("thought", f"{opened}THOUGHT {self._marks.rule(closing)}")
        _ = self._add("thinking[lazy]", f"/(?s:.*)/ {self._marks.rule(closing)}")
        return self._add("thought", f"{opened}thinking")

    def _add(self, name: str, rule: str) -> str:
        self._rules[name] = rule
        return name.partition("[")[0]

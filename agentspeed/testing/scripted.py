"""A stand-in for a model in tests: texts in order, or a function of the log; grammar, tokenizer and parser are real."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self, TypeAlias, Unpack, final

from agentspeed._base.validate import check_count, check_seconds, check_text
from agentspeed.chat.tags import DEFAULT_TAGS
from agentspeed.engine import Engine
from agentspeed.session import Session, SessionOptions
from agentspeed.testing.scripted_model import Asked, ScriptedText, ScriptRaised
from agentspeed.testing.scripted_server import ScriptedServer
from agentspeed.tools.execution import told_of
from agentspeed.transport.base import wire
from agentspeed.transport.hub import resolve

Turn: TypeAlias = Asked
"""What a function script is given: `log` (the whole text), `turn` (of the engine), `session_turn`."""
Writes: TypeAlias = Callable[[Turn], str | ScriptedText]


def say(text: str, *, seconds: float = 0.0) -> ScriptedText:
    """A turn that takes time: `seconds` before each token. For tests of cancelling and timeouts."""
    return ScriptedText(text=text, seconds=seconds)


def tool_call(name: str, /, **arguments: Any) -> str:
    """The text of one call, as a model writes it: `tool_call("add", a=1, b=2)`. Add them up for parallel calls."""
    body = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False, separators=(",", ":"))
    return f"{DEFAULT_TAGS.call_open}{body}{DEFAULT_TAGS.call_close}"


@final
class ScriptedEngine:
    """`async with ScriptedEngine(["Hello."]) as engine, engine.session(tools=[...]) as s: ...`

    `script`: what each turn writes, in the order in which turns arrive; or a function of the log. A text that the
    turn's grammar (tools, tool choice, `output=`) does not allow ends the turn in an error that quotes it. `model`
    gives the tokenizer and the template; None is the model that ships with the package. `context_limit` (by default
    what the model's folder says) and `max_branches` of a session are refused past as an engine does."""

    def __init__(
        self,
        script: Sequence[str | ScriptedText] | Writes,
        *,
        model: str | os.PathLike[str] | None = None,
        context_limit: int | None = None,
        max_branches: int = 256,
    ) -> None:
        check_count("context_limit", context_limit, none=True)
        check_count("max_branches", max_branches)
        folder = resolve(Engine(model).model)  # what an engine refuses is refused here too, and in its words
        self._server = ScriptedServer(folder, _script(script), context_limit=context_limit, max_branches=max_branches)
        self.engine = Engine.over(self._server, folder)

    async def __aenter__(self) -> Self:
        _ = await self.engine.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.engine.close()

    def session(self, **options: Unpack[SessionOptions]) -> Session:
        """A session on this engine; the options are those of `Session`."""
        return self.engine.session(**options)

    @property
    def turns(self) -> tuple[wire.Generate, ...]:
        """What each turn asked of the engine, in order: sampling, grammar, stop strings, bounds."""
        return tuple(command for command in tuple(self._server.commands) if isinstance(command, wire.Generate))

    @property
    def live_branches(self) -> int:
        """Branches not closed yet: assert that it is 0 when nothing may leak."""
        return self._server.live_branches


def _script(script: Sequence[str | ScriptedText] | Writes) -> Callable[[Asked], ScriptedText | None]:
    if callable(script):
        return lambda asked: _asked_of(script, asked)
    if isinstance(script, str) or not isinstance(script, Sequence):
        raise TypeError(f"script is {script!r}; give a list of what each turn writes, or a function of the log.")
    texts = [_as_text(item) for item in script]
    return lambda asked: texts[asked.turn - 1] if asked.turn <= len(texts) else None


def _asked_of(script: Writes, asked: Asked) -> ScriptedText:
    try:
        return _as_text(script(asked))
    except Exception as error:
        raise ScriptRaised(f"the script raised {told_of(error)}") from error


def _as_text(item: str | ScriptedText) -> ScriptedText:
    said = ScriptedText(text=item) if isinstance(item, str) else item
    if not isinstance(said, ScriptedText):
        raise TypeError(f"script: a turn writes {item!r}; give a text, or say(...).")
    check_text("script text", said.text)
    check_seconds("say seconds", said.seconds, zero=True, none=False)
    return said

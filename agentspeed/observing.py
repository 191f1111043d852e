"""What a hook is told of every run, turn and tool: one place for whoever traces, counts or logs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol, final

from agentspeed.usage import Usage

_LOG: Final = logging.getLogger("agentspeed.observing")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Began:
    """Something that begins, in the task that carries it out."""

    kind: Literal["run", "turn", "tool"]
    session_id: str
    model: str
    tool: str = ""
    call_id: str = ""
    request: Mapping[str, Any] = field(default_factory=dict)
    """Of a turn: `temperature`, `top_p`, `top_k`, `max_tokens` and `seed`, those that were said."""
    content: Callable[[], str] = str
    """What it was given, as JSON: a run's or a turn's messages, a tool's arguments. Made when it is called."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How it ended. `error`: what it raised, or a tool's own error."""

    usage: Usage = field(default_factory=Usage)
    reason: str = ""
    error: BaseException | None = None
    content: Callable[[], str] = str
    """What came of it, as JSON or text. Made when it is called."""


class Watch(Protocol):
    """One of them, while it goes on."""

    def ended(self, how: Ending) -> None:
        """Called once. A run's and a tool's end is told in the task that told its beginning."""
        ...


class Observer(Protocol):
    """The hook: `Engine(..., observer=...)` for all sessions of an engine, `Session(..., observer=...)` for one and its
    children. It is called between two pieces of work, so it must not block; what it raises is logged and changes
    nothing."""

    def began(self, what: Began) -> Watch:
        """Something begins."""
        ...


@final
class Watched:
    """A watch that is told its end once, and whose errors stay here; with nobody behind it, it does nothing."""

    def __init__(self, observer: Observer | None, what: Callable[[], Began]) -> None:
        self._watch: Watch | None = None
        if observer is None:
            return
        try:
            self._watch = observer.began(what())
        except Exception:  # noqa: BLE001 - a hook's bug does not end what it watches
            _LOG.exception("the observer %r raised", observer)

    def ended(self, how: Callable[[], Ending]) -> None:
        """Calling it again does nothing."""
        watch, self._watch = self._watch, None
        if watch is None:
            return
        try:
            watch.ended(how())
        except Exception:  # noqa: BLE001 - a hook's bug does not end what it watches
            _LOG.exception("the watch %r raised", watch)

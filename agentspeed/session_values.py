"""What a session shows of itself: values that are read at once, without a word to the engine."""

from __future__ import annotations

from typing import Any

from agentspeed._core.engine_handle import EngineHandle
from agentspeed._core.options import Defaults
from agentspeed._core.session_core import SessionCore, State
from agentspeed._core.session_text import in_a_line, tree
from agentspeed.message_formats import lists
from agentspeed.messages import Message, ToolCall
from agentspeed.tools import Tool
from agentspeed.trajectory import Trajectory
from agentspeed.usage import Lease, Residence, Usage


class SessionValues:
    """What `Session` is made of beside its verbs."""

    _core: SessionCore

    @property
    def id(self) -> str:
        """The name it was given, or a random one; a child's is its parent's and a number."""
        return self._core.id

    @property
    def state(self) -> State:
        """ "new" before its block, "open" in it, "closed" after it."""
        return self._core.state

    @property
    def engine(self) -> EngineHandle:
        """What it runs on: the `Engine` it was given, or its hold on the process-wide one."""
        return self._core.engine

    @property
    def tenant(self) -> str | None:
        """The name under which it shares rows; None: it shares with all sessions that have none."""
        return self._core.branch.opening.tenant or None

    @property
    def private(self) -> bool:
        """Whether its rows are shared with its own forks alone."""
        return self._core.branch.opening.private

    @property
    def system(self) -> str | None:
        """The system text."""
        return self._core.system

    @property
    def defaults(self) -> Defaults:
        """What holds for turns that say nothing else."""
        return self._core.defaults

    @property
    def usage(self) -> Usage:
        """What all its turns have cost, and those of adopted children."""
        return self._core.usage

    @property
    def tools(self) -> tuple[Tool, ...]:
        """What the model was told about in the session's first message."""
        return self._core.defaults.tools

    @property
    def messages(self) -> tuple[Message, ...]:
        """Whole messages, in order, without the system text (that is `system`). One that `max_tokens` or `stop` ended
        is whole but open: `generate()` goes on with it. What a running turn has said so far is not among them."""
        return self._core.log.messages

    @property
    def open_calls(self) -> tuple[ToolCall, ...]:
        """Calls of the last message that have no result in the log yet, in call order: `tool_call` serves them, and
        `run` does before anything else."""
        return self._core.open_calls()

    @property
    def starts(self) -> tuple[int, ...]:
        """At which token each of `messages` begins, template text included: a position for `rewind` and `fork`."""
        return tuple(span.start for span in self._core.log.spans)

    @property
    def context_limit(self) -> int:
        """The most tokens that the log may have. Raises `SessionClosed` before the session was entered."""
        return self._core.engine.context_limit

    @property
    def room(self) -> int:
        """Tokens that are left of the context: for a prompt, its template text and the answer together. Raises
        `SessionClosed` before the session was entered."""
        return self.context_limit - self.tokens

    @property
    def tokens(self) -> int:
        """Known tokens."""
        return len(self._core.log)

    @property
    def ids(self) -> tuple[int, ...]:
        """Every id of the log."""
        return tuple(self._core.log.ids)

    @property
    def residence(self) -> Residence:
        """Where the rows were when the engine last said so (turns, `expect`, `inspect`), of the tokens known now."""
        return self._core.branch.residence.within(self.tokens)

    @property
    def lease(self) -> Lease | None:
        """The engine's last answer to `expect`; None once a turn has begun."""
        return self._core.branch.lease

    def position(self, messages: int) -> int:
        """How many tokens the first `messages` messages are, with what closes them: a place for `rewind` and `fork`.

        Raises `InvalidRequest` when there are not so many."""
        return self._core.position(messages)

    def trajectory(self) -> Trajectory:
        """Ids, log-probabilities and the mask of model-made ids, exactly as the engine computed on them."""
        return Trajectory.of(self._core.log)

    def to_messages(self, format: lists.Format = "openai") -> list[dict[str, Any]]:
        """The messages as another SDK writes them. The system text is OpenAI's first message; Anthropic's list has none
        (it is `system`). What the model thought before it answered is left out."""
        return lists.write(self.system, self.messages, format)

    def tree(self) -> str:
        """This session and its children that are open, a line each."""
        return tree(self._core)

    def __repr__(self) -> str:
        return f"<Session {in_a_line(self._core)}>"

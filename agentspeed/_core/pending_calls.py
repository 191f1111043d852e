"""What a session knows of the calls it waits for: since when, the results that wait for others, how long tools take."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, final

import anyio

from agentspeed.chat import transcript
from agentspeed.chat.token_log import TokenLog
from agentspeed.messages import ToolCall, ToolMessage

SERVED_ELSEWHERE: Final = (
    "This call is being served for the conversation that this one was forked from; its result does not come here."
)
_UNSEEN_SECONDS: Final = 1.0
"""What a tool that never ran in this session is taken to need, beside those that did."""


@final
class PendingCalls:
    """One for each session. The calls of a turn that have no result in the log are open; a result waits here until
    every one of them has its own, for they enter the log together and in call order."""

    def __init__(self) -> None:
        self.served: dict[str, float | None] = {}
        """Ids of the calls that are being served, by `run` or by blocks of `tool_call` that are open, and how many
        seconds each was said to take."""
        self._results: dict[str, ToolMessage] = {}
        self._seconds_of: dict[str, float] = {}
        self._since: float | None = None
        self._ended = False

    def forked(self, calls: Iterable[ToolCall]) -> PendingCalls:
        """What a child or a copy begins with, whose open calls are `calls`: the results are its own to wait for, the
        pause is not. A call that is being served stays its parent's: served by the child as well, a tool that runs a
        fork of its session would call itself without end."""
        child = PendingCalls()
        child._results = dict(self._results)
        for call in calls:
            if call.id in self.served:
                child.arrived(ToolMessage(call_id=call.id, name=call.name, text=SERVED_ELSEWHERE, ok=False))
        return child

    # ---- results --------------------------------------------------------------------------------------------------
    def waits(self, calls: Iterable[ToolCall]) -> tuple[ToolCall, ...]:
        """The calls among `calls` that have no result yet."""
        return tuple(call for call in calls if call.id not in self._results)

    def arrived(self, result: ToolMessage) -> None:
        self._results[result.call_id] = result

    def of(self, calls: Iterable[ToolCall]) -> tuple[ToolMessage, ...]:
        """The results of `calls`, all of which have arrived, in call order. They wait until they are in the log
        (`leave`): a tool whose result cannot be written now is not called again for it."""
        return tuple(self._results[call.id] for call in calls)

    def due(self, mirror: TokenLog) -> list[ToolMessage]:
        """Results of calls that are open, in call order."""
        return [self._results[call.id] for call in transcript.unanswered(mirror) if call.id in self._results]

    def waiting(self) -> tuple[ToolMessage, ...]:
        """All results that have arrived and wait for others, in the order in which they came."""
        return tuple(self._results.values())

    def adopt(self, child: PendingCalls) -> None:
        """The child's results take the place of these."""
        self._results = child._results

    def leave(self, mirror: TokenLog) -> None:
        """Drops the results whose calls are open no more, and with the last of them the pause that waited for the
        others."""
        open_calls = {call.id for call in transcript.unanswered(mirror)}
        self._results = {number: result for number, result in self._results.items() if number in open_calls}
        if not self._results:
            self._since = None

    # ---- the time -------------------------------------------------------------------------------------------------
    @property
    def on(self) -> bool:
        return self._since is not None

    def begin(self) -> None:
        """A pause that is on goes on."""
        if self._since is None:
            self._since = anyio.current_time()

    def end(self) -> float | None:
        """How many seconds it was on; None when none was."""
        if self._since is None:
            return None
        seconds, self._since = anyio.current_time() - self._since, None
        self._ended = True
        return seconds

    def overtaken(self) -> None:
        """A turn began: the pause is off. The results stay until the turn is over: taken back, it leaves their calls
        open."""
        self._since = None

    def resumed(self) -> bool:
        """Whether a pause has ended since this was last asked."""
        ended, self._ended = self._ended, False
        return ended

    def took(self, tool: str, seconds: float) -> None:
        self._seconds_of[tool] = seconds

    def slowest(self, calls: Iterable[ToolCall]) -> str:
        """The tool that took the longest the last time: it names their pause."""
        return max(calls, key=lambda call: self._seconds_of.get(call.name, _UNSEEN_SECONDS)).name

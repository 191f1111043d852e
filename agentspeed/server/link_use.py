"""Whether somebody waits for a link: its branches and turns, by the frames that pass in both directions."""

from __future__ import annotations

from collections import Counter
from typing import Final, final

from agentspeed.transport.base import wire

TOOL_SECONDS: Final = 5.0
"""For how long a link without a turn may be one whose client runs a tool and then goes on."""


@final
class LinkUse:
    """All times are of one monotonic clock, in seconds."""

    def __init__(self) -> None:
        self._asked: dict[int, int] = {}
        """Number of a request for a turn -> branch, until it is answered."""
        self._turns: Counter[int] = Counter()
        """Of each branch: asked for, and neither refused nor ended."""
        self._open: set[int] = set()
        self._ended_at = 0.0
        """When the last turn ended."""

    def rests(self, now: float) -> bool:
        """Whether nothing would be lost that runs: no branch is open, or no turn has run for `TOOL_SECONDS`."""
        if any(count > 0 for count in self._turns.values()):
            return False
        return not self._open or now - self._ended_at >= TOOL_SECONDS

    def told(self, command: wire.Command) -> None:
        """The client sends it."""
        match command:
            case wire.Generate(request=request, branch=branch):
                self._asked[request] = branch
                self._turns[branch] += 1
            case wire.Close(branch=branch):
                self._open.discard(branch)
                del self._turns[branch]
            case wire.Adopt(child=child):
                self._open.discard(child)
            case _:
                pass

    def heard(self, messages: tuple[wire.Outgoing, ...], now: float) -> None:
        """The engine sends them."""
        for message in messages:
            match message:
                case wire.Opened(branch=branch):
                    self._open.add(branch)
                case wire.Forked(branches=branches):
                    self._open.update(branches)
                case wire.Done(request=request):
                    _ = self._asked.pop(request, None)
                case wire.Failed(request=request):
                    self._ended(self._asked.pop(request, None), now)
                case wire.TurnEnded(branch=branch):
                    self._ended(branch, now)
                case _:
                    pass

    def _ended(self, branch: int | None, now: float) -> None:
        if branch is not None and branch in self._turns:
            self._turns[branch] -= 1
            self._ended_at = now

"""Stop strings as a byte automaton (Aho and Corasick 1975): a token ends the turn when its bytes complete one."""

from __future__ import annotations

from collections import deque
from typing import final


@final
class StopAutomaton:
    """Fed with the bytes of each drawn token; remembers what a stop string may still be built on."""

    __slots__ = ("_accepts", "_fail", "_goto", "_state")

    def __init__(self, stops: tuple[bytes, ...]) -> None:
        self._goto: list[dict[int, int]] = [{}]
        self._accepts = [False]
        for stop in stops:
            state = 0
            for byte in stop:
                following = self._goto[state].get(byte)
                if following is None:
                    following = len(self._goto)
                    self._goto.append({})
                    self._accepts.append(False)
                    self._goto[state][byte] = following
                state = following
            self._accepts[state] = True
        self._fail = [0] * len(self._goto)
        queue = deque(self._goto[0].values())
        while queue:
            state = queue.popleft()
            for byte, following in self._goto[state].items():
                self._fail[following] = self._step(self._fail[state], byte)
                self._accepts[following] |= self._accepts[self._fail[following]]
                queue.append(following)
        self._state = 0

    def feed(self, data: bytes) -> bool:
        """True when some stop string ended within `data`."""
        for byte in data:
            self._state = self._step(self._state, byte)
            if self._accepts[self._state]:
                return True
        return False

    def _step(self, state: int, byte: int) -> int:
        while byte not in self._goto[state]:
            if state == 0:
                return 0
            state = self._fail[state]
        return self._goto[state][byte]

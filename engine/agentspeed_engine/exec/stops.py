"""Stop strings as a byte automaton (Aho and Corasick 1975): a token ends the turn when its bytes complete one."""

from __future__ import annotations

from collections import deque
from typing import final


@final
class StopAutomaton:
    """The transitions; where a turn stands in them is a plain number."""

    __slots__ = ("_accepts", "_fail", "_goto")

    START = 0

    def __init__(self, stops: tuple[bytes, ...]) -> None:
        self._goto: list[dict[int, int]] = [{}]
        self._accepts = [False]
        for stop in stops:
            self._insert(stop)
        self._fail = [0] * len(self._goto)
        queue = deque(self._goto[0].values())
        while queue:
            state = queue.popleft()
            for byte, following in self._goto[state].items():
                self._fail[following] = self._step(self._fail[state], byte)
                self._accepts[following] |= self._accepts[self._fail[following]]
                queue.append(following)

    def feed(self, state: int, data: bytes) -> tuple[int, bool]:
        """(state after `data`, whether some stop string ended within it)."""
        ended = False
        for byte in data:
            state = self._step(state, byte)
            ended = ended or self._accepts[state]
        return state, ended

    def _insert(self, stop: bytes) -> None:
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

    def _step(self, state: int, byte: int) -> int:
        while byte not in self._goto[state]:
            if state == 0:
                return 0
            state = self._fail[state]
        return self._goto[state][byte]


@final
class StopWatch:
    """One turn's way through its automaton, by drawn ids: a draw the core did not take can be drawn again."""

    __slots__ = ("_automaton", "_states")

    def __init__(self, stops: tuple[bytes, ...], begun: bytes = b"") -> None:
        """`begun`: what the message held before the turn. A stop string that ends in it has no part in another."""
        self._automaton = StopAutomaton(stops)
        state = StopAutomaton.START
        for byte in begun:
            state, ended = self._automaton.feed(state, bytes((byte,)))
            state = StopAutomaton.START if ended else state
        self._states = [state]

    def saw(self, drawn: int, data: bytes) -> bool:
        """True when a stop string ends within `data`, the bytes of the id after the turn's first `drawn` ones."""
        del self._states[drawn + 1 :]
        state, ended = self._automaton.feed(self._states[drawn], data)
        self._states.append(state)
        return ended

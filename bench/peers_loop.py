"""Agents of `bench/peers_cpu.py` that go on, conversation after conversation, measured in a window of time.

From the first step to the last end of a set amount of work, what is measured is the agent with the longest pauses,
while the others have nothing left to do. So here nobody's work ends: where a conversation is over the next one begins,
and what counts is what lies in a window in which all are at work. One rule for every side, from its own times:

- The window begins when `warm_up` seconds have gone by and every agent has had an answer, and lasts `seconds`.
- A token counts if it came within the window, whenever its turn began.
- A wait for the first token counts if its turn began within the window, and such turns are waited for: agents go on, so
  that nothing becomes easier, until the last of them has ended.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import final

from bench.peers_turns import Conversation, Played, Step, Timing

Script = tuple[Step, ...]


@final
@dataclass(frozen=True, slots=True)
class Loop:
    agents: tuple[Callable[[], Iterator[Script]], ...]
    """Each one's conversations without end, from the beginning at each call."""
    warm_up: float
    seconds: float


@final
@dataclass(frozen=True, slots=True)
class Window:
    begin: float
    end: float

    def holds(self, moment: float) -> bool:
        return self.begin <= moment < self.end

    def tokens(self, turn: Timing) -> int:
        """How many of a turn's came within: the first when it came, the others evenly until its end."""
        if turn.drawn == 0:
            return 0
        first = turn.begun + turn.first
        gap = (turn.ended - first) / max(1, turn.drawn - 1)
        return sum(self.holds(first + number * gap) for number in range(turn.drawn))


def window_of(loop: Loop, played: Played) -> Window | None:
    """None while an agent has had no answer."""
    if not all(played):
        return None
    started = min(turns[0].begun for turns in played)
    begin = max(started + loop.warm_up, *(turns[0].ended for turns in played))
    return Window(begin, begin + loop.seconds)


def possible_tokens(loop: Loop, begin: float, end: float) -> int:
    """What an engine that takes no time draws within, in seconds from the first turn's beginning: pauses alone."""
    return sum(step.out for agent in loop.agents for step in _until(agent(), end, begin))


def _until(scripts: Iterator[Script], end: float, begin: float) -> Iterator[Step]:
    moment = 0.0
    for script in scripts:
        for step in script:
            moment += step.pause
            if moment >= end:
                return
            if moment >= begin:
                yield step


def figures(loop: Loop, played: Played) -> dict[str, float]:
    """`of_possible`: tokens of those that an engine that takes no time would have drawn in the same window. A resume is
    a turn that goes on with a conversation, an opening one that begins it; `turn_mean` is what a turn of either kind
    takes from its beginning to its last token. Raises `ValueError` where an agent had no answer."""
    window = window_of(loop, played)
    if window is None:
        raise ValueError("an agent had no answer, so there is no window")
    started = min(turns[0].begun for turns in played)
    tokens = sum(window.tokens(turn) for turns in played for turn in turns)
    counted = [
        (opens, turn)
        for agent, turns in zip(loop.agents, played, strict=True)
        for opens, turn in zip(_openings(agent()), turns, strict=False)
        if window.holds(turn.begun)
    ]
    resumes = sorted(turn.first for opens, turn in counted if not opens)
    openings = sorted(turn.first for opens, turn in counted if opens)
    possible = possible_tokens(loop, window.begin - started, window.end - started)
    waits = {
        "resume_p50": resumes[len(resumes) // 2],
        "resume_p99": resumes[int(0.99 * len(resumes))],
    } if resumes else {}  # fmt: skip
    if openings:
        waits |= {"opening_p50": openings[len(openings) // 2], "opening_max": openings[-1]}
    if counted:
        waits["turn_mean"] = sum(turn.whole for _, turn in counted) / len(counted)
    of_possible = {"of_possible": tokens / possible} if possible else {}
    return {"tokens_per_second": tokens / loop.seconds, **of_possible, **waits, "resumes": float(len(resumes))}


def _openings(scripts: Iterator[Script]) -> Iterator[bool]:
    for script in scripts:
        for number, _ in enumerate(script):
            yield number == 0


async def going_on(loop: Loop, opened: Callable[[], AbstractAsyncContextManager[Conversation]]) -> Played:
    """Plays until the window is over; turns that began behind it are left. Raises what a conversation raises."""
    played: Played = [[] for _ in loop.agents]
    all_answered = asyncio.Event()
    in_turn: dict[int, tuple[float, asyncio.Event]] = {}

    async def agent(number: int) -> None:
        for script in loop.agents[number]():
            async with opened() as conversation:
                for step in script:
                    await asyncio.sleep(step.pause)
                    ended = asyncio.Event()
                    in_turn[number] = time.perf_counter(), ended
                    played[number].append(await conversation.step(step))
                    ended.set()
                    if all(played):
                        all_answered.set()

    async def over() -> None:
        _ = await all_answered.wait()
        window = window_of(loop, played)
        assert window is not None
        await asyncio.sleep(window.end - time.perf_counter())
        for begun, ended in list(in_turn.values()):
            if begun < window.end:
                _ = await ended.wait()

    tasks = [asyncio.create_task(agent(number)) for number, _ in enumerate(loop.agents)]
    watch = asyncio.create_task(over())
    try:
        done, _ = await asyncio.wait([watch, *tasks], return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            await task  # an agent's ends by an error alone
        return [list(turns) for turns in played]
    finally:
        for task in (watch, *tasks):
            _ = task.cancel()
        _ = await asyncio.gather(watch, *tasks, return_exceptions=True)

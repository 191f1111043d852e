"""Turns of a conversation in `bench/peers_cpu.py`: what is asked, when it was answered, and how one is played."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, final


@final
@dataclass(frozen=True, slots=True)
class Step:
    """One call of a conversation."""

    add: str
    """What is new to the context."""
    out: int
    pause: float = 0.0
    """Seconds before it, as a tool takes."""


@final
@dataclass(frozen=True, slots=True)
class Timing:
    """Of one step, in seconds."""

    begun: float
    first: float
    """Until the first token."""
    whole: float
    drawn: int

    @property
    def ended(self) -> float:
        return self.begun + self.whole


Played = list[list[Timing]]
"""By conversation and step; where agents go on, by agent and step."""


class Conversation(Protocol):
    """One context in an engine."""

    async def step(self, step: Step) -> Timing:
        """Without its pause."""
        ...


async def talk(conversation: Conversation, script: Sequence[Step], barrier: asyncio.Barrier | None) -> list[Timing]:
    """`barrier`: no conversation begins a step before all have ended the last."""
    timings: list[Timing] = []
    for step in script:
        await asyncio.sleep(step.pause)
        if barrier is not None:
            await barrier.wait()
        timings.append(await conversation.step(step))
    return timings

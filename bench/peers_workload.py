"""What `bench/peers_cpu.py` asks of every engine: conversations as data, drawn before anybody answers.

A text is capitals, each of which is one token of the random checkpoints, so that texts and ids say the same.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from string import ascii_uppercase
from typing import final

from bench.pauses_workload import TRACE

SCALE = 0.1
"""Of the replayed trace: its lengths and its tool times."""
AGENTS, AGENT_TURNS, SHARED = 16, 4, 2048
BEST = "best peer"


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


Played = list[list[Timing]]
"""By conversation and step."""


@final
@dataclass(frozen=True, slots=True)
class Must:
    """What ours ÷ another's has to be: at least for what is better when it is more, at most for the rest."""

    figure: str
    bound: float
    against: str = BEST


@final
@dataclass(frozen=True, slots=True)
class Case:
    name: str
    prefix: str
    """What all conversations begin with."""
    warm: bool
    """The prefix is in the cache before anything is timed."""
    scripts: tuple[tuple[Step, ...], ...]
    """Conversations that run at once."""
    figures: Callable[[Played], dict[str, float]]
    must: tuple[Must, ...] = ()
    together: bool = False
    """No conversation begins a step before all have ended the last."""
    pool_tokens: int | None = None
    """Room of the cache, where the case is about having too little."""


MORE_IS_BETTER = frozenset({"tokens_per_second", "of_possible"})


def cases(part: float, seed: int) -> list[Case]:
    """`part`: of the lengths, for a quick look; 1 is what figures are told from. `seed`: of the texts, so that no cache
    has seen them before."""
    draw = random.Random(seed)

    def text(tokens: float) -> str:
        return "".join(draw.choices(ascii_uppercase, k=max(4, round(tokens * part))))

    def out(tokens: float) -> int:
        return max(4, round(tokens * part))

    turns = tuple(Step(text(200), out(50)) for _ in range(8))
    batch = tuple((Step(text(4096), 1), Step(text(8), out(64))) for _ in range(16))
    prompt = text(4096)
    branches = tuple((Step(text(8), out(64)),) for _ in range(8))
    agents = tuple(
        tuple(Step(text(draw.lognormvariate(4.5, 0.6)), out(40), _pause(draw)) for _ in range(AGENT_TURNS))
        for _ in range(AGENTS)
    )
    held = SHARED * part + sum(len(step.add) + step.out for script in agents for step in script)
    return [
        Case(
            "8 turns",
            text(2048),
            False,
            (turns,),
            _wall,
            (Must("wall", 0.55, "vllm eager"), Must("wall", 0.75, "vllm compiled")),
        ),
        Case("decode at 4 k", text(4096), True, ((Step(text(8), out(64)),),), _rate, (Must("tokens_per_second", 1.8),)),
        Case(
            "prefill of 4 k",
            "",
            False,
            ((Step(prompt, 1),),),
            partial(_prefill, len(prompt)),
            (Must("tokens_per_second", 1.2),),
        ),
        Case("8 branches at 8 k", text(8192), True, branches, _wall, (Must("wall", 0.33),)),
        Case(
            "16 agents with pauses",
            text(SHARED),
            False,
            agents,
            partial(_agents, _least_span(agents)),
            (Must("tokens_per_second", 2.0), Must("resume_p99", 0.4)),
            pool_tokens=int(held / 2),
        ),
        Case("batch 16 at 4 k", "", False, batch, _rate, (Must("tokens_per_second", 1.7),), together=True),
        Case("coding agent replayed", "", False, (_replay(text, out),), _wall),
    ]


def _pause(draw: random.Random) -> float:
    """By the published law of tool times, and scaled: half take 0.3 s or less, a tenth 13.6 s and more."""
    return min(SCALE * draw.lognormvariate(-1.2, 2.98), 60 * SCALE)


def _replay(text: Callable[[float], str], out: Callable[[float], int], trace: Path = TRACE) -> tuple[Step, ...]:
    """A recorded session: what each call added, what it drew, and the time of the tools before it."""
    steps: list[Step] = []
    pause = 0.0
    for number, line in enumerate(trace.read_text(encoding="utf-8").splitlines()):
        call = json.loads(line)
        added = call["input_tokens"] if number == 0 else call["append_tokens"]
        steps.append(Step(text(SCALE * added), out(SCALE * call["output_tokens"]), pause))
        pause = SCALE * max((tool["latency_ms"] for tool in call["tools"]), default=0) / 1000
    return tuple(steps)


def _wall(played: Played) -> dict[str, float]:
    """Without pauses: what the steps took, where conversations run at once from the first to the last."""
    if len(played) == 1:
        return {"wall": sum(step.whole for step in played[0])}
    steps = [step for script in played for step in script]
    return {"wall": max(step.begun + step.whole for step in steps) - min(step.begun for step in steps)}


def _rate(played: Played) -> dict[str, float]:
    """Of the last steps: tokens a second behind the first ones. Where several run at once, some have drawn a few by the
    time the last one begins: all tokens over all of the time."""
    steps = [script[-1] for script in played]
    begun = min(step.begun + step.first for step in steps)
    ended = max(step.begun + step.whole for step in steps)
    return {"tokens_per_second": sum(step.drawn - 1 for step in steps) / (ended - begun)}


def _prefill(tokens: int, played: Played) -> dict[str, float]:
    ((step,),) = played
    return {"tokens_per_second": tokens / step.first}


def _least_span(scripts: Sequence[Sequence[Step]]) -> float:
    """Seconds from the first step's beginning to the last one's end if every engine answered at once."""
    return max(sum(step.pause for step in script) for script in scripts) - min(script[0].pause for script in scripts)


def _agents(least_span: float, played: Played) -> dict[str, float]:
    """`of_possible`: what an engine that takes no time needs, of what was taken; `beyond_pauses`: the rest, in
    seconds."""
    steps = [step for script in played for step in script]
    span = max(step.begun + step.whole for step in steps) - min(step.begun for step in steps)
    resumes = sorted(step.first for script in played for step in script[1:])
    return {
        "tokens_per_second": sum(step.drawn for step in steps) / span,
        "of_possible": least_span / span,
        "beyond_pauses": span - least_span,
        "resume_p50": resumes[len(resumes) // 2],
        "resume_p99": resumes[min(len(resumes) - 1, int(0.99 * len(resumes)))],
    }

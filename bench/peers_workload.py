"""What `bench/peers_cpu.py` asks of every engine: conversations as data, drawn before anybody answers.

A text is capitals, each of which is one token of the random checkpoints, so that texts and ids say the same.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from string import ascii_uppercase
from typing import final

from bench.pauses_workload import CALLS_PER_JOB, TRACE, pause_at
from bench.peers_loop import Loop, Script, figures
from bench.peers_turns import Played, Step

SCALE = 0.1
"""Of the replayed trace and of the published laws: lengths and tool times."""
AGENTS, SHARED = 16, 2048
AGENT_TURNS = round(CALLS_PER_JOB)
"""Of a conversation, which is as long as what a user asks for takes."""
AGENT_OUT, APPEND_LOG_MEAN, APPEND_SPREAD = 40, 4.5, 0.6
PRESSURE = 2.0
"""What conversations hold at once ÷ room for it."""
WARM_UP, WINDOW = 10.0, 45.0
"""Seconds. Pauses have no other bound than the law's own, 60 s after `SCALE`, which is longer than both together: it
shortens none that a window could hold."""
BEST = "best peer"


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
    loop: Loop | None = None
    """Agents that go on, instead of scripts."""


MORE_IS_BETTER = frozenset({"tokens_per_second", "of_possible", "resumes"})


def cases(part: float, seed: int) -> list[Case]:
    """`part`: of the lengths, for a quick look; 1 is what figures are told from. `seed`: of the texts, so that no cache
    has seen them before."""
    text, out = partial(_text, random.Random(seed), part), partial(_out, part)
    turns = tuple(Step(text(200), out(50)) for _ in range(8))
    batch = tuple((Step(text(4096), 1), Step(text(8), out(64))) for _ in range(16))
    prompt = text(4096)
    branches = tuple((Step(text(8), out(64)),) for _ in range(8))
    agents = tuple(partial(_agent, seed, number, part) for number in range(AGENTS))
    loop = Loop(agents, WARM_UP * part, WINDOW * part)
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
            (),
            partial(figures, loop),
            (Must("tokens_per_second", 2.0), Must("resume_p99", 0.4)),
            pool_tokens=int(live_tokens() * part / PRESSURE),
            loop=loop,
        ),
        Case("batch 16 at 4 k", "", False, batch, _rate, (Must("tokens_per_second", 1.7),), together=True),
        Case("coding agent replayed", "", False, (_replay(text, out),), _wall),
    ]


def _text(draw: random.Random, part: float, tokens: float) -> str:
    return "".join(draw.choices(ascii_uppercase, k=max(4, round(tokens * part))))


def _out(part: float, tokens: float) -> int:
    return max(4, round(tokens * part))


def live_tokens() -> float:
    """What all agents' conversations hold on average, each halfway between its beginning and its end, the shared prefix
    once."""
    append = math.exp(APPEND_LOG_MEAN + APPEND_SPREAD**2 / 2)
    return SHARED + AGENTS * AGENT_TURNS * (append + AGENT_OUT) / 2


def _agent(seed: int, number: int, part: float) -> Iterator[Script]:
    """Without end. The first conversation is joined at a random age, and at once, so that contexts differ from the
    start; what was said before is then new to every engine."""
    draw = random.Random(f"{seed}/{number}")

    def append() -> float:
        return draw.lognormvariate(APPEND_LOG_MEAN, APPEND_SPREAD)

    def step(tokens: float, pause: float) -> Step:
        return Step(_text(draw, part, tokens), _out(part, AGENT_OUT), pause)

    def pause() -> float:
        return SCALE * pause_at(draw.random())

    age = draw.randrange(AGENT_TURNS)
    joined = step(sum(append() + AGENT_OUT for _ in range(age)) + append(), 0.0)
    yield (joined, *(step(append(), pause()) for _ in range(AGENT_TURNS - age - 1)))
    while True:
        yield tuple(step(append(), pause()) for _ in range(AGENT_TURNS))


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
    return {"wall": max(step.ended for step in steps) - min(step.begun for step in steps)}


def _rate(played: Played) -> dict[str, float]:
    """Of the last steps: tokens a second behind the first ones. Where several run at once, some have drawn a few by the
    time the last one begins: all tokens over all of the time."""
    steps = [script[-1] for script in played]
    begun = min(step.begun + step.first for step in steps)
    ended = max(step.ended for step in steps)
    return {"tokens_per_second": sum(step.drawn - 1 for step in steps) / (ended - begun)}


def _prefill(tokens: int, played: Played) -> dict[str, float]:
    ((step,),) = played
    return {"tokens_per_second": tokens / step.first}

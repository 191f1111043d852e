"""What the agents of `bench/pauses.py` do and when, drawn from a trace and its published laws before any policy acts.

One rule: an agent's calls and pauses depend on its seed alone, never on the engine, so that every policy is given the
same work. Lengths are scaled down by one factor; pauses are not.
"""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

TRACE = Path(__file__).resolve().parent / "data" / "coding-agent-a.jsonl"
PAUSE_QUANTILES = ((0.5, 0.3), (0.9, 13.6), (0.99, 216.0))
"""Published: the share of tool calls that took at most so many seconds."""
LONGEST_PAUSE = 600.0
APPEND_MEDIAN, OUTPUT_MEDIAN = 875.0, 214.0
"""Published medians; their spread is the shipped trace's."""
CALLS_PER_JOB = 8.8
"""Model calls until an agent is done with what a user asked."""
CONTEXT_LIMIT = 200_000
"""A session that would outgrow it ends, and its agent goes on in a fresh one. Between the trace's first prompt and
this limit the middle is 116 K; the published median prefix is 119 K."""


class TraceError(ValueError):
    """The trace cannot be used; the message says which line and what a line must have."""


@final
@dataclass(frozen=True, slots=True)
class Call:
    """One model call of the trace."""

    input_tokens: int
    cached_prefix_tokens: int
    append_tokens: int
    output_tokens: int


@final
@dataclass(frozen=True, slots=True)
class Trace:
    """What is taken from a trace: how a session begins, and how much its calls differ."""

    shared_tokens: int
    """The prefix that was cached before the session began: instructions and tools, the same for every session."""
    first_tokens: int
    """What its first prompt adds."""
    append_spread: float
    """Standard deviation of the logarithm."""
    output_spread: float


@final
@dataclass(frozen=True, slots=True)
class Turn:
    """One model call of an agent, and the pause after it."""

    fresh: bool
    """It opens a new session, whose first tokens are the shared ones."""
    append: int
    output: int
    pause: float
    ends_job: bool


def read_trace(path: Path) -> tuple[Call, ...]:
    """Raises `TraceError` for a file without calls, and for a line that is not a whole call."""
    calls: list[Call] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise TraceError(f"{path.name}, line {number}: not JSON ({error.msg}).") from error
        if not isinstance(fields, dict):
            raise TraceError(f"{path.name}, line {number}: not an object of counts.")
        calls.append(Call(*(_count(fields, name, path, number) for name in Call.__slots__)))
    if len(calls) < 2:
        raise TraceError(f"{path.name} has {len(calls)} calls; a spread needs at least two.")
    return tuple(calls)


def _count(fields: dict[str, object], name: str, path: Path, number: int) -> int:
    value = fields.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise TraceError(f"{path.name}, line {number}: {name} is {value!r}; it must be a count of at least 1.")
    return value


def shape_of(calls: Sequence[Call]) -> Trace:
    first = calls[0]
    return Trace(
        shared_tokens=first.cached_prefix_tokens,
        first_tokens=first.append_tokens,
        append_spread=statistics.stdev(math.log(call.append_tokens) for call in calls),
        output_spread=statistics.stdev(math.log(call.output_tokens) for call in calls),
    )


def pause_at(share: float) -> float:
    """The pause that `share` of all pauses do not exceed: straight between the published quantiles, and beyond them,
    in log seconds over the log of the share that takes longer."""
    nines = -math.log10(max(1.0 - share, 1e-12))
    points = [(-math.log10(1.0 - quantile), math.log(seconds)) for quantile, seconds in PAUSE_QUANTILES]
    (left, low), (right, high) = points[:2] if nines <= points[1][0] else points[1:]
    return min(math.exp(low + (high - low) * (nines - left) / (right - left)), LONGEST_PAUSE)


@final
class Agent:
    """An endless seeded sequence of turns."""

    def __init__(self, trace: Trace, scale: int, seed: int, number: int) -> None:
        self._draw = random.Random(f"{seed}/{number}")
        self._trace = trace
        self._scale = scale
        self._known = CONTEXT_LIMIT
        self._begun = False

    def ids(self, tokens: int) -> bytes:
        """Ids that no other agent has; taken from the same stream as the lengths."""
        return self._draw.randbytes(4 * tokens)

    def turn(self) -> Turn:
        """The next model call. The first session is joined at a random age, so that contexts differ from the start."""
        draw, trace = self._draw, self._trace
        append = draw.lognormvariate(math.log(APPEND_MEDIAN), trace.append_spread)
        output = draw.lognormvariate(math.log(OUTPUT_MEDIAN), trace.output_spread)
        pause = pause_at(draw.random())
        ends_job = draw.random() < 1.0 / CALLS_PER_JOB
        fresh = self._known + append + output > CONTEXT_LIMIT
        if fresh:
            append = float(trace.first_tokens)
            self._known = trace.shared_tokens
            if not self._begun:
                append = draw.uniform(append, 0.95 * CONTEXT_LIMIT - self._known - output)
                self._begun = True
        self._known += int(append + output)
        return Turn(fresh, _scaled(append, self._scale), _scaled(output, self._scale), pause, ends_job)


def _scaled(tokens: float, scale: int) -> int:
    return max(1, round(tokens / scale))


def live_tokens(trace: Trace, agents: int, scale: int) -> int:
    """The working set: what all agents' sessions hold on average, the shared prefix once."""
    own = (trace.first_tokens + CONTEXT_LIMIT - trace.shared_tokens) / 2
    return round((trace.shared_tokens + agents * own) / scale)

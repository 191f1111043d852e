"""The agent loop as a pure generator: it says what to do next and is sent what came of it; it performs nothing.

    loop = agent_loop(User("Find the bug."), max_turns=8)
    step = next(loop)
    while True: step = loop.send(...)    # Generate -> Spoke | Rejected, RunTools -> Ran; StopIteration.value: Outcome

One model call is one turn. Every call of a turn gets its result before the next turn, in call order.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from agentspeed.errors import InternalError, InvalidRequest
from agentspeed.messages import Message, ToolCall, ToolMessage, User

DEFAULT_MAX_TURNS: Final = 16
DEFAULT_OUTPUT_RETRIES: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Generate:
    """Append these messages (none after tools: their results are in the log) and let the model speak. After the last
    turn there is none left to use a tool's result in."""

    messages: tuple[Message, ...]
    last: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTools:
    """Run these calls at once, holding the branch meanwhile. Who runs them appends one result message per call to the
    log, in call order, also when the run is cancelled: a log with a call and no result cannot be rendered."""

    calls: tuple[ToolCall, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spoke:
    """What a turn came to; without calls the run is over."""

    calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """The turn's text failed a check of `output=` that no grammar can express; `problem` is told to the model."""

    problem: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """One message per call, in call order, whether the tool succeeded or not."""

    results: tuple[ToolMessage, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Why a run ended. `rejected`: the output still failed its check after the retries, or in the last turn;
    `max_turns`: the last turn ended in calls."""

    reason: Literal["answered", "max_turns", "rejected"]
    turns: int


Step: TypeAlias = Generate | RunTools
Answer: TypeAlias = Spoke | Rejected | Ran


def agent_loop(
    *prompt: Message, max_turns: int = DEFAULT_MAX_TURNS, output_retries: int = DEFAULT_OUTPUT_RETRIES
) -> Generator[Step, Answer, Outcome]:
    """Raises `InvalidRequest` at the first `next` when a bound is out of range."""
    if max_turns < 1:
        raise InvalidRequest(f"max_turns is {max_turns}; it must be at least 1.")
    if output_retries < 0:
        raise InvalidRequest(f"output_retries is {output_retries}; it must be 0 or more.")
    new: tuple[Message, ...] = prompt
    for turn in range(1, max_turns + 1):
        answer = yield Generate(messages=new, last=turn == max_turns)
        match answer:
            case Spoke(calls=()):
                return Outcome(reason="answered", turns=turn)
            case Spoke(calls=calls):
                _check_results(calls, (yield RunTools(calls=calls)))
                new = ()
            case Rejected(problem=problem):
                if output_retries == 0 or turn == max_turns:  # no turn is left to answer again in
                    return Outcome(reason="rejected", turns=turn)
                output_retries -= 1
                new = (User(f"That output was not accepted: {problem} Answer again."),)
            case Ran():
                raise InternalError("The agent loop was sent tool results where a turn was due.")
    return Outcome(reason="max_turns", turns=max_turns)


def _check_results(calls: tuple[ToolCall, ...], answer: Answer) -> None:
    if not isinstance(answer, Ran):
        raise InternalError(f"The agent loop was sent {type(answer).__name__} where tool results were due.")
    if [result.call_id for result in answer.results] != [call.id for call in calls]:
        raise InternalError("The agent loop was sent results that are not one per call in call order.")

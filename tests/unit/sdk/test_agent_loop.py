"""The agent loop decides and never acts: each test plays model and tools by hand."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from agentspeed.agent_loop import Answer, Generate, Outcome, Ran, Rejected, RunTools, Spoke, Step, agent_loop
from agentspeed.errors import InternalError, InvalidRequest
from agentspeed.messages import ToolCall, ToolMessage, User

ASK = User("Add 1 and 2.")
CALLS = tuple(ToolCall(id=f"c{number}", name="add", arguments="{}") for number in range(2))
RESULTS = tuple(ToolMessage(call_id=call.id, name="add", text="3") for call in CALLS)


def play(loop: Generator[Step, Answer, Outcome], *answers: Answer) -> tuple[list[Step], Outcome | None]:
    """The steps asked for, and the outcome once the loop has returned."""
    steps = [next(loop)]
    for answer in answers:
        try:
            steps.append(loop.send(answer))
        except StopIteration as ended:
            outcome: Outcome = ended.value
            return steps, outcome
    return steps, None


def test_an_answer_without_calls_ends_the_run() -> None:
    steps, outcome = play(agent_loop(ASK), Spoke())
    assert steps == [Generate(messages=(ASK,), last=False)]
    assert outcome == Outcome(reason="answered", turns=1)


def test_calls_are_run_and_the_next_turn_appends_nothing_more() -> None:
    steps, outcome = play(agent_loop(ASK), Spoke(calls=CALLS), Ran(results=RESULTS), Spoke())
    assert steps[1:] == [RunTools(calls=CALLS), Generate(messages=(), last=False)]
    assert outcome == Outcome(reason="answered", turns=2)


def test_max_turns_ends_a_run_after_its_last_tools_have_run() -> None:
    loop = agent_loop(ASK, max_turns=2)
    steps, outcome = play(loop, Spoke(calls=CALLS), Ran(results=RESULTS), Spoke(calls=CALLS), Ran(results=RESULTS))
    assert [isinstance(step, RunTools) for step in steps] == [False, True, False, True]
    assert steps[2] == Generate(messages=(), last=True)
    assert outcome == Outcome(reason="max_turns", turns=2)


def test_a_rejected_output_is_told_to_the_model_and_only_so_often() -> None:
    steps, outcome = play(agent_loop(ASK, output_retries=1), Rejected(problem="age: too old."), Rejected(problem="x"))
    assert isinstance(steps[1], Generate)
    assert steps[1].messages == (User("That output was not accepted: age: too old. Answer again."),)
    assert outcome == Outcome(reason="rejected", turns=2)


@pytest.mark.parametrize("retries", [1, 5])
def test_an_output_rejected_in_the_last_turn_is_rejected_whatever_retries_are_left(retries: int) -> None:
    loop = agent_loop(ASK, max_turns=2, output_retries=retries)
    _, outcome = play(loop, Spoke(calls=CALLS), Ran(results=RESULTS), Rejected(problem="age: too old."))
    assert outcome == Outcome(reason="rejected", turns=2)


@pytest.mark.parametrize(
    "wrong", [Spoke(), Ran(results=RESULTS[:1]), Ran(results=RESULTS[::-1])], ids=["no results", "one missing", "order"]
)
def test_results_that_are_not_one_per_call_stop_the_loop(wrong: Answer) -> None:
    with pytest.raises(InternalError):
        _ = play(agent_loop(ASK), Spoke(calls=CALLS), wrong)


@pytest.mark.parametrize("options", [{"max_turns": 0}, {"output_retries": -1}])
def test_a_bound_out_of_range_is_refused_by_name(options: dict[str, int]) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(options))):
        _ = next(agent_loop(ASK, **options))

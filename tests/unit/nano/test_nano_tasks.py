"""The tasks of nano: checkers judge rightly, generators repeat, and held-out tasks share no words with training."""

from __future__ import annotations

import re
from random import Random

import pytest

from tools.nano.forms import (
    ARGUMENTS,
    HEADS,
    HELD_ARGUMENTS,
    HELD_HEADS,
    HELD_NAMELESS,
    HELD_OPENINGS,
    OPENINGS,
    argument,
    head,
    opening,
)
from tools.nano.puzzles import check_puzzle, is_held_out, make_puzzle
from tools.nano.spoken import HELD_TOOLS, TRAIN_TOOLS
from tools.nano.tasks import TALK, Task, answer, check_answer, check_calls, check_json, held_out, training_task
from tools.nano.words import FILLERS, HELD_OUT, TRAIN, made_up


@pytest.mark.parametrize("text", ["3*8=24,24-2=22", "8*3=24,24-2=22", " 3*8=24, 24-2=22 ", "8-2=6,6*3=18,18+4=22"])
def test_right_steps_solve_a_puzzle(text: str) -> None:
    numbers = (3, 8, 2, 4) if "+4" in text else (3, 8, 2)
    assert check_puzzle(text, numbers, 22)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "22",
        "3*8=24",
        "3*8=25,25-2=23",
        "3*8=24,24-2=21",
        "3*8=24,24-3=21",
        "8+8=16,16+6=22",
        "3*8=24,24-2=22,22+0=22",
        "3*8=24;24-2=22",
        "2-24=-22",
        "3*8=24,24-2=22.",
    ],
)
def test_wrong_steps_do_not_solve_a_puzzle(text: str) -> None:
    assert not check_puzzle(text, (3, 8, 2), 22)


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("size", [3, 4])
def test_every_made_puzzle_has_the_solution_it_says(held: bool, size: int) -> None:
    rng = Random(size)
    for _ in range(200):
        puzzle = make_puzzle(rng, held=held, size=size)
        assert check_puzzle(puzzle.solution, puzzle.numbers, puzzle.target)
        assert is_held_out(tuple(reversed(puzzle.numbers)), puzzle.target) == held


def test_the_same_seed_gives_the_same_conversations() -> None:
    one, two = Random(7), Random(7)
    assert [training_task(one) for _ in range(50)] == [training_task(two) for _ in range(50)]


def test_expected_replies_pass_their_own_checkers() -> None:
    for task in held_out("tool", 100):
        assert check_calls(task.expected()["tool_calls"], task)
        assert check_answer(task.expected(1)["content"], task)
    for task in held_out("json", 100):
        assert check_json(task.expected()["content"], task)


def test_a_wrong_name_argument_order_or_answer_is_seen() -> None:
    task = next(task for task in held_out("tool", 100) if len(task.expected()["tool_calls"]) > 1)
    calls = task.expected()["tool_calls"]
    assert not check_calls(calls[:-1], task)
    assert not check_calls([{**calls[0], "name": "other"}, *calls[1:]], task)
    assert not check_calls([{**calls[0], "arguments": {"x": 1}}, *calls[1:]], task)
    assert not check_answer(task.expected(1)["content"] + " More.", task)
    json_task = held_out("json", 1)[0]
    assert not check_json("{}", json_task)
    assert not check_json("{", json_task)


def test_an_answer_states_each_result_in_call_order() -> None:
    calls = [{"name": "f", "arguments": {"city": "Oslo"}}, {"name": "g", "arguments": {}}]
    assert answer(calls, ['{"temp":3,"sky":"grey"}', "done."]) == "For Oslo: temp 3, sky grey. Result: done."


def test_prompts_end_before_the_reply_they_ask_for() -> None:
    task = held_out("tool", 1)[0]
    assert task.prompt()[-1]["role"] == "user"
    assert task.prompt(1)[-1]["role"] == "tool"


def test_words_tools_and_made_up_words_of_the_two_sets_are_disjoint() -> None:
    for name in ("verbs", "nouns", "places", "people", "things", "endings"):
        assert not set(getattr(TRAIN, name)) & set(getattr(HELD_OUT, name)), name
    assert not {tool.name for tool in TRAIN_TOOLS} & {tool.name for tool in HELD_TOOLS}
    rng = Random(0)
    held = {made_up(rng, HELD_OUT) for _ in range(500)}
    assert not held & {made_up(rng, TRAIN) for _ in range(5000)}


def test_no_held_out_word_stands_in_what_training_has_by_hand() -> None:
    by_hand = " ".join(
        str((tool.name.split("_"), tool.description, tool.properties, tool.forms)) for tool in TRAIN_TOOLS
    )
    by_hand += str(TALK) + str(OPENINGS) + str(HEADS) + str(ARGUMENTS) + " ".join(FILLERS)
    said = set(re.findall(r"[a-z]+", by_hand.lower()))
    for name in ("nouns", "places", "people", "things"):
        assert not {word.lower() for word in getattr(HELD_OUT, name)} & said, name


def test_training_never_words_a_request_as_the_held_out_set_does() -> None:
    rng = Random(11)
    for _ in range(3000):
        assert argument(rng) not in HELD_ARGUMENTS
        assert head(rng, "{v}", "{n}") not in HELD_HEADS
        assert head(rng, "", "{n}") not in HELD_NAMELESS
        assert opening(rng, TRAIN) not in HELD_OPENINGS[:-1]


def test_worded_requests_of_the_two_sets_have_no_sentence_in_common() -> None:
    rng = Random(3)
    seen = {_form(training_task(rng)) for _ in range(2000)}
    assert not seen & {_form(task) for kind in ("json", "puzzle") for task in held_out(kind, 100)}


def _form(task: Task) -> str:
    user = next(message["content"] for message in task.messages if message["role"] == "user")
    return re.sub(r"\d+", "0", str(user))

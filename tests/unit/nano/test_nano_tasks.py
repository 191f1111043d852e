"""The tasks of nano: checkers judge rightly, generators repeat, and held-out tasks share no words with training."""

from __future__ import annotations

import re
from itertools import pairwise
from random import Random

import pytest

from tools.nano.answers import answer, refusal, sentence, subject_of
from tools.nano.chains import next_sum, sum_request
from tools.nano.followups import again
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
    puzzle_form,
)
from tools.nano.puzzles import HELD_ASKING, check_puzzle, is_held_out, make_puzzle
from tools.nano.spoken import HELD_TOOLS, TRAIN_TOOLS
from tools.nano.tasks import TALK, Task, chain_task, check_answer, check_calls, check_json, held_out, training_task
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


@pytest.mark.parametrize(
    ("subject", "result", "said"),
    [
        ("17 plus 25", "42", "17 plus 25 is 42."),
        ("the weather in Oslo", "14 degrees", "The weather in Oslo is 14 degrees."),
        ("the weather in Oslo", '{"temp":3,"sky":"grey"}', "The weather in Oslo: temp 3, sky grey."),
        ("the files", '["a.txt","b.py","c.md"]', "The files are a.txt, b.py and c.md."),
        ("the files", '["a.txt"]', "The files is a.txt."),
        ("the files", "[]", "The files: none."),
        (
            "the users",
            '[{"name":"Anna","on":true},{"name":"Ben","on":false}]',
            "The users: name Anna, on true; name Ben, on false.",
        ),
        ("the order KB-4", '{"items":["tea","milk"],"paid":null}', "The order KB-4: items tea and milk, paid null."),
        ("the email to Anna", "null", "Done."),
        ("the email to Anna", "error: no such person.", "The email to Anna failed: no such person."),
        ("the weather in Oslo", "It rains.", "It rains."),
    ],
)
def test_an_answer_is_a_plain_sentence_of_what_was_asked_and_what_came_out(
    subject: str, result: str, said: str
) -> None:
    assert sentence(subject, result) == said


def test_an_answer_states_each_result_in_call_order() -> None:
    assert answer(["the tide at Bari", "3 plus 4"], ["low", "7"]) == "The tide at Bari is low. 3 plus 4 is 7."


@pytest.mark.parametrize(
    ("form", "noun", "subject"),
    [
        ("What is {a} plus {b}", "add", "{a} plus {b}"),
        ("What is the tide at {port}", "tide", "the tide at {port}"),
        ("tell me the tide at {port}", "tide", "the tide at {port}"),
        ("Where is my parcel {code}", "parcel", "the parcel {code}"),
        ("list the users", "users", "the users"),
        ("add {a} and {b}", "add", "the result"),
    ],
)
def test_an_answer_has_the_words_of_its_request(form: str, noun: str, subject: str) -> None:
    assert subject_of(form, noun, "the result") == subject


def test_a_refusal_names_the_tools_there_are() -> None:
    assert refusal(["add"]) == "I have no tool for that. I can use add."
    assert refusal(["add", "search", "get_tide"]) == "I have no tool for that. I can use add, search and get_tide."
    assert refusal([]) == "I have no tools."


@pytest.mark.parametrize("held", [True, False])
def test_in_a_chain_each_call_needs_a_result_of_the_one_before(held: bool) -> None:
    rng, lengths = Random(5), set()
    for _ in range(200):
        task = chain_task(rng, held=held)
        steps = [message for message in task.messages if message.get("tool_calls")]
        lengths.add(len(steps))
        asked = next(message["content"] for message in task.messages if message["role"] == "user")
        for before, step in pairwise(steps):
            results = task.messages[task.messages.index(before) + 1]["content"]
            for call in step["tool_calls"]:
                values = [str(value) for value in call["arguments"].values()]
                assert any(value in results for value in values)
                assert all(value in results or value in asked for value in values)
        assert not {call["name"] for step in steps for call in step["tool_calls"]} - {
            tool["name"] for tool in task.tools
        }
    assert lengths >= {2, 3}


def test_a_sum_in_steps_is_reckoned_rightly() -> None:
    assert sum_request(Random(1), ["add", "multiply"], [3, 4, 5], held=True).count("and that times 5") == 1
    for seed in range(50):
        text, call, result = next_sum(Random(seed), 42, held=False)
        sign = {"add": 1, "subtract": -1}.get(call.name)
        number = call.values["b"]
        assert call.values["a"] == 42 and str(number) in text
        assert int(result) == (42 * number if sign is None else 42 + sign * number)


def test_an_answer_is_given_again_without_a_call() -> None:
    for held in (True, False):
        _, said = again(Random(2), "The tide is low.", held=held)
        assert said == {"role": "assistant", "content": "The tide is low."}


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
        assert puzzle_form(rng) not in HELD_ASKING


def test_worded_requests_of_the_two_sets_have_no_sentence_in_common() -> None:
    rng = Random(3)
    seen = {_form(training_task(rng)) for _ in range(2000)}
    assert not seen & {_form(task) for kind in ("json", "puzzle", "chain") for task in held_out(kind, 100)}


def _form(task: Task) -> str:
    user = next(message["content"] for message in task.messages if message["role"] == "user")
    return re.sub(r"\d+", "0", str(user))

"""What two lists of messages must share to share a session, and which session is chosen: pure decisions."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentspeed.history import Candidate, Conversation, choose, hint_of, keys, own_log, root_key
from agentspeed.messages import Assistant, Message, ToolCall, ToolMessage, User
from agentspeed.tools import tool

_TEXT = st.text("aé\n", max_size=4)
_ARGUMENTS = st.dictionaries(_TEXT, st.integers() | _TEXT, max_size=3)


@st.composite
def _messages(draw: st.DrawFn) -> tuple[Message, ...]:
    found: list[Message] = []
    for _ in range(draw(st.integers(0, 5))):
        kind = draw(st.sampled_from(("user", "said", "called")))
        if kind == "user":
            found.append(User(draw(_TEXT)))
        elif kind == "said":
            found.append(Assistant(draw(_TEXT)))
        else:
            ids = draw(st.lists(st.text("abc", min_size=1), min_size=1, max_size=3, unique=True))
            calls = [ToolCall(id=number, name="f", arguments=json.dumps(draw(_ARGUMENTS))) for number in ids]
            found.append(Assistant("", tuple(calls)))
            found += [ToolMessage(call_id=number, name="f", text=draw(_TEXT)) for number in ids]
    return tuple(found)


@given(_messages())
def test_equal_lists_have_equal_keys_and_every_prefix_has_its_own(messages: tuple[Message, ...]) -> None:
    chain = keys(b"root", messages)
    assert chain == keys(b"root", messages)
    assert len(set(chain)) == len(messages) + 1
    for length in range(len(messages)):
        assert keys(b"root", messages[:length]) == chain[: length + 1]


@given(_messages())
def test_ids_of_calls_do_not_count(messages: tuple[Message, ...]) -> None:
    def renamed(message: Message) -> Message:
        if isinstance(message, Assistant):
            return Assistant(
                message.text,
                tuple(
                    ToolCall(id=f"x{call.id}", name=call.name, arguments=call.arguments) for call in message.tool_calls
                ),
            )
        if isinstance(message, ToolMessage):
            return ToolMessage(call_id=f"x{message.call_id}", name="", text=message.text)
        return message

    assert keys(b"root", [renamed(message) for message in messages]) == keys(b"root", messages)


def test_arguments_are_compared_as_values() -> None:
    one = Assistant("", (ToolCall(id="1", name="f", arguments='{"a": 1, "b": [2]}'),))
    other = Assistant("", (ToolCall(id="1", name="f", arguments='{"b":[2],"a":1}'),))
    more = Assistant("", (ToolCall(id="1", name="f", arguments='{"b":[2],"a":1.5}'),))
    assert keys(b"", [one]) == keys(b"", [other]) != keys(b"", [more])


def test_results_of_two_calls_are_told_apart_by_their_place() -> None:
    calls = Assistant("", (ToolCall(id="1", name="f", arguments="{}"), ToolCall(id="2", name="f", arguments="{}")))
    straight = [calls, ToolMessage(call_id="1", name="f", text="x"), ToolMessage(call_id="2", name="f", text="y")]
    crossed = [calls, ToolMessage(call_id="2", name="f", text="x"), ToolMessage(call_id="1", name="f", text="y")]
    assert keys(b"", straight) != keys(b"", crossed)


def test_arguments_that_are_no_json_stand_for_themselves() -> None:
    deep = "[" * 100_000
    broken = [Assistant("", (ToolCall(id="1", name="f", arguments=text),)) for text in ("{", "}", deep)]
    assert len({keys(b"", [message])[-1] for message in broken}) == 3


@pytest.mark.parametrize(
    "other",
    [
        Conversation(messages=(), system="other"),
        Conversation(messages=(), tenant="other"),
        Conversation(messages=()),
    ],
    ids=["system", "tenant", "no system"],
)
def test_what_stands_above_the_messages_and_whose_they_are_must_be_the_same(other: Conversation) -> None:
    assert root_key(other) != root_key(Conversation(messages=(), system="You are brief."))


def test_other_tools_are_another_conversation() -> None:
    @tool
    def add(a: int, b: int) -> int:
        """Adds."""
        return a + b

    assert root_key(Conversation(messages=(), tools=(add,))) != root_key(Conversation(messages=()))


def _candidate(
    entry: int, *, length: int = 4, idle: bool = True, hint: str | None = None, used_at: float = 0.0
) -> Candidate:
    return Candidate(entry, length, idle, hint, used_at)


@pytest.mark.parametrize(
    ("candidates", "hint", "expected"),
    [
        ([_candidate(1, length=4)], None, ("continue", 1)),
        ([_candidate(1, length=4, idle=False)], None, ("branch", 1)),
        ([_candidate(1, length=6)], None, ("branch", 1)),
        ([_candidate(1, length=6, hint="thread")], "thread", ("rewind", 1)),
        ([_candidate(1, length=6, hint="thread", idle=False)], "thread", ("branch", 1)),
        ([_candidate(1, length=6, hint="other")], "thread", ("branch", 1)),
        ([_candidate(1, length=6, hint="thread"), _candidate(2, length=4)], "thread", ("continue", 2)),
        ([_candidate(1, used_at=1.0), _candidate(2, used_at=2.0)], None, ("continue", 2)),
        (
            [_candidate(1, hint=hint_of("thread", "a"), used_at=1.0), _candidate(2, hint="other", used_at=2.0)],
            hint_of("thread", "b"),
            ("continue", 1),
        ),
    ],
    ids=[
        "whole log",
        "in use",
        "went on",
        "own, went on",
        "own, in use",
        "another's",
        "whole before own",
        "newest",
        "own before newest",
    ],
)
def test_the_best_session_is_chosen(candidates: list[Candidate], hint: str | None, expected: tuple[str, int]) -> None:
    found = choose(4, candidates, hint)
    assert found is not None
    assert (found.verb, found.entry, found.shared) == (*expected, 4)


SAID: tuple[Message, ...] = (User("Hi."), Assistant("Hello."), User("So?"), User("Well?"))


@pytest.mark.parametrize(
    ("own", "hint", "expected"),
    [
        (_candidate(1, length=2, hint="thread"), "thread", 2),
        (_candidate(1, length=2), None, 2),
        (_candidate(1, length=3, hint="thread"), "thread", 3),
        (_candidate(1, length=2, hint="other"), "thread", None),
        (_candidate(1, length=2, hint="thread"), None, None),
        (_candidate(1, length=2, hint="thread", idle=False), "thread", None),
        (_candidate(1, length=5, hint="thread"), "thread", None),
        (_candidate(1, length=1, hint="thread"), "thread", None),
    ],
    ids=["own", "no hints", "own, longer", "another's", "a thread's", "in use", "went on", "an answer is missing"],
)
def test_a_thread_goes_on_in_its_own_log_where_another_shares_more(
    own: Candidate, hint: str | None, expected: int | None
) -> None:
    found = own_log(SAID, 4, lambda length: [own] if own.length >= length else [], hint)
    assert (None if found is None else found.shared) == expected
    assert found is None or (found.verb, found.entry) == ("continue", 1)


def test_nothing_is_chosen_for_the_system_text_alone() -> None:
    assert choose(0, [_candidate(1)], None) is None
    assert choose(2, [], None) is None

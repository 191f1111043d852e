"""What an argument of the SDK must be: checked here by name, so that a wrong one never travels to the engine."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeGuard

from agentspeed.errors import InvalidRequest, InvalidSampling
from agentspeed.messages import Assistant, Message, System, ToolMessage, User

MOST = 2**63 - 1
"""Whole numbers beyond it do not fit into a frame of the protocol."""
ID_END = 2**32
"""Token ids are below it."""


def check_text(name: str, value: object) -> None:
    """Text that can be written as UTF-8. A lone surrogate is half a character: what `os.fsdecode` makes of odd file
    names, or a cut through UTF-16."""
    if not isinstance(value, str):
        raise InvalidRequest(f"{name} is {shown(value)}; it must be a text.")
    try:
        _ = value.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{name} holds half a character (a lone surrogate) at position {error.start}.",
            remedy="Decode it again, or use text.encode(errors='replace').decode().",
        ) from error


def check_messages(messages: Iterable[Message]) -> None:
    """Raises `InvalidRequest` for a message whose text is none."""
    for message in messages:
        kind = type(message).__name__
        match message:
            case System(text=text) | User(text=text):
                check_text(f"{kind} text", text)
            case ToolMessage(name=name, text=text):
                check_text(f"{kind} name", name)
                check_text(f"{kind} text", text)
            case Assistant(text=text, tool_calls=calls, reasoning=reasoning, raw=raw):
                for part in (text, reasoning, raw):
                    check_text(f"{kind} text", part)
                for call in calls:
                    check_text(f"{kind} call's name", call.name)
                    check_text(f"{kind} call's arguments", call.arguments)


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise InvalidRequest(f"{name} is {shown(value)}; it must be True or False.")


def check_seconds(name: str, value: object, *, zero: bool = False, none: bool = True) -> None:
    """A number of seconds; `zero` and `none` say whether these will do."""
    if value is None and none:
        return
    if not is_number(value) or not (value > 0 or (zero and value == 0)):
        bound = ("0 or more" if zero else "above 0") + _bits(value)
        raise InvalidRequest(f"{name} is {shown(value)}; it must be seconds {bound}{', or None' if none else ''}.")


def check_number(name: str, value: object) -> None:
    """A number of any range that a frame can carry."""
    if not is_number(value):
        raise InvalidRequest(f"{name} is {shown(value)}; it must be a number{_bits(value)}.")


def check_ids(name: str, value: object) -> tuple[int, ...]:
    """Token ids, at least one. Which of them a vocabulary has is the engine's to check."""
    ids = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str | bytes) else ()
    if not ids:
        raise InvalidRequest(f"{name} is {shown(value)}; it must be a text, or token ids, and not empty.")
    for place, number in enumerate(ids):
        if not is_whole(number) or not 0 <= number < ID_END:
            raise InvalidRequest(
                f"{name} has {shown(number)} at place {place}; a token id is a whole number from 0 to {ID_END - 1}."
            )
    return ids


def check_count(name: str, value: object, *, least: int = 1, none: bool = False, remedy: str = "") -> None:
    """A whole number, `least` or more."""
    if value is None and none:
        return
    if not is_whole(value) or not least <= value <= MOST:
        bound = ("above 0" if least == 1 else f"{least} or more") + _bits(value)
        raise InvalidRequest(
            f"{name} is {shown(value)}; it must be a whole number {bound}{', or None' if none else ''}.", remedy=remedy
        )


def check_seed(value: object) -> None:
    if value is not None and not (is_whole(value) and abs(value) <= MOST):
        raise InvalidRequest(f"seed is {shown(value)}; it must be a whole number of at most 63 bits, or None.")


def check_draw(name: str, value: object, *, whole: bool = False, none: bool = False) -> None:
    """The kind of a sampling value; its range is the engine's to check."""
    if value is None and none:
        return
    if not (is_whole(value) and abs(value) <= MOST if whole else is_number(value)):
        kind = ("a whole number" if whole else "a number") + _bits(value)
        raise InvalidSampling(f"{name} is {shown(value)}. It must be {kind}{', or None' if none else ''}.")


def is_number(value: object) -> TypeGuard[int | float]:
    """One that a frame can carry: Python's whole numbers have no end."""
    return isinstance(value, float) or (is_whole(value) and abs(value) <= MOST)


def is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def shown(value: object) -> str:
    """As Python writes it; very long numbers, which it refuses to write, and objects that cannot be written, by what
    they are."""
    if is_whole(value) and value.bit_length() > 128:
        return f"a number of {value.bit_length()} bits"
    try:
        return repr(value)
    except Exception:  # noqa: BLE001 - whatever a caller's `__repr__` does: the error that names the value goes first
        return f"a {type(value).__name__} that cannot be shown"


def _bits(value: object) -> str:
    """What to say of a bound that only a very large number goes beyond."""
    return " of at most 63 bits" if is_whole(value) and abs(value) > MOST else ""

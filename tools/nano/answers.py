"""What nano says: a plain sentence for each result of a tool, and which tools there are when none fits."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

NO_TOOL = "I have no tool for that."
_DONE = ("", "ok", "done", "null")
_FAILED = "error: "
_TAIL = r"\b(?:the|a|an|my|that|this|our) NOUN(?P<tail>(?:(?: (?:in|on|at|of|for|to|from|with|about))? \{\w+\}.*)?)$"
_ASKED = re.compile(r"(?:What|How|How much) is (?P<subject>.+)")


def subject_of(form: str, noun: str, otherwise: str) -> str:
    """What an answer is about, in the words of the request: of "check the weather in {city}" it is "the weather in
    {city}". `otherwise`: for requests that do not have the noun so."""
    if asked := _ASKED.fullmatch(form):
        return asked["subject"].replace("my ", "the ")
    found = re.search(_TAIL.replace("NOUN", re.escape(noun)), form)
    return f"the {noun}{found['tail']}" if found else otherwise


def sentence(subject: str, result: str) -> str:
    """One result, as text, under what it is about."""
    subject = f"The{subject[3:]}" if subject.startswith("the ") else subject
    if result in _DONE:
        return "Done."
    if result.startswith(_FAILED):
        return f"{subject} failed: {result.removeprefix(_FAILED).rstrip('.')}."
    if result[0] in "[{":
        return _structured(subject, json.loads(result))
    if result.endswith("."):
        return result
    return f"{subject} is {result}."


def _structured(subject: str, value: Any) -> str:
    if isinstance(value, dict):
        return f"{subject}: {_fields(value)}."
    if not value:
        return f"{subject}: none."
    if isinstance(value[0], dict):
        return f"{subject}: {'; '.join(map(_fields, value))}."
    return f"{subject} {'is' if len(value) == 1 else 'are'} {listed([_spoken(item) for item in value])}."


def _fields(value: dict[str, Any]) -> str:
    """ "temp 14, sky clear" """
    return ", ".join(f"{key} {_spoken(item)}" for key, item in value.items())


def _spoken(value: Any) -> str:
    if isinstance(value, list):
        return listed([_spoken(item) for item in value])
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def listed(items: Sequence[str]) -> str:
    """ "a, b and c" """
    return " and ".join(part for part in (", ".join(items[:-1]), items[-1]) if part) if items else "none"


def answer(subjects: Sequence[str], results: Sequence[str]) -> str:
    """The answer after results: a sentence for each, in call order."""
    return " ".join(sentence(subject, result) for subject, result in zip(subjects, results, strict=True))


def refusal(names: Sequence[str]) -> str:
    """Says that no tool fits, and which there are."""
    return f"{NO_TOOL} I can use {listed(names)}." if names else "I have no tools."

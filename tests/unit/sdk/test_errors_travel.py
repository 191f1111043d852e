"""Errors cross process borders whole: whoever runs agents in a process pool must not lose what went wrong."""

from __future__ import annotations

import inspect
import pickle

import pytest

from agentspeed import errors
from agentspeed_engine.errors import EngineFault

PUBLIC = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.AgentspeedError)]


@pytest.mark.parametrize("kind", PUBLIC)
def test_a_public_error_arrives_with_all_it_says(kind: type[errors.AgentspeedError]) -> None:
    extra = {"tool": {"tool": "search"}, "text": {"text": "half"}, "partial": {"partial": "so far"}}
    named = {key: value for key in inspect.signature(kind).parameters for key, value in extra.get(key, {}).items()}
    sent = kind("It broke.", remedy="Mend it.", **named)
    arrived = pickle.loads(pickle.dumps(sent))
    assert type(arrived) is kind
    assert str(arrived) == "It broke. Mend it."
    assert vars(arrived) == vars(sent)


def test_an_engine_fault_arrives_with_its_code_and_remedy() -> None:
    arrived = pickle.loads(pickle.dumps(EngineFault("out_of_memory", "Too many pages.", "Give fewer.")))
    assert str(arrived) == "Too many pages. Give fewer."
    assert (arrived.code, arrived.message, arrived.remedy) == ("out_of_memory", "Too many pages.", "Give fewer.")

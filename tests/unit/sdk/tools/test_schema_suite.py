"""The public JSON Schema test suite (draft 2020-12, `tests/data/json-schema-test-suite`) as a judge of the grammars."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentspeed.errors import SchemaUnsupported
from tests.schema_texts import matcher, takes

SUITE = Path(__file__).parents[3] / "data" / "json-schema-test-suite"
LEAST_ACCEPTED = 310


def groups() -> Iterator[tuple[str, dict[str, Any]]]:
    for file in sorted(SUITE.glob("*.json")):
        for group in json.loads(file.read_text(encoding="utf-8")):
            if isinstance(group["schema"], dict):
                yield f"{file.stem}: {group['description']}", group


def test_no_instance_that_the_suite_calls_invalid_can_be_written_and_most_schemas_are_accepted() -> None:
    accepted, wrong = 0, []
    for name, group in groups():
        try:
            grammar = matcher(group["schema"])
        except SchemaUnsupported as refused:
            assert refused.remedy, name
            continue
        accepted += 1
        for test in group["tests"]:
            text = json.dumps(test["data"], separators=(",", ":"), ensure_ascii=False)
            if not test["valid"] and takes(grammar, text):
                wrong.append((name, test["description"], text))
    assert wrong == []
    assert accepted >= LEAST_ACCEPTED


@pytest.mark.parametrize("keyword", ["minimum", "enum", "required", "oneOf", "pattern", "const", "anyOf", "maxItems"])
def test_instances_of_the_kind_a_schema_speaks_of_can_be_written(keyword: str) -> None:
    """A schema without a type means the kind that its keywords are of; its objects have the properties they name."""
    refused = []
    for name, group in groups():
        kinds = {"minimum": int, "enum": object, "required": dict, "pattern": str, "maxItems": list}
        if not name.startswith(f"{keyword}: "):
            continue
        try:
            grammar = matcher(group["schema"])
        except SchemaUnsupported:
            continue
        valid = [test["data"] for test in group["tests"] if test["valid"]]
        valid = [value for value in valid if isinstance(value, kinds.get(keyword, object))]
        texts = [json.dumps(value, separators=(",", ":"), ensure_ascii=False) for value in valid]
        if texts and not any(takes(grammar, text) for text in texts):
            refused.append((name, texts))
    assert refused == []

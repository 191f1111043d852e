"""A whole value checked against its schema: for what a grammar cannot hold, where that was asked for."""

from __future__ import annotations

from typing import Any

from agentspeed.errors import ExtraMissing
from agentspeed.tools.schema.values import Json, Schema


def check_available() -> None:
    """Raises `ExtraMissing` where nothing can check."""
    try:
        import jsonschema as _  # noqa: F401
    except ImportError as error:
        raise ExtraMissing("check_after=True needs jsonschema.", remedy="Install agentspeed[engine].") from error


def problem_of(schema: Schema, value: Json) -> str:
    """The first thing that is wrong with a value, and where; empty when nothing is."""
    from jsonschema.validators import validator_for

    validator: Any = validator_for(schema)
    error = next(iter(validator(schema).iter_errors(value)), None)
    return "" if error is None else f"{error.json_path}: {error.message[:400]}"

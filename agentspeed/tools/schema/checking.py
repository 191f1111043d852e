"""A whole value checked against its schema: for what a grammar cannot hold, where that was asked for."""

from __future__ import annotations

from typing import Any, Final

from agentspeed.errors import ExtraMissing
from agentspeed.tools.schema.values import Json, Schema

_ENDLESS: Final = "$: the schema refers to itself and to nothing else, or the value is nested too deep to be checked"


def check_available() -> None:
    """Raises `ExtraMissing` where nothing can check."""
    try:
        import jsonschema as _  # noqa: F401
    except ImportError as error:
        raise ExtraMissing("check_after=True needs jsonschema.", remedy="Install agentspeed[engine].") from error


def problem_of(schema: Schema, value: Json) -> str:
    """The first thing that is wrong with a value, and where; empty when nothing is. A schema that comes back to itself
    without going into the value (by an `if` that decides nothing) holds for no value: nobody can say what it means."""
    from jsonschema.validators import validator_for

    validator: Any = validator_for(schema)
    try:
        error = next(iter(validator(schema).iter_errors(value)), None)
    except RecursionError:
        return _ENDLESS
    except BaseException as broken:
        # What the library's compiled part makes of the same, where the stack ends inside of it; it is no `Exception`.
        if type(broken).__name__ != "PanicException":
            raise
        return _ENDLESS
    return "" if error is None else f"{error.json_path}: {error.message[:400]}"

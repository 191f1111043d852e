"""Tools whose results come from elsewhere: a definition is enough, nothing runs here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from agentspeed import errors
from agentspeed.message_formats.misfit import misfit
from agentspeed.tools import Tool, declared_tool


def declared(definitions: Sequence[Mapping[str, Any]]) -> tuple[Tool, ...]:
    """The tools of a request, which its client runs. Raises `MessageMisfit` for one that no grammar can hold."""
    found: dict[str, Tool] = {}
    for place, definition in enumerate(definitions):
        try:
            made = declared_tool(definition, _not_here)
        except (TypeError, errors.InputError) as error:
            raise misfit(str(error), f"tools[{place}]") from error
        if made.name in found:
            raise misfit(f"Two tools are named {made.name!r}.", f"tools[{place}]")
        found[made.name] = made
    return tuple(found.values())


def _not_here(**arguments: object) -> NoReturn:
    raise errors.InternalError(f"A tool that the client runs was called here with {sorted(arguments)}.")

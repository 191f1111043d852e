"""The families that run, by config.json's `model_type`; every other type is refused with what is missing and near."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.models.families import deepseek, grouped
from agentspeed_engine.models.family import Family
from agentspeed_engine.models.other_types import missing

FAMILIES: tuple[Family[Any], ...] = (*deepseek.FAMILIES, *grouped.FAMILIES)
BY_TYPE: dict[str, Family[Any]] = {name: family for family in FAMILIES for name in family.model_types}
"""By every name that a family is published under."""


def supported_types() -> tuple[str, ...]:
    """Every `model_type` that runs, in the registry's order."""
    return tuple(BY_TYPE)


def family_of(raw: Mapping[str, Any]) -> Family[Any]:
    """The family of a config.json. Raises `EngineFault` (unsupported_model)."""
    kind = raw.get("model_type")
    family = BY_TYPE.get(kind) if isinstance(kind, str) else None
    if family is None:
        what, nearest = missing(raw, BY_TYPE)
        raise EngineFault(
            "unsupported_model",
            f"model_type {kind!r} is not supported: {what}.",
            (f"The nearest family that runs is {nearest}. " if nearest else "")
            + f"Supported are {', '.join(supported_types())}.",
        )
    lacking = {"rewind_to_any_token"} - family.capabilities
    if lacking:
        raise EngineFault("unsupported_model", f"{family.name} models lack {', '.join(sorted(lacking))}.", "")
    return family

"""Typed reads of a config.json that name the field they refuse; what is absent and what is null are two things."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, final

from agentspeed_engine.errors import EngineFault

MOST, MOST_NUMBER, LEAST_NUMBER = 2**24, 1e18, 1e-18
"""Of every size and every other number: far from any model's, and what is computed from them stays computable."""
_REQUIRED: Final = object()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model folder. Raises `EngineFault` (bad_config)."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EngineFault(
            "bad_config", f"{path} does not exist.", "Give the path of a Hugging Face model folder."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise EngineFault("bad_config", f"{path} cannot be read as JSON: {error}.", "Download it again.") from error
    if not isinstance(data, dict):
        raise EngineFault("bad_config", f"{path} holds a {type(data).__name__}, not an object.", "Download it again.")
    return data


@final
class Fields:
    """One object of a config.json. Every read raises `EngineFault` (bad_config) when the value cannot be used.

    A field that is absent takes the default that is given, which is the one of the published modelling code; a field
    that is null is refused unless the read says what null means: to the published code null is often neither an error
    nor the default.
    """

    def __init__(self, raw: Mapping[str, Any], at: str = "") -> None:
        """`at` is put before names in messages, as in `rope_parameters.`."""
        self.raw = raw
        self._at = at

    def require(self, holds: bool, message: str, remedy: str) -> None:
        """Refuses the configuration unless `holds`; `message` is a sentence without its full stop."""
        if not holds:
            raise EngineFault("bad_config", f"config.json: {self._at}{message}.", remedy)

    def count(self, name: str, default: int | None = None, most: int = MOST) -> int:
        """A whole number from 1."""
        return self._whole(name, _REQUIRED if default is None else default, 1, most)

    def natural(self, name: str, default: int) -> int:
        """A whole number from 0; null means 0."""
        return 0 if self._is_null(name) else self._whole(name, default, 0, MOST)

    def number(self, name: str, default: float | None = None) -> float:
        """A number above 0, neither huge nor tiny."""
        value = self._given(name, _REQUIRED if default is None else default)
        ok = isinstance(value, (int, float)) and not isinstance(value, bool) and LEAST_NUMBER <= value <= MOST_NUMBER
        self.require(ok, f"{name} is {value!r}", f"It must be above 0, from {LEAST_NUMBER:g} to {MOST_NUMBER:g}.")
        return float(value)

    def optional_number(self, name: str) -> float | None:
        """None where it is absent, null or 0, which mean the same to the published code."""
        return self.number(name) if self.raw.get(name) else None

    def optional_count(self, name: str) -> int | None:
        """None where it is absent or null."""
        return None if self.raw.get(name) is None else self.count(name)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self._given(name, default)
        self.require(isinstance(value, bool), f"{name} is {value!r}", "It must be true or false.")
        return bool(value)

    def text(self, name: str, default: str) -> str:
        """A string."""
        value = self._given(name, default)
        self.require(isinstance(value, str), f"{name} is {value!r}", "It must be a string.")
        return str(value)

    def _whole(self, name: str, default: object, least: int, most: int) -> int:
        value = self._given(name, default)
        ok = isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
        self.require(ok, f"{name} is {value!r}", f"It must be a whole number from {least} to {most}.")
        return int(value)

    def _given(self, name: str, default: object) -> Any:
        if name in self.raw:
            self.require(self.raw[name] is not None, f"{name} is null", "Give it its value.")
            return self.raw[name]
        self.require(default is not _REQUIRED, f"{name} is missing", "Add it.")
        return default

    def _is_null(self, name: str) -> bool:
        return name in self.raw and self.raw[name] is None


def end_ids(raw: Mapping[str, Any], generation: Mapping[str, Any] | None, vocab_size: int) -> tuple[int, ...]:
    """The ids that end a turn: those of config.json, then those that generation_config.json adds.

    Raises `EngineFault` (bad_config) naming the file whose `eos_token_id` is wrong.
    """
    found: list[int] = []
    for file, source in (("config.json", raw), ("generation_config.json", generation or {})):
        given = source.get("eos_token_id")
        for end in given if isinstance(given, list) else [given]:
            if end is None or end in found:
                continue
            if not isinstance(end, int) or isinstance(end, bool):
                raise EngineFault("bad_config", f"{file}: eos_token_id {end!r} is not an integer.", "Correct it.")
            if not 0 <= end < vocab_size:
                raise EngineFault(
                    "bad_config",
                    f"{file}: eos_token_id {end} is outside the vocabulary of {vocab_size}.",
                    "Correct eos_token_id there, or vocab_size in config.json.",
                )
            found.append(end)
    return tuple(found)

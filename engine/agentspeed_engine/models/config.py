"""Reads a config.json strictly: contradictions are refused before any weight is read, or fetched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agentspeed_engine.models.family import Family, ModelConfig
from agentspeed_engine.models.fields import Fields, end_ids
from agentspeed_engine.models.quantization import declared_scheme
from agentspeed_engine.models.registry import family_of


def parse(raw: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
    """`raw` is config.json; `generation` is generation_config.json, whose end ids are checked with it.

    Raises `EngineFault`: unsupported_model for an architecture or a quantisation that does not run, bad_config for
    what contradicts itself.
    """
    family = family_of(raw)
    _ = declared_scheme(raw)
    return parse_as(family, raw, generation)[0]


def parse_as(
    family: Family[Any], raw: Mapping[str, Any], generation: Mapping[str, Any] | None
) -> tuple[ModelConfig, tuple[int, ...]]:
    """(The configuration, the ids that end a turn), however the weights are stored. Raises `EngineFault`."""
    text = family.text_part(raw)
    config: ModelConfig = family.parse(Fields(text))
    return config, end_ids(text, generation, config.vocab_size)

"""What a config.json says of rotary embeddings: the base, and how angles are stretched for long contexts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from agentspeed_engine.models.fields import MOST, Fields

DEFAULT_THETA = 10_000.0
"""Of the published modelling code, for every family here."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Yarn:
    """Yarn (Peng et al. 2023), with the two factors DeepSeek added."""

    factor: float
    original_context: int
    beta_fast: float
    beta_slow: float
    mscale: float | None
    mscale_all_dim: float | None
    attention_factor: float | None
    attn_factor: float
    """Multiplies the factor where the configuration does not give all of it: SGLang's and vLLM's name, by which
    DeepSeek-R1-0528-Qwen3-8B is published; transformers leaves it unread."""
    truncate: bool


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Rope:
    """Llama 3.1: long waves are stretched by `factor`, short ones kept, those between mixed."""

    factor: float
    low: float
    high: float
    original_context: int


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Angles of `width` coordinates of a head, for positions up to the context limit."""

    width: int
    theta: float
    scaling: Yarn | Llama3Rope | None

    def reach(self, context: int) -> int:
        """The longest context of a model whose max_position_embeddings are `context`: as far as yarn stretches its
        angles, which people add to a published model that was trained for less."""
        stretched = self.scaling.original_context * self.scaling.factor if isinstance(self.scaling, Yarn) else 0
        return max(context, min(int(stretched), MOST))


def parse_rope(fields: Fields, width: int) -> RopeConfig:
    """Reads both namings: `rope_parameters` holds theta too; `rope_scaling` sits beside `rope_theta`.

    Where both are there, `rope_scaling` counts, as it does for the published code. Raises `EngineFault` (bad_config).
    """
    raw = fields.raw
    name = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    nested: Any = raw.get(name) or {}
    fields.require(isinstance(nested, Mapping), f"{name} is not an object", "Write it as an object or null.")
    layered = [key for key, value in nested.items() if isinstance(value, Mapping)]
    fields.require(
        not layered, f"{name} gives each kind of layer its own ({', '.join(layered)})", "Only one for all is supported."
    )
    scaling = Fields(nested, f"{name}.")
    for place, at in ((fields, raw), (scaling, nested)):
        part = at.get("partial_rotary_factor", 1)
        place.require(part in (1, None), f"partial_rotary_factor is {part!r}", "Only 1 is supported.")
    theta = scaling.number("rope_theta") if "rope_theta" in nested else _outer_theta(fields)
    kind = nested.get("rope_type", nested.get("type", "default"))
    if kind in ("yarn", "llama3"):
        fields.require(theta > 1, f"rope_theta is {theta:g}", "Scaled angles need a base above 1.")
        original = _original_context(fields, scaling)
        found = _yarn(scaling, fields, original) if kind == "yarn" else _llama3(scaling, original)
        return RopeConfig(width=width, theta=theta, scaling=found)
    fields.require(kind == "default", f"RoPE scaling {kind!r} is not supported", "Supported: default, yarn and llama3.")
    return RopeConfig(width=width, theta=theta, scaling=None)


def _outer_theta(fields: Fields) -> float:
    return DEFAULT_THETA if fields.raw.get("rope_theta") is None else fields.number("rope_theta")


def _original_context(fields: Fields, scaling: Fields) -> int:
    name = "original_max_position_embeddings"
    outer = fields.optional_count(name)
    inner = scaling.count(name, outer)
    fields.require(
        outer in (None, inner),
        f"{name} is {outer}, and {inner} where RoPE is described",
        "Make them equal: the published code takes now the one, now the other.",
    )
    return inner


def _yarn(scaling: Fields, fields: Fields, original: int) -> Yarn:
    whole = scaling.raw.get("factor") is None
    return Yarn(
        factor=fields.count("max_position_embeddings") / original if whole else scaling.number("factor"),
        original_context=original,
        beta_fast=scaling.optional_number("beta_fast") or 32.0,
        beta_slow=scaling.optional_number("beta_slow") or 1.0,
        mscale=scaling.optional_number("mscale"),
        mscale_all_dim=scaling.optional_number("mscale_all_dim"),
        attention_factor=None if scaling.raw.get("attention_factor") is None else scaling.number("attention_factor"),
        attn_factor=scaling.optional_number("attn_factor") or 1.0,
        truncate=scaling.flag("truncate", True),
    )


def _llama3(scaling: Fields, original: int) -> Llama3Rope:
    found = Llama3Rope(
        factor=scaling.number("factor"),
        low=scaling.number("low_freq_factor"),
        high=scaling.number("high_freq_factor"),
        original_context=original,
    )
    scaling.require(found.high > found.low, "high_freq_factor is not above low_freq_factor", "Correct one of them.")
    return found

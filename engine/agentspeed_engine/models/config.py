"""Reads a model folder's config.json strictly: contradictions are refused before any weight is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

from agentspeed_engine.errors import EngineFault

FAMILIES = ("deepseek_v2", "deepseek_v3")
LAYER_NORM_EPS = 1e-6
"""Of the norms inside attention: these families fix it, whatever `rms_norm_eps` says."""
_MOST, _MOST_NUMBER = 2**24, 1e18
"""Of every size and every other number: far above any model, and what is computed from them stays computable."""
_MOST_LAYERS = 1024
_MOST_EXPERTS = 2**17
"""Of all layers together (DeepSeek-V3: 61 of 256, 15,616): every tensor is looked for by its name, which takes time."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Yarn:
    factor: float
    original_context: int
    beta_fast: float
    beta_slow: float
    mscale: float | None
    mscale_all_dim: float | None
    attention_factor: float | None
    truncate: bool


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class MoeConfig:
    experts: int
    top: int
    inner: int
    shared: int
    first_dense: int
    groups: int
    top_groups: int
    score: Literal["sigmoid", "softmax"]
    group_score: Literal["top2", "max"]
    normalise: bool
    scale: float


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Every number the families need, checked."""

    model_type: Literal["deepseek_v2", "deepseek_v3"]
    vocab_size: int
    hidden: int
    layers: int
    draft_layers: int
    """Layers for drafting that the checkpoint has behind its own; they are left unread."""
    heads: int
    inner: int
    q_rank: int | None
    kv_rank: int
    rope: int
    nope: int
    value: int
    eps: float
    context_limit: int
    rope_theta: float
    yarn: Yarn | None
    interleaved: bool
    attention_bias: bool
    tied: bool
    eos_ids: tuple[int, ...]
    moe: MoeConfig | None

    @property
    def latent_width(self) -> int:
        return self.kv_rank + self.rope

    def is_dense(self, layer: int) -> bool:
        return self.moe is None or layer < self.moe.first_dense


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model folder."""
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


def parse(raw: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
    """`raw` is config.json; `generation` is generation_config.json, whose end ids are added."""
    model_type = raw.get("model_type")
    if model_type not in FAMILIES:
        raise EngineFault(
            "unsupported_model",
            f"model_type {model_type!r} is not supported.",
            f"Supported are {' and '.join(FAMILIES)} (MLA models).",
        )
    fields = _Fields(raw)
    theta, yarn = _rope(fields)
    config = ModelConfig(
        model_type=model_type,
        vocab_size=fields.count("vocab_size"),
        hidden=fields.count("hidden_size"),
        layers=fields.count("num_hidden_layers", _MOST_LAYERS),
        draft_layers=fields.natural("num_nextn_predict_layers", 0),
        heads=fields.count("num_attention_heads"),
        inner=fields.count("intermediate_size"),
        q_rank=fields.count("q_lora_rank") if raw.get("q_lora_rank") is not None else None,
        kv_rank=fields.count("kv_lora_rank"),
        rope=fields.count("qk_rope_head_dim"),
        nope=fields.count("qk_nope_head_dim"),
        value=fields.count("v_head_dim"),
        eps=fields.number("rms_norm_eps"),
        context_limit=fields.count("max_position_embeddings"),
        rope_theta=theta,
        yarn=yarn,
        interleaved=True if model_type == "deepseek_v2" else fields.flag("rope_interleave", True),
        attention_bias=fields.flag("attention_bias", False),
        tied=fields.flag("tie_word_embeddings", False),
        eos_ids=_eos_ids(raw, generation or {}),
        moe=_moe(fields, model_type),
    )
    _check(config, fields)
    return config


def _check(config: ModelConfig, fields: _Fields) -> None:
    if config.moe is not None:
        routed = config.layers * config.moe.experts
        fields.require(routed <= _MOST_EXPERTS, f"num_hidden_layers times n_routed_experts is {routed}",
                       f"It must be at most {_MOST_EXPERTS}.")
    fields.require(config.rope % 2 == 0, f"qk_rope_head_dim {config.rope} is odd", "RoPE turns pairs.")
    kv_heads = fields.raw.get("num_key_value_heads")
    fields.require(
        kv_heads is None or kv_heads == config.heads,
        f"num_key_value_heads {kv_heads} differs from num_attention_heads {config.heads}",
        "MLA has one latent for all heads; make them equal.",
    )
    act = fields.raw.get("hidden_act", "silu")
    fields.require(act == "silu", f"hidden_act {act!r} is not silu", "These families use silu.")
    fields.require(
        not fields.flag("mlp_bias", False), "mlp_bias is true", "Feed-forward biases are not part of these families."
    )
    for end in config.eos_ids:
        fields.require(
            0 <= end < config.vocab_size,
            f"eos_token_id {end} is outside the vocabulary of {config.vocab_size}",
            "Correct eos_token_id or vocab_size.",
        )


def _moe(fields: _Fields, model_type: str) -> MoeConfig | None:
    raw = fields.raw
    if raw.get("n_routed_experts") is None:
        return None
    v3 = model_type == "deepseek_v3"
    method = raw.get("topk_method", "noaux_tc" if v3 else "greedy")
    known = ("noaux_tc",) if v3 else ("greedy", "group_limited_greedy")
    fields.require(
        method in known, f"topk_method {method!r} is unknown for {model_type}", f"Known: {', '.join(known)}."
    )
    score = raw.get("scoring_func", "sigmoid" if v3 else "softmax")
    expected = "sigmoid" if v3 else "softmax"
    fields.require(score == expected, f"scoring_func {score!r} contradicts {model_type}", f"It must be {expected}.")
    fields.require(raw.get("moe_layer_freq", 1) == 1, "moe_layer_freq is not 1", "Only 1 is supported.")
    grouped = method != "greedy"
    experts, top = fields.count("n_routed_experts"), fields.count("num_experts_per_tok")
    groups = fields.count("n_group") if grouped and raw.get("n_group") is not None else 1
    top_groups = fields.count("topk_group") if grouped and raw.get("topk_group") is not None else groups
    normalise = fields.flag("norm_topk_prob", v3)
    fields.require(v3 or not normalise, "norm_topk_prob is true for deepseek_v2", "Set it to false, as V2 models do.")
    fields.require(experts % groups == 0, f"n_routed_experts {experts} does not divide into n_group {groups}", "")
    fields.require(top_groups <= groups, f"topk_group {top_groups} is above n_group {groups}", "")
    fields.require(
        top <= experts // groups * top_groups,
        f"num_experts_per_tok {top} is above the {experts // groups * top_groups} experts of topk_group groups",
        "",
    )
    fields.require(
        not v3 or experts // groups >= 2, f"a group of {experts // groups} expert has no top 2", "Lower n_group."
    )
    return MoeConfig(
        experts=experts,
        top=top,
        inner=fields.count("moe_intermediate_size"),
        shared=fields.count("n_shared_experts"),
        first_dense=fields.natural("first_k_dense_replace", 0),
        groups=groups,
        top_groups=top_groups,
        score="sigmoid" if v3 else "softmax",
        group_score="top2" if v3 else "max",
        normalise=normalise,
        scale=fields.number("routed_scaling_factor", 1.0),
    )


def _rope(fields: _Fields) -> tuple[float, Yarn | None]:
    """Both namings: `rope_parameters` holds theta too; `rope_scaling` sits beside `rope_theta`."""
    raw = fields.raw
    nested = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    fields.require(isinstance(nested, dict), "rope_parameters is not an object", "Write it as an object or null.")
    scaling = _Fields(nested, "rope_parameters.")
    theta = scaling.number("rope_theta") if "rope_theta" in nested else fields.number("rope_theta", 10000.0)
    kind = nested.get("rope_type", nested.get("type", "default"))
    if kind == "default":
        return theta, None
    fields.require(kind == "yarn", f"RoPE scaling {kind!r} is not supported", "Supported: default and yarn.")
    original = scaling.count("original_max_position_embeddings")
    factor = nested.get("factor")
    return theta, Yarn(
        factor=scaling.number("factor") if factor is not None else fields.count("max_position_embeddings") / original,
        original_context=original,
        beta_fast=scaling.number("beta_fast", 32.0),
        beta_slow=scaling.number("beta_slow", 1.0),
        mscale=scaling.optional_number("mscale"),
        mscale_all_dim=scaling.optional_number("mscale_all_dim"),
        attention_factor=scaling.optional_number("attention_factor"),
        truncate=scaling.flag("truncate", True),
    )


def _eos_ids(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    found: list[int] = []
    for source in (raw.get("eos_token_id"), generation.get("eos_token_id")):
        for end in source if isinstance(source, list) else [source]:
            if end is None or end in found:
                continue
            if not isinstance(end, int) or isinstance(end, bool):
                raise EngineFault("bad_config", f"eos_token_id {end!r} is not an integer.", "Correct it.")
            found.append(end)
    return tuple(found)


class _Fields:
    """Typed reads of a config that name the field they refuse."""

    def __init__(self, raw: Mapping[str, Any], at: str = "") -> None:
        self.raw = raw
        self._at = at

    def require(self, holds: bool, message: str, remedy: str) -> None:
        if not holds:
            raise EngineFault("bad_config", f"config.json: {message}.", remedy)

    def count(self, name: str, most: int = _MOST) -> int:
        return self._whole(name, self._present(name), 1, most)

    def natural(self, name: str, default: int) -> int:
        value = self.raw.get(name)
        return self._whole(name, default if value is None else value, 0, _MOST)

    def _whole(self, name: str, value: Any, least: int, most: int) -> int:
        ok = isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
        self.require(ok, f"{self._at}{name} is {value!r}", f"It must be a whole number from {least} to {most}.")
        return int(value)

    def number(self, name: str, default: float | None = None) -> float:
        value = self.raw.get(name)
        if value is None:
            value = default if default is not None else self._present(name)
        ok = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= _MOST_NUMBER
        self.require(ok, f"{self._at}{name} is {value!r}", f"It must be above 0 and at most {_MOST_NUMBER:g}.")
        return float(value)

    def optional_number(self, name: str) -> float | None:
        return self.number(name) if self.raw.get(name) else None

    def flag(self, name: str, default: bool) -> bool:
        value = self.raw.get(name)
        value = default if value is None else value
        self.require(isinstance(value, bool), f"{self._at}{name} is {value!r}", "It must be true or false.")
        return bool(value)

    def _present(self, name: str) -> Any:
        self.require(self.raw.get(name) is not None, f"{self._at}{name} is missing", "Add it.")
        return self.raw[name]

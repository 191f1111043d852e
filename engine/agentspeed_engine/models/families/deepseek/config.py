"""Configurations of models with multi-head latent attention: DeepSeek's and those that others publish of its kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from agentspeed_engine.models.fields import Fields
from agentspeed_engine.models.moe_config import MoeConfig, check_experts
from agentspeed_engine.models.rope_config import RopeConfig, Yarn, parse_rope

LATENT_NORM_EPS = 1e-6
"""Of the norms inside attention: these families fix it, whatever `rms_norm_eps` says."""
MOST_LAYERS = 1024


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class IndexerConfig:
    """Sparse attention: an indexer chooses the tokens that a row reads (DeepSeek-V3.2)."""

    heads: int
    width: int
    """Of its queries and keys; the first `rope.width` coordinates turn."""
    top: int
    """The most tokens that a row reads."""
    interleaved: bool
    """Its rotary pairs are neighbours, as those of the attention are."""
    layers: tuple[int, ...]
    """Those that choose; a layer between two of them reads what the one before it chose."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class DeepseekConfig:
    """Every number the modules need, checked."""

    model_type: str
    vocab_size: int
    hidden: int
    layers: int
    draft_layers: int
    heads: int
    inner: int
    q_rank: int | None
    kv_rank: int
    nope: int
    value: int
    eps: float
    context_limit: int
    rope: RopeConfig
    interleaved: bool
    attention_bias: bool
    tied: bool
    moe: MoeConfig | None
    indexer: IndexerConfig | None = None
    """None where every row reads all that it sees."""

    @property
    def latent_width(self) -> int:
        """Elements of a token's row in the cache."""
        return self.kv_rank + self.rope.width

    @property
    def yarn(self) -> Yarn | None:
        """The stretching of angles, which in these families also scales attention scores."""
        return self.rope.scaling if isinstance(self.rope.scaling, Yarn) else None


def parse_v2(fields: Fields) -> DeepseekConfig:
    """`deepseek_v2`. Absent fields take the defaults of transformers' DeepseekV2Config, or are refused."""
    layers = fields.count("num_hidden_layers", most=MOST_LAYERS)
    return parsed(fields, moe=_softmax_experts(fields, layers), interleaved=True)


def parse_v3(fields: Fields) -> DeepseekConfig:
    """`deepseek_v3` and `kimi_k2`. Defaults of transformers' DeepseekV3Config."""
    layers = fields.count("num_hidden_layers", most=MOST_LAYERS)
    routed = frozenset(range(fields.natural("first_k_dense_replace", 3), layers))
    moe = sigmoid_experts(fields, routed, groups=8, top_groups=4, top=8, scale=2.5)
    return parsed(fields, moe=moe)


def parse_glm(fields: Fields) -> DeepseekConfig:
    """`glm4_moe_lite`. Defaults of transformers' Glm4MoeLiteConfig: a list of layer kinds says which have experts."""
    layers = fields.count("num_hidden_layers", most=MOST_LAYERS)
    routed = _sparse_layers(fields, layers)
    moe = sigmoid_experts(fields, routed, groups=1, top_groups=1, top=4, scale=1.8)
    return parsed(fields, moe=moe, eps=1e-5)


def parse_youtu(fields: Fields) -> DeepseekConfig:
    """`youtu`, first published as `youtu_llm`. Defaults of transformers' YoutuConfig: all layers are dense."""
    fields.require(not fields.raw.get("n_routed_experts"), "n_routed_experts is given", "Youtu models have no experts.")
    return parsed(fields, moe=None, tied=True)


def text_of_kimi(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model of a `kimi_k25`, whose configuration holds it beside the vision tower's.

    The part's own `model_type` must be one that `parse_v3` reads. Raises `EngineFault` (bad_config).
    """
    fields = Fields(raw)
    text = raw.get("text_config")
    fields.require(isinstance(text, Mapping), "text_config is missing", "Add it, as the model was published.")
    assert isinstance(text, Mapping)
    kind = text.get("model_type", "deepseek_v3")
    fields.require(
        kind in ("kimi_k2", "deepseek_v3"),
        f"text_config.model_type is {kind!r}",
        "The language model of a kimi_k25 is a kimi_k2 or a deepseek_v3.",
    )
    ends = {} if text.get("eos_token_id") is not None else {"eos_token_id": raw.get("eos_token_id")}
    return {**text, **ends, "model_type": raw.get("model_type")}


def parsed(
    fields: Fields,
    *,
    moe: MoeConfig | None,
    interleaved: bool | None = None,
    eps: float = 1e-6,
    tied: bool = False,
    indexer: IndexerConfig | None = None,
) -> DeepseekConfig:
    """What all types share. `interleaved` is fixed by the family, or None where `rope_interleave` says it."""
    rope = parse_rope(fields, fields.count("qk_rope_head_dim"))
    config = DeepseekConfig(
        model_type=str(fields.raw["model_type"]),
        vocab_size=fields.count("vocab_size"),
        hidden=fields.count("hidden_size"),
        layers=fields.count("num_hidden_layers", most=MOST_LAYERS),
        draft_layers=fields.natural("num_nextn_predict_layers", 0),
        heads=fields.count("num_attention_heads"),
        inner=fields.count("intermediate_size"),
        q_rank=_present_or_null(fields, "q_lora_rank", "Give its number, or null where queries have no low rank."),
        kv_rank=fields.count("kv_lora_rank"),
        nope=fields.count("qk_nope_head_dim"),
        value=fields.count("v_head_dim"),
        eps=fields.number("rms_norm_eps", eps),
        context_limit=rope.reach(fields.count("max_position_embeddings")),
        rope=rope,
        interleaved=fields.flag("rope_interleave", True) if interleaved is None else interleaved,
        attention_bias=fields.flag("attention_bias", False),
        tied=fields.flag("tie_word_embeddings", tied),
        moe=moe,
        indexer=indexer,
    )
    _check(config, fields)
    return config


def _check(config: DeepseekConfig, fields: Fields) -> None:
    if config.moe is not None:
        check_experts(fields, config.moe, config.layers, "n_routed_experts")
    fields.require(config.rope.width % 2 == 0, f"qk_rope_head_dim {config.rope.width} is odd", "RoPE turns pairs.")
    kv_heads = fields.raw.get("num_key_value_heads")
    fields.require(
        kv_heads is None or kv_heads == config.heads,
        f"num_key_value_heads {kv_heads} differs from num_attention_heads {config.heads}",
        "MLA has one latent for all heads; make them equal.",
    )
    act = fields.text("hidden_act", "silu")
    fields.require(act == "silu", f"hidden_act {act!r} is not silu", "These families use silu.")
    fields.require(
        not fields.flag("mlp_bias", False), "mlp_bias is true", "Feed-forward biases are not part of these families."
    )


def _present_or_null(fields: Fields, name: str, remedy: str) -> int | None:
    """The published defaults of these are sizes of one large model; absent, they are rather a mistake."""
    fields.require(name in fields.raw, f"{name} is missing", remedy)
    return fields.optional_count(name)


def _expert_count(fields: Fields) -> int | None:
    return _present_or_null(fields, "n_routed_experts", "Give its number, or null for a model without experts.")


def _softmax_experts(fields: Fields, layers: int) -> MoeConfig | None:
    experts = _expert_count(fields)
    if experts is None:
        return None
    method = fields.text("topk_method", "greedy")
    known = ("greedy", "group_limited_greedy")
    fields.require(method in known, f"topk_method {method!r} is unknown for deepseek_v2", f"Known: {', '.join(known)}.")
    _score_is(fields, "softmax")
    fields.require(
        not fields.flag("norm_topk_prob", False),
        "norm_topk_prob is true for deepseek_v2",
        "Set it to false, as V2 models do.",
    )
    grouped = method != "greedy"
    return MoeConfig(
        experts=experts,
        top=fields.count("num_experts_per_tok"),
        inner=fields.count("moe_intermediate_size"),
        shared=fields.natural("n_shared_experts", 2),
        layers=frozenset(range(fields.natural("first_k_dense_replace", 0), layers)),
        groups=fields.count("n_group") if grouped else 1,
        top_groups=fields.count("topk_group") if grouped else 1,
        score="softmax",
        group_score="max",
        normalise=False,
        scale=fields.number("routed_scaling_factor", 1.0),
        corrected=False,
    )


def sigmoid_experts(
    fields: Fields, routed: frozenset[int], *, groups: int, top_groups: int, top: int, scale: float
) -> MoeConfig | None:
    """Those of DeepSeek-V3 and what follows it; None where there are none. Raises `EngineFault` (bad_config)."""
    experts = _expert_count(fields)
    if experts is None:
        return None
    method = fields.text("topk_method", "noaux_tc")
    fields.require(
        method == "noaux_tc",
        f"topk_method {method!r} is unknown for {fields.raw['model_type']}",
        "Known: noaux_tc.",
    )
    _score_is(fields, "sigmoid")
    return MoeConfig(
        experts=experts,
        top=fields.count("num_experts_per_tok", top),
        inner=fields.count("moe_intermediate_size"),
        shared=fields.natural("n_shared_experts", 1),
        layers=routed,
        groups=fields.count("n_group", groups),
        top_groups=fields.count("topk_group", top_groups),
        score="sigmoid",
        group_score="top2",
        normalise=fields.flag("norm_topk_prob", True),
        scale=fields.number("routed_scaling_factor", scale),
        corrected=True,
    )


def _score_is(fields: Fields, wanted: str) -> None:
    score = fields.text("scoring_func", wanted)
    kind = fields.raw["model_type"]
    fields.require(score == wanted, f"scoring_func {score!r} contradicts {kind}", f"It must be {wanted}.")
    fields.require(fields.raw.get("moe_layer_freq", 1) == 1, "moe_layer_freq is not 1", "Only 1 is supported.")


def _sparse_layers(fields: Fields, layers: int) -> frozenset[int]:
    kinds = fields.raw.get("mlp_layer_types")
    dense = fields.raw.get("first_k_dense_replace")
    if kinds is None:
        fields.require(
            dense in (None, 1),
            f"first_k_dense_replace is {dense!r} and there is no mlp_layer_types",
            "Give mlp_layer_types: the published code reads it alone.",
        )
        return frozenset(range(1, layers))
    return listed_sparse(fields, layers)


def listed_sparse(fields: Fields, layers: int) -> frozenset[int]:
    """The layers with experts that `mlp_layer_types` names. Raises `EngineFault` (bad_config)."""
    kinds = fields.raw.get("mlp_layer_types")
    fits = isinstance(kinds, list) and len(kinds) == layers and all(kind in ("dense", "sparse") for kind in kinds)
    fields.require(fits, f"mlp_layer_types is {kinds!r}", f'It must be a list of {layers} times "dense" or "sparse".')
    return frozenset(layer for layer, kind in enumerate(kinds or ()) if kind == "sparse")

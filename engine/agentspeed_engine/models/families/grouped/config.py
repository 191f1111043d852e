"""Configurations of models with grouped-query attention over the whole context: Llama, Qwen2, Qwen3 and Qwen3-MoE."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

from agentspeed_engine.models.fields import Fields
from agentspeed_engine.models.moe_config import MoeConfig, check_experts
from agentspeed_engine.models.rope_config import RopeConfig, Yarn, parse_rope

_MOST_LAYERS = 1024


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedConfig:
    """Every number the modules need, checked."""

    model_type: str
    vocab_size: int
    hidden: int
    layers: int
    draft_layers: int
    heads: int
    kv_heads: int
    """Heads of keys and values; each serves `heads / kv_heads` heads of queries."""
    head: int
    """Width of one head."""
    head_norm: bool
    """Queries and keys are normed head by head before they are turned."""
    inner: int
    eps: float
    context_limit: int
    rope: RopeConfig
    attention_bias: bool
    """Of queries, keys and values."""
    output_bias: bool
    """Of what attention gives back."""
    tied: bool
    moe: MoeConfig | None


def parse_llama(fields: Fields) -> GroupedConfig:
    """`llama`. Absent fields take the defaults of transformers' LlamaConfig, or are refused."""
    fields.require(not fields.flag("mlp_bias", False), "mlp_bias is true", "Feed-forward biases are not supported.")
    return _parsed(fields, head_norm=False, head=None, moe=None)


def parse_qwen2(fields: Fields) -> GroupedConfig:
    """`qwen2`. Defaults of transformers' Qwen2Config; biases are the code's own, whatever config.json says."""
    _no_windows(fields)
    return replace(_parsed(fields, head_norm=False, head=None, moe=None), attention_bias=True, output_bias=False)


def parse_qwen3(fields: Fields) -> GroupedConfig:
    """`qwen3`. Defaults of transformers' Qwen3Config."""
    _no_windows(fields)
    return _parsed(fields, head_norm=True, head=128, moe=None)


def parse_qwen3_moe(fields: Fields) -> GroupedConfig:
    """`qwen3_moe`. Defaults of transformers' Qwen3MoeConfig."""
    _no_windows(fields)
    layers = fields.count("num_hidden_layers", most=_MOST_LAYERS)
    moe = MoeConfig(
        experts=fields.count("num_experts"),
        top=fields.count("num_experts_per_tok", 8),
        inner=fields.count("moe_intermediate_size"),
        shared=0,
        layers=_sparse_layers(fields, layers),
        groups=1,
        top_groups=1,
        score="softmax",
        group_score="max",
        normalise=fields.flag("norm_topk_prob", False),
        scale=1.0,
        corrected=False,
    )
    check_experts(fields, moe, layers, "num_experts")
    return _parsed(fields, head_norm=True, head=None, moe=moe)


def _parsed(fields: Fields, *, head_norm: bool, head: int | None, moe: MoeConfig | None) -> GroupedConfig:
    """`head`: the width of a head where config.json gives none; None for hidden_size / num_attention_heads."""
    heads, hidden = fields.count("num_attention_heads"), fields.count("hidden_size")
    if head_norm:  # the default of Qwen3's published code is a number of heads, whatever the heads of queries are
        fields.require("num_key_value_heads" in fields.raw, "num_key_value_heads is missing", "Add it.")
    kv_heads = fields.optional_count("num_key_value_heads") or heads
    fields.require(
        heads % kv_heads == 0,
        f"num_key_value_heads {kv_heads} does not divide num_attention_heads {heads}",
        "Correct one of them.",
    )
    width = fields.optional_count("head_dim") or head or _even_share(fields, hidden, heads)
    fields.require(width % 2 == 0, f"head_dim {width} is odd", "RoPE turns pairs.")
    act = fields.text("hidden_act", "silu")
    fields.require(act == "silu", f"hidden_act {act!r} is not silu", "These families use silu.")
    rope = parse_rope(fields, width)
    fields.require(
        not (isinstance(rope.scaling, Yarn) and rope.scaling.mscale_all_dim),
        "mscale_all_dim is given",
        "It belongs to multi-head latent attention; leave it out.",
    )
    return GroupedConfig(
        model_type=str(fields.raw["model_type"]),
        vocab_size=fields.count("vocab_size"),
        hidden=hidden,
        layers=fields.count("num_hidden_layers", most=_MOST_LAYERS),
        draft_layers=fields.natural("num_nextn_predict_layers", 0),
        heads=heads,
        kv_heads=kv_heads,
        head=width,
        head_norm=head_norm,
        inner=fields.count("intermediate_size"),
        eps=fields.number("rms_norm_eps", 1e-6),
        context_limit=rope.reach(fields.count("max_position_embeddings")),
        rope=rope,
        attention_bias=fields.flag("attention_bias", False),
        output_bias=fields.flag("attention_bias", False),
        tied=fields.flag("tie_word_embeddings", False),
        moe=moe,
    )


def _even_share(fields: Fields, hidden: int, heads: int) -> int:
    fields.require(
        hidden % heads == 0, f"hidden_size {hidden} does not divide by num_attention_heads {heads}", "Give head_dim."
    )
    return hidden // heads


def _no_windows(fields: Fields) -> None:
    remedy = "Sliding windows cannot go back to any token and are not supported."
    fields.require(not fields.flag("use_sliding_window", False), "use_sliding_window is true", remedy)
    kinds = fields.raw.get("layer_types")
    known = kinds is None or (isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds))
    fields.require(known, f"layer_types is {kinds!r}", remedy)


def _sparse_layers(fields: Fields, layers: int) -> frozenset[int]:
    step = fields.count("decoder_sparse_step", 1)
    dense = fields.raw.get("mlp_only_layers") or []
    fits = isinstance(dense, list) and all(isinstance(layer, int) for layer in dense)
    fields.require(fits, f"mlp_only_layers is {dense!r}", "It must be a list of layer numbers.")
    return frozenset(layer for layer in range(layers) if layer not in dense and (layer + 1) % step == 0)

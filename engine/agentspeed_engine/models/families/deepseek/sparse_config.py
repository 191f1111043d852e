"""Configurations of models whose attention reads what an indexer chooses: DeepSeek-V3.2 and GLM-5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agentspeed_engine.models.families.deepseek.config import (
    MOST_LAYERS,
    DeepseekConfig,
    IndexerConfig,
    listed_sparse,
    parsed,
    sigmoid_experts,
)
from agentspeed_engine.models.fields import Fields

_LETTERS = {"F": "full", "S": "shared"}


def parse_v32(fields: Fields) -> DeepseekConfig:
    """`deepseek_v32`. Defaults of transformers' DeepseekV32Config: every layer chooses."""
    layers = fields.count("num_hidden_layers", most=MOST_LAYERS)
    moe = sigmoid_experts(fields, _routed(fields, layers), groups=8, top_groups=4, top=8, scale=2.5)
    indexer = _indexer(fields, range(layers), heads=64, interleaved=False)
    return parsed(fields, moe=moe, interleaved=True, indexer=indexer)


def parse_glm(fields: Fields) -> DeepseekConfig:
    """`glm_moe_dsa`. Defaults of transformers' GlmMoeDsaConfig: some layers may read what the one before them chose."""
    layers = fields.count("num_hidden_layers", most=MOST_LAYERS)
    moe = sigmoid_experts(fields, _routed(fields, layers), groups=1, top_groups=1, top=8, scale=2.5)
    indexer = _indexer(fields, _choosing(fields, layers), heads=32, interleaved=True)
    return parsed(fields, moe=moe, interleaved=True, eps=1e-5, indexer=indexer)


def _indexer(fields: Fields, layers: Sequence[int], *, heads: int, interleaved: bool) -> IndexerConfig:
    fields.require(
        fields.raw.get("q_lora_rank") is not None,
        "q_lora_rank is missing or null",
        "The indexer reads queries of low rank; give their rank.",
    )
    for name, wanted in (("rope_interleave", True), ("indexer_rope_interleave", interleaved)):
        fields.require(
            fields.flag(name, wanted) == wanted,
            f"{name} is {fields.raw.get(name)!r}",
            f"Models of this type have {str(wanted).lower()}.",
        )
    found = IndexerConfig(
        heads=fields.count("index_n_heads", heads),
        width=fields.count("index_head_dim", 128),
        top=fields.count("index_topk", 2048),
        interleaved=interleaved,
        layers=tuple(layers),
    )
    turned = fields.count("qk_rope_head_dim")
    fields.require(
        found.width >= turned,
        f"index_head_dim {found.width} is below qk_rope_head_dim {turned}",
        "The indexer turns so many coordinates of its heads; correct one of them.",
    )
    return found


def _routed(fields: Fields, layers: int) -> frozenset[int]:
    if fields.raw.get("mlp_layer_types") is not None:
        return listed_sparse(fields, layers)
    return frozenset(range(fields.natural("first_k_dense_replace", 3), layers))


def _choosing(fields: Fields, layers: int) -> list[int]:
    kinds: Any = fields.raw.get("indexer_types")
    name = "indexer_types"
    if kinds is None and (pattern := fields.raw.get("index_topk_pattern")) is not None:
        name = "index_topk_pattern"
        kinds = [_LETTERS.get(letter, letter) for letter in pattern] if isinstance(pattern, str) else pattern
    if kinds is None:
        every, offset = fields.natural("index_topk_freq", 1) or 1, fields.natural("index_skip_topk_offset", 2)
        kinds = ["shared" if max(layer - offset + 1, 0) % every else "full" for layer in range(layers)]
    fits = isinstance(kinds, list) and len(kinds) == layers and all(kind in ("full", "shared") for kind in kinds)
    fields.require(fits, f"{name} is {kinds!r}", f'It must be a list of {layers} times "full" or "shared".')
    fields.require(kinds[0] == "full", f"{name} begins with a shared layer", "The first layer has to choose.")
    return [layer for layer, kind in enumerate(kinds) if kind == "full"]

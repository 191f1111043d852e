"""Every tensor a checkpoint of the grouped-query families must hold, what a mesh cuts, and their cache. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from agentspeed_engine.models.decoder_shapes import decoder_shapes
from agentspeed_engine.models.families.grouped.config import GroupedConfig
from agentspeed_engine.models.kv_layout import KvLayout, KvPool
from agentspeed_engine.models.moe_config import expert_cuts
from agentspeed_engine.models.tensor_shapes import Cut, Shape
from agentspeed_engine.spmd.placement import Mesh

KEYS, VALUES = "keys", "values"
"""The two pools: a token's turned keys and its values, head after head."""

OPS = (
    "linear",
    "rms_norm",
    "add_rms_norm",
    "qkv_append",
    "gqa_rows",
    "gqa_extend",
    "route",
    "experts",
)
"""What the chain calls."""


def shapes(config: GroupedConfig) -> Iterator[tuple[str, Shape]]:
    """Names and shapes, in the order of the layers."""
    return decoder_shapes(config, lambda layer, at: _attention(config, at))


def _attention(config: GroupedConfig, at: str) -> Iterator[tuple[str, Shape]]:
    for name, heads in (("q", config.heads), ("k", config.kv_heads), ("v", config.kv_heads)):
        yield f"{at}{name}_proj.weight", (heads * config.head, config.hidden)
        if config.attention_bias:
            yield f"{at}{name}_proj.bias", (heads * config.head,)
    if config.head_norm:
        yield at + "q_norm.weight", (config.head,)
        yield at + "k_norm.weight", (config.head,)
    yield at + "o_proj.weight", (config.hidden, config.heads * config.head)
    if config.output_bias:
        yield at + "o_proj.bias", (config.hidden,)


def cuts(config: GroupedConfig, mesh: Mesh) -> list[Cut]:
    """Heads of queries and of keys, vocabulary and dense widths over tp; experts over all ranks."""
    found: list[Cut] = [
        ("num_attention_heads", config.heads, mesh.tp),
        ("num_key_value_heads", config.kv_heads, mesh.tp),
        ("vocab_size", config.vocab_size, mesh.tp),
        ("intermediate_size", config.inner, mesh.tp),
    ]
    if config.moe is not None:
        found += expert_cuts(config.moe, mesh, "num_experts")
    return found


def kv_layout(config: GroupedConfig, dtype: str, mesh: Mesh) -> KvLayout:
    """Each rank of tp keeps the keys and values of its own heads."""
    heads = config.kv_heads // mesh.tp
    pool = KvPool(name=KEYS, layers=config.layers, width=heads * config.head, dtype=dtype, heads=heads)
    return KvLayout(pools=(pool, replace(pool, name=VALUES)))


def sizes(config: GroupedConfig, mesh: Mesh) -> dict[str, int]:
    """Axes as in `agentspeed_kernels.ops`, of one rank."""
    return {"W": config.head, "rope": config.head, "G": config.kv_heads // mesh.tp, "H": config.heads // mesh.tp}

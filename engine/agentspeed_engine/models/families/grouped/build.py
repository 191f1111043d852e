"""The grouped-query families: weights to the chain of local modules of one rank."""

from __future__ import annotations

from agentspeed_engine.models.decoder import Chain, decoder
from agentspeed_engine.models.families.grouped.attention import GroupedAttention, GroupedWeights
from agentspeed_engine.models.families.grouped.config import GroupedConfig
from agentspeed_engine.models.families.grouped.shapes import KEYS, VALUES, cuts, shapes
from agentspeed_engine.models.kv_pools import KvPools
from agentspeed_engine.models.mesh import check_cuts
from agentspeed_engine.models.pieces import RankWeights
from agentspeed_engine.models.weights import WeightSource
from agentspeed_engine.spmd.placement import Rank
from agentspeed_kernels.selection import Kernels


def build(config: GroupedConfig, weights: WeightSource, pools: KvPools, rank: Rank, kernels: Kernels) -> Chain:
    """`pools` are those of `shapes.kv_layout` and belong to this rank alone.

    Raises `EngineFault` (bad_config) for a mesh that does not divide the model.
    """
    check_cuts(cuts(config, rank.mesh))
    keys, values, own = pools[KEYS], pools[VALUES], RankWeights(weights, shapes(config), rank)

    def attention(layer: int, name: str) -> GroupedAttention:
        held = _attention_weights(config, own, name + ".")
        return GroupedAttention(name, config, held, keys[layer], values[layer], rank, kernels)

    return decoder(config, own, rank, kernels, attention)


def _attention_weights(config: GroupedConfig, weights: RankWeights, at: str) -> GroupedWeights:
    bias = config.attention_bias
    return GroupedWeights(
        q=weights.matrix(at + "q_proj.weight"),
        k=weights.matrix(at + "k_proj.weight"),
        v=weights.matrix(at + "v_proj.weight"),
        q_bias=weights.tensor(at + "q_proj.bias") if bias else None,
        k_bias=weights.tensor(at + "k_proj.bias") if bias else None,
        v_bias=weights.tensor(at + "v_proj.bias") if bias else None,
        q_norm=weights.tensor(at + "q_norm.weight") if config.head_norm else None,
        k_norm=weights.tensor(at + "k_norm.weight") if config.head_norm else None,
        o=weights.matrix(at + "o_proj.weight"),
        o_bias=weights.tensor(at + "o_proj.bias") if config.output_bias else None,
    )

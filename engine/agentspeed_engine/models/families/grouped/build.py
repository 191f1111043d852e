"""The grouped-query families: weights to the chain of local modules of one rank."""

from __future__ import annotations

from agentspeed_engine.models.families.grouped.attention import GroupedAttention, GroupedWeights
from agentspeed_engine.models.families.grouped.config import GroupedConfig
from agentspeed_engine.models.families.grouped.shapes import KEYS, VALUES, cuts, shapes
from agentspeed_engine.models.kv_pools import TORCH_DTYPES, KvPools
from agentspeed_engine.models.layers import AddNorm, Embed, Head
from agentspeed_engine.models.mesh import check_cuts
from agentspeed_engine.models.moe import feed_forward
from agentspeed_engine.models.pieces import RankWeights
from agentspeed_engine.models.state import StepState
from agentspeed_engine.models.weights import WeightSource
from agentspeed_engine.spmd.lower import Module
from agentspeed_engine.spmd.placement import Rank
from agentspeed_kernels.selection import HEAD, Kernels

Chain = list[Module[StepState]]


def build(config: GroupedConfig, weights: WeightSource, pools: KvPools, rank: Rank, kernels: Kernels) -> Chain:
    """`pools` are those of `shapes.kv_layout` and belong to this rank alone.

    Raises `EngineFault` (bad_config) for a mesh that does not divide the model.
    """
    check_cuts(cuts(config, rank.mesh))
    keys, values, own = pools[KEYS], pools[VALUES], RankWeights(weights, shapes(config), rank)
    embedding = own.tensor("model.embed_tokens.weight", kernels.kept)
    head = kernels.weight(embedding if config.tied else own.tensor("lm_head.weight", kernels.kept), op=HEAD)
    chain: Chain = [Embed("embed", head if config.tied else embedding, rank, TORCH_DTYPES[kernels.dtype])]
    for layer in range(config.layers):
        at = f"model.layers.{layer}."
        held = _attention_weights(config, own, at + "self_attn.")
        attention = GroupedAttention(at + "self_attn", config, held, keys[layer], values[layer], rank, kernels)
        chain.append(_norm(config, own, at + "input_layernorm", kernels))
        chain.append(attention)
        chain.append(_norm(config, own, at + "post_attention_layernorm", kernels))
        moe = None if config.is_dense(layer) else config.moe
        chain += feed_forward(at + "mlp", config.hidden, own, moe, rank, kernels)
    chain.append(_norm(config, own, "model.norm", kernels))
    chain.append(Head("head", head, rank, kernels))
    return chain


def _norm(config: GroupedConfig, weights: RankWeights, name: str, kernels: Kernels) -> AddNorm:
    return AddNorm(name, weights.tensor(name + ".weight"), config.eps, kernels)


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

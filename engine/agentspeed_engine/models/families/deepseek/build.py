"""The MLA families: weights to the chain of local modules of one rank."""

from __future__ import annotations

import torch

from agentspeed_engine.models.decoder import Chain, decoder
from agentspeed_engine.models.families.deepseek.config import DeepseekConfig
from agentspeed_engine.models.families.deepseek.indexer import Chosen, Indexer, IndexerWeights
from agentspeed_engine.models.families.deepseek.mla import Mla, MlaWeights
from agentspeed_engine.models.families.deepseek.shapes import INDEX, LATENT, cuts, shapes
from agentspeed_engine.models.kv_pools import KvPools
from agentspeed_engine.models.mesh import check_cuts
from agentspeed_engine.models.pieces import RankWeights
from agentspeed_engine.models.weights import WeightSource
from agentspeed_engine.spmd.placement import Rank
from agentspeed_kernels.selection import Kernels


def build(config: DeepseekConfig, weights: WeightSource, pools: KvPools, rank: Rank, kernels: Kernels) -> Chain:
    """`pools` are those of `shapes.kv_layout` and belong to this rank alone.

    Raises `EngineFault` (bad_config) for a mesh that does not divide the model.
    """
    check_cuts(cuts(config, rank.mesh))
    latents, own = pools[LATENT], RankWeights(weights, shapes(config), rank)
    chosen = None if config.indexer is None else Chosen()

    def attention(layer: int, name: str) -> Mla:
        held = _mla_weights(config, own, name, kernels)
        indexer = _indexer(config, own, name, pools, layer, chosen, kernels)
        return Mla(name, config, held, latents[layer], rank, kernels, indexer, chosen)

    return decoder(config, own, rank, kernels, attention)


def _indexer(
    config: DeepseekConfig,
    weights: RankWeights,
    name: str,
    pools: KvPools,
    layer: int,
    chosen: Chosen | None,
    kernels: Kernels,
) -> Indexer | None:
    """None for a layer that reads everything, or what a layer before it chose."""
    if config.indexer is None or chosen is None or layer not in config.indexer.layers:
        return None
    at = name + ".indexer."
    wide = torch.float64 if kernels.dtype == "float64" else torch.float32
    held = IndexerWeights(
        q=weights.matrix(at + "wq_b.weight"),
        k=weights.matrix(at + "wk.weight"),
        k_gain=weights.tensor(at + "k_norm.weight"),
        k_shift=weights.tensor(at + "k_norm.bias"),
        shares=weights.tensor(at + "weights_proj.weight", wide),
    )
    pool = pools[INDEX][config.indexer.layers.index(layer)]
    return Indexer(config.indexer, config.rope.width, held, pool, chosen, kernels)


def _mla_weights(config: DeepseekConfig, weights: RankWeights, name: str, kernels: Kernels) -> MlaWeights:
    at = name + "."
    low, bias = config.q_rank is not None, config.attention_bias
    return MlaWeights(
        q_a=weights.matrix(at + "q_a_proj.weight") if low else None,
        q_a_bias=weights.tensor(at + "q_a_proj.bias") if low and bias else None,
        q_a_norm=weights.tensor(at + "q_a_layernorm.weight") if low else None,
        q=weights.matrix(at + ("q_b_proj.weight" if low else "q_proj.weight")),
        kv_a=weights.matrix(at + "kv_a_proj_with_mqa.weight"),
        kv_a_bias=weights.tensor(at + "kv_a_proj_with_mqa.bias") if bias else None,
        kv_a_norm=weights.tensor(at + "kv_a_layernorm.weight"),
        kv_b=weights.tensor(at + "kv_b_proj.weight", kernels.kept),
        o=weights.matrix(at + "o_proj.weight"),
        o_bias=weights.tensor(at + "o_proj.bias") if bias else None,
    )

"""The deepseek_v2 and deepseek_v3 families: a checkpoint to the chain of local modules of one rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.models.checkpoint import Checkpoint
from agentspeed_engine.models.config import ModelConfig, MoeConfig
from agentspeed_engine.models.layers import AddNorm, Dense, Embed, Head, piece
from agentspeed_engine.models.mla import Mla, MlaWeights
from agentspeed_engine.models.moe import FeedForward, Moe, own_experts
from agentspeed_engine.models.state import StepState
from agentspeed_engine.spmd.lower import Module
from agentspeed_engine.spmd.placement import Mesh, Rank
from agentspeed_kernels.routing import RouteRule
from agentspeed_kernels.select import Kernels

Chain = list[Module[StepState]]


def build(config: ModelConfig, weights: Checkpoint, pools: list[Tensor], rank: Rank, kernels: Kernels) -> Chain:
    """`pools[layer]` is [pages, page_tokens, latent width] and belongs to this rank alone."""
    check_mesh(config, rank.mesh)
    cut = (0, rank.tp, rank.mesh.tp)
    embedding = piece(weights.tensor("model.embed_tokens.weight"), *cut)
    head = kernels.weight(embedding if config.tied else piece(weights.tensor("lm_head.weight"), *cut))
    chain: Chain = [Embed("embed", head if config.tied else embedding, rank)]
    for layer in range(config.layers):
        at = f"model.layers.{layer}."
        chain.append(_norm(config, weights, at + "input_layernorm", kernels))
        chain.append(Mla(at + "self_attn", config, _mla_weights(config, weights, at), pools[layer], rank, kernels))
        chain.append(_norm(config, weights, at + "post_attention_layernorm", kernels))
        chain.append(_feed_forward(config, weights, layer, rank, kernels))
    chain.append(_norm(config, weights, "model.norm", kernels))
    chain.append(Head("head", head, rank, kernels))
    return chain


def check_mesh(config: ModelConfig, mesh: Mesh) -> None:
    """Every cut must be even. Raises `EngineFault("bad_config")`."""
    cuts: list[tuple[str, int, int]] = [
        ("num_attention_heads", config.heads, mesh.tp),
        ("vocab_size", config.vocab_size, mesh.tp),
        ("intermediate_size", config.inner, mesh.tp),
    ]
    if config.moe is not None:
        cuts.append(("n_routed_experts", config.moe.experts, mesh.size))
        cuts.append(("moe_intermediate_size * n_shared_experts", config.moe.inner * config.moe.shared, mesh.size))
    for name, extent, ranks in cuts:
        if extent % ranks:
            raise EngineFault(
                "bad_config",
                f"{name} {extent} does not divide by {ranks} ranks.",
                "Choose a mesh (dp, tp) that divides it.",
            )


def _norm(config: ModelConfig, weights: Checkpoint, name: str, kernels: Kernels) -> AddNorm:
    return AddNorm(name, weights.tensor(name + ".weight"), config.eps, kernels)


def _mla_weights(config: ModelConfig, weights: Checkpoint, layer_at: str) -> MlaWeights:
    at = layer_at + "self_attn."
    low, bias = config.q_rank is not None, config.attention_bias
    return MlaWeights(
        q_a=weights.tensor(at + "q_a_proj.weight") if low else None,
        q_a_bias=weights.tensor(at + "q_a_proj.bias") if low and bias else None,
        q_a_norm=weights.tensor(at + "q_a_layernorm.weight") if low else None,
        q=weights.tensor(at + ("q_b_proj.weight" if low else "q_proj.weight")),
        kv_a=weights.tensor(at + "kv_a_proj_with_mqa.weight"),
        kv_a_bias=weights.tensor(at + "kv_a_proj_with_mqa.bias") if bias else None,
        kv_a_norm=weights.tensor(at + "kv_a_layernorm.weight"),
        kv_b=weights.tensor(at + "kv_b_proj.weight"),
        o=weights.tensor(at + "o_proj.weight"),
        o_bias=weights.tensor(at + "o_proj.bias") if bias else None,
    )


def _feed_forward(
    config: ModelConfig, weights: Checkpoint, layer: int, rank: Rank, kernels: Kernels
) -> Module[StepState]:
    at = f"model.layers.{layer}.mlp"
    if config.moe is None or config.is_dense(layer):
        dense = _matrices(weights, at)
        return Dense(at, dense.gate, dense.up, dense.down, rank, kernels)
    # Scores decide which experts run, so the router keeps at least float32.
    wide = torch.float64 if kernels.dtype == "float64" else torch.float32
    bias = weights.tensor(at + ".gate.e_score_correction_bias", wide) if config.moe.score == "sigmoid" else None
    return Moe(
        at,
        weights.tensor(at + ".gate.weight", wide),
        bias,
        _rule(config.moe),
        [_matrices(weights, f"{at}.experts.{expert}") for expert in own_experts(config.moe.experts, rank)],
        _matrices(weights, at + ".shared_experts"),
        rank,
        kernels,
    )


def _matrices(weights: Checkpoint, at: str) -> FeedForward:
    def read(name: str) -> Any:
        return weights.tensor(f"{at}.{name}_proj.weight")

    return FeedForward(gate=read("gate"), up=read("up"), down=read("down"))


def _rule(moe: MoeConfig) -> RouteRule:
    return RouteRule(
        score=moe.score,
        top=moe.top,
        groups=moe.groups,
        top_groups=moe.top_groups,
        group_score=moe.group_score,
        normalise=moe.normalise,
        scale=moe.scale,
    )

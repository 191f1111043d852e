"""The chain of modules that all families have in common: embedding, layers around the attention of each, head."""

from __future__ import annotations

from collections.abc import Callable

from agentspeed_engine.models.decoder_shapes import DecoderConfig
from agentspeed_engine.models.kv_pools import TORCH_DTYPES
from agentspeed_engine.models.layers import AddNorm, Embed, Head
from agentspeed_engine.models.moe import feed_forward
from agentspeed_engine.models.moe_config import experts_of
from agentspeed_engine.models.pieces import RankWeights
from agentspeed_engine.models.state import StepState
from agentspeed_engine.spmd.lower import Module
from agentspeed_engine.spmd.placement import Rank
from agentspeed_kernels.selection import HEAD, Kernels

Chain = list[Module[StepState]]


def decoder(
    config: DecoderConfig,
    weights: RankWeights,
    rank: Rank,
    kernels: Kernels,
    attention: Callable[[int, str], Module[StepState]],
) -> Chain:
    """The modules of one rank, in order. `attention`: that of a layer, whose tensors' names begin with the text that it
    is given and a dot."""

    def norm(name: str) -> AddNorm:
        return AddNorm(name, weights.tensor(name + ".weight"), config.eps, kernels)

    embedding = weights.tensor("model.embed_tokens.weight", kernels.kept)
    head = kernels.weight(embedding if config.tied else weights.tensor("lm_head.weight", kernels.kept), op=HEAD)
    chain: Chain = [Embed("embed", head if config.tied else embedding, rank, TORCH_DTYPES[kernels.dtype])]
    for layer in range(config.layers):
        at = f"model.layers.{layer}."
        chain.append(norm(at + "input_layernorm"))
        chain.append(attention(layer, at + "self_attn"))
        chain.append(norm(at + "post_attention_layernorm"))
        chain += feed_forward(at + "mlp", config.hidden, weights, experts_of(config.moe, layer), rank, kernels)
    return [*chain, norm("model.norm"), Head("head", head, rank, kernels)]

"""Every tensor a checkpoint of these families must hold: names and shapes. Torch-free: sizing needs no weights."""

from __future__ import annotations

import math
from collections.abc import Iterator

from agentspeed_engine.models.config import ModelConfig, MoeConfig

Shape = tuple[int, ...]


def tensor_shapes(config: ModelConfig) -> dict[str, Shape]:
    return dict(_all(config))


def parameter_count(config: ModelConfig) -> int:
    return sum(math.prod(shape) for _, shape in _all(config))


def _all(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    yield "model.embed_tokens.weight", (config.vocab_size, config.hidden)
    for layer in range(config.layers):
        at = f"model.layers.{layer}."
        yield at + "input_layernorm.weight", (config.hidden,)
        yield at + "post_attention_layernorm.weight", (config.hidden,)
        yield from _attention(config, at + "self_attn.")
        if config.moe is None or config.is_dense(layer):
            yield from feed_forward(at + "mlp.", config.hidden, config.inner)
        else:
            yield from _moe(config, config.moe, at + "mlp.")
    yield "model.norm.weight", (config.hidden,)
    if not config.tied:
        yield "lm_head.weight", (config.vocab_size, config.hidden)


def _attention(config: ModelConfig, at: str) -> Iterator[tuple[str, Shape]]:
    query = config.heads * (config.nope + config.rope)
    if config.q_rank is None:
        yield at + "q_proj.weight", (query, config.hidden)
    else:
        yield at + "q_a_proj.weight", (config.q_rank, config.hidden)
        yield at + "q_a_layernorm.weight", (config.q_rank,)
        yield at + "q_b_proj.weight", (query, config.q_rank)
    yield at + "kv_a_proj_with_mqa.weight", (config.latent_width, config.hidden)
    yield at + "kv_a_layernorm.weight", (config.kv_rank,)
    yield at + "kv_b_proj.weight", (config.heads * (config.nope + config.value), config.kv_rank)
    yield at + "o_proj.weight", (config.hidden, config.heads * config.value)
    if config.attention_bias:
        if config.q_rank is not None:
            yield at + "q_a_proj.bias", (config.q_rank,)
        yield at + "kv_a_proj_with_mqa.bias", (config.latent_width,)
        yield at + "o_proj.bias", (config.hidden,)


def _moe(config: ModelConfig, moe: MoeConfig, at: str) -> Iterator[tuple[str, Shape]]:
    yield at + "gate.weight", (moe.experts, config.hidden)
    if moe.score == "sigmoid":
        yield at + "gate.e_score_correction_bias", (moe.experts,)
    for expert in range(moe.experts):
        yield from feed_forward(f"{at}experts.{expert}.", config.hidden, moe.inner)
    yield from feed_forward(at + "shared_experts.", config.hidden, moe.inner * moe.shared)


def feed_forward(at: str, hidden: int, inner: int) -> Iterator[tuple[str, Shape]]:
    yield at + "gate_proj.weight", (inner, hidden)
    yield at + "up_proj.weight", (inner, hidden)
    yield at + "down_proj.weight", (hidden, inner)

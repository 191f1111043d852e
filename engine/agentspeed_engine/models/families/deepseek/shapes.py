"""Every tensor a checkpoint of the MLA families must hold, what a mesh cuts of them, and their cache. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.models.decoder_shapes import decoder_shapes
from agentspeed_engine.models.families.deepseek.config import DeepseekConfig, IndexerConfig
from agentspeed_engine.models.kv_layout import DTYPE_BYTES, KvLayout, KvPool
from agentspeed_engine.models.moe_config import expert_cuts
from agentspeed_engine.models.tensor_shapes import Cut, Shape
from agentspeed_engine.spmd.placement import Mesh

LATENT = "latent"
"""The pool of attention: a token's compressed keys and values, then its turned key."""

INDEX = "index"
"""The second pool of sparse attention: the key by which a layer's indexer knows a token."""

_SHARED_OPS = ("linear", "heads_linear", "rms_norm", "add_rms_norm", "rope", "latent_append", "route", "experts")
OPS = (*_SHARED_OPS, "mla_rows", "mla_extend")
"""What the chain calls."""
JOINED_OPS = ("add_norm_linear", "mla_queries", "add_norm_route", "experts_and_shared")
"""What it calls beside them in steps of few rows on a GPU."""
SPARSE_OPS = (*_SHARED_OPS, "index_append", "index_select", "mla_selected")
"""What it calls where an indexer chooses: also for contexts that are short enough to be read whole."""


def shapes(config: DeepseekConfig) -> Iterator[tuple[str, Shape]]:
    """Names and shapes, in the order of the layers."""

    def attention(layer: int, at: str) -> Iterator[tuple[str, Shape]]:
        yield from _attention(config, at)
        if config.indexer is not None and layer in config.indexer.layers:
            yield from _indexer(config, config.indexer, at + "indexer.")

    return decoder_shapes(config, attention)


def _attention(config: DeepseekConfig, at: str) -> Iterator[tuple[str, Shape]]:
    query, bias = config.heads * (config.nope + config.rope.width), config.attention_bias
    if config.q_rank is None:
        yield at + "q_proj.weight", (query, config.hidden)
    else:
        yield at + "q_a_proj.weight", (config.q_rank, config.hidden)
        if bias:
            yield at + "q_a_proj.bias", (config.q_rank,)
        yield at + "q_a_layernorm.weight", (config.q_rank,)
        yield at + "q_b_proj.weight", (query, config.q_rank)
    yield at + "kv_a_proj_with_mqa.weight", (config.latent_width, config.hidden)
    if bias:
        yield at + "kv_a_proj_with_mqa.bias", (config.latent_width,)
    yield at + "kv_a_layernorm.weight", (config.kv_rank,)
    yield at + "kv_b_proj.weight", (config.heads * (config.nope + config.value), config.kv_rank)
    yield at + "o_proj.weight", (config.hidden, config.heads * config.value)
    if bias:
        yield at + "o_proj.bias", (config.hidden,)


def _indexer(config: DeepseekConfig, indexer: IndexerConfig, at: str) -> Iterator[tuple[str, Shape]]:
    yield at + "wq_b.weight", (indexer.heads * indexer.width, config.q_rank or 0)
    yield at + "wk.weight", (indexer.width, config.hidden)
    yield at + "k_norm.weight", (indexer.width,)
    yield at + "k_norm.bias", (indexer.width,)
    yield at + "weights_proj.weight", (indexer.heads, config.hidden)


def cuts(config: DeepseekConfig, mesh: Mesh) -> list[Cut]:
    """Heads, vocabulary and dense widths over tp; experts over all ranks."""
    found: list[Cut] = [
        ("num_attention_heads", config.heads, mesh.tp),
        ("vocab_size", config.vocab_size, mesh.tp),
        ("intermediate_size", config.inner, mesh.tp),
    ]
    if config.moe is not None:
        found += expert_cuts(config.moe, mesh, "n_routed_experts")
    return found


def kv_layout(config: DeepseekConfig, dtype: str, mesh: Mesh) -> KvLayout:
    """The latent is the same for all heads, so every rank of tp keeps it whole; so is an indexer's key."""
    del mesh
    if config.indexer is not None and dtype not in DTYPE_BYTES:
        raise EngineFault(
            "bad_options",
            f"kv_cache_dtype is {dtype!r}, and nothing keeps the cache of sparse attention so, from which an indexer "
            "reads keys of its own.",
            "Leave kv_cache_dtype out.",
        )
    width, turned = config.latent_width, config.rope.width
    latent = KvPool(name=LATENT, layers=config.layers, width=width, dtype=dtype, plain=turned)
    if config.indexer is None:
        return KvLayout(pools=(latent,))
    index = KvPool(name=INDEX, layers=len(config.indexer.layers), width=config.indexer.width, dtype=dtype)
    return KvLayout(pools=(latent, index))


def sizes(config: DeepseekConfig, mesh: Mesh) -> dict[str, int]:
    """Axes as in `agentspeed_kernels.ops`, of one rank."""
    return {
        "R": config.kv_rank,
        "rope": config.rope.width,
        "nope": config.nope,
        "value": config.value,
        "H": config.heads // mesh.tp,
    }

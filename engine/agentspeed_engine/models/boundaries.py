"""What every module of a chain declares at its border, and the chain of a whole model of declarations alone."""

from __future__ import annotations

from agentspeed_engine.models.family import ModelConfig
from agentspeed_engine.models.moe_config import MoeConfig, owners
from agentspeed_engine.spmd.placement import FEATURES, TOKENS, Layout, Mesh, Partial, Replicate, Shard
from agentspeed_engine.spmd.spec import (
    EVERYWHERE,
    PARTIAL_EVERYWHERE,
    TOKEN_SHARD,
    TOKEN_SHARD_PARTIAL,
    Boundary,
)


def embedding(name: str, width: int) -> Boundary:
    """The vocabulary is cut over tp."""
    return Boundary(name=name, input=TOKEN_SHARD, output=TOKEN_SHARD_PARTIAL, width=width)


def norm(name: str, width: int) -> Boundary:
    """Adds to the residual first."""
    return Boundary(name=name, input=TOKEN_SHARD, output=TOKEN_SHARD, width=width, residual=TOKEN_SHARD, sums=True)


def attention(name: str, width: int) -> Boundary:
    """Heads are cut over tp."""
    return Boundary(name=name, input=TOKEN_SHARD, output=TOKEN_SHARD_PARTIAL, width=width, cache=TOKEN_SHARD)


def dense(name: str, width: int) -> Boundary:
    """The inner width is cut over tp."""
    return Boundary(name=name, input=TOKEN_SHARD, output=TOKEN_SHARD_PARTIAL, width=width)


def experts(name: str, width: int, moe: MoeConfig, mesh: Mesh) -> tuple[Boundary, ...]:
    """One module that is given every row, or two between which rows are sent to the experts that they choose. Ranks
    of tp add up: each has experts of its own, or pieces of the same."""
    if mesh.exchange == "sum":
        return (Boundary(name=name, input=EVERYWHERE, output=PARTIAL_EVERYWHERE, width=width),)
    sent = owners(moe, mesh)
    return (
        Boundary(name=name + ".gate", input=TOKEN_SHARD, output=TOKEN_SHARD, width=width),
        Boundary(
            name=name + ".experts",
            input=Layout(dp=sent, tp=Replicate()),
            output=Layout(dp=sent, tp=Partial()),
            width=width,
        ),
    )


def head(name: str, width: int) -> Boundary:
    """The vocabulary, `width` ids, is cut over tp."""
    return Boundary(name=name, input=TOKEN_SHARD, output=Layout(dp=Shard(TOKENS), tp=Shard(FEATURES)), width=width)


def outline(config: ModelConfig, mesh: Mesh) -> list[Boundary]:
    """What the modules that a family builds declare, without building them: enough to plan and to price a mesh."""
    hidden, moe = config.hidden, config.moe
    chain = [embedding("embed", hidden)]
    for layer in range(config.layers):
        at = f"model.layers.{layer}."
        chain += [norm(at + "input_layernorm", hidden), attention(at + "self_attn", hidden)]
        chain.append(norm(at + "post_attention_layernorm", hidden))
        if moe is None or layer not in moe.layers:
            chain.append(dense(at + "mlp", hidden))
        else:
            chain += experts(at + "mlp", hidden, moe, mesh)
    return [*chain, norm("model.norm", hidden), head("head", config.vocab_size)]

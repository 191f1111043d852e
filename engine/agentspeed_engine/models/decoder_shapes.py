"""What checkpoints of all families have in common: embeddings, layers of attention and a feed-forward part, a head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from agentspeed_engine.models.moe_config import MoeConfig, expert_shapes, experts_of, feed_forward_shapes
from agentspeed_engine.models.tensor_shapes import Shape


class DecoderConfig(Protocol):
    """What of a family's configuration says how they are made."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden(self) -> int: ...
    @property
    def inner(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def moe(self) -> MoeConfig | None: ...
    @property
    def tied(self) -> bool: ...
    @property
    def eps(self) -> float: ...


def decoder_shapes(
    config: DecoderConfig, attention: Callable[[int, str], Iterator[tuple[str, Shape]]]
) -> Iterator[tuple[str, Shape]]:
    """Names and shapes, in the order of the layers. `attention`: those of a layer, whose names begin with the text that
    it is given."""
    yield "model.embed_tokens.weight", (config.vocab_size, config.hidden)
    for layer in range(config.layers):
        at = f"model.layers.{layer}."
        yield at + "input_layernorm.weight", (config.hidden,)
        yield from attention(layer, at + "self_attn.")
        yield at + "post_attention_layernorm.weight", (config.hidden,)
        moe = experts_of(config.moe, layer)
        if moe is None:
            yield from feed_forward_shapes(at + "mlp.", config.hidden, config.inner)
        else:
            yield from expert_shapes(moe, config.hidden, at + "mlp.")
    yield "model.norm.weight", (config.hidden,)
    if not config.tied:
        yield "lm_head.weight", (config.vocab_size, config.hidden)

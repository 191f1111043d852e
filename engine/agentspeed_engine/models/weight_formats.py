"""Which weights are kept in another format than that of the activations, and what a model then takes. Torch-free."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Literal

from agentspeed_engine.models.quantization import FP8_BLOCK
from agentspeed_engine.models.tensor_shapes import Shape

WeightFormat = Literal["int8", "int8-32", "fp8", "bfloat16"]
"""8 bits and a float32 scale for each output, for each 32 inputs of an output, or for each block of 128 × 128; or, for
activations in float32, the 16 bits that the checkpoint has (`kept_weights`)."""
_GROUP = 32
_BYTES = re.compile(r"(_proj|_proj_with_mqa|indexer\.wq_b|indexer\.wk)\.weight$")
_KEPT = re.compile(r"\.(kv_b_proj|indexer\.weights_proj)\.weight$")
"""Read in two orientations by attention, and what chooses tokens."""
_WIDE = re.compile(r"(\.gate|\.weights_proj)\.weight$")
"""Matrices whose scores choose experts or tokens: in float32 at least, whatever the others are in."""
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def weight_bytes(shapes: Iterable[tuple[str, Shape]], item: int, weights: WeightFormat | None) -> int:
    """Of a model with these tensors. `item`: bytes of an element of those that are not kept in `weights`."""
    held = dict(shapes)
    tied = _HEAD not in held
    return sum(tensor_bytes(name, shape, item, weights, tied=tied) for name, shape in held.items())


def tensor_bytes(name: str, shape: Shape, item: int, weights: WeightFormat | None, *, tied: bool) -> int:
    """Of one tensor. `tied`: the embedding is the head as well."""
    if weights == "bfloat16":
        return math.prod(shape) * (2 if in_sixteen_bits(name, shape) else item)
    return _bytes(shape, item, weights if _in_bytes(name, _EMBEDDING if tied else _HEAD, weights) else None)


def in_sixteen_bits(name: str, shape: Shape) -> bool:
    """Whether a tensor is among those that `bfloat16` is about: matrices that rows are multiplied with or looked up
    in."""
    return len(shape) == 2 and _WIDE.search(name) is None


def _in_bytes(name: str, head: str, weights: WeightFormat | None) -> bool:
    """A tied embedding is the head, and looked up in its bytes; who publishes fp8 leaves the head as it is."""
    if name == head:
        return weights != "fp8"
    return _BYTES.search(name) is not None and _KEPT.search(name) is None


def _bytes(shape: Shape, item: int, weights: WeightFormat | None) -> int:
    if weights is None:
        return math.prod(shape) * item
    outputs, inputs = shape
    if weights == "fp8":
        return outputs * inputs + 4 * -(-outputs // FP8_BLOCK) * -(-inputs // FP8_BLOCK)
    return outputs * (inputs + 4 * (-(-inputs // _GROUP) if weights == "int8-32" else 1))

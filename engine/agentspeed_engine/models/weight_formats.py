"""Which weights are kept in 8 bits where an engine keeps any so, and what a model then takes. Torch-free."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Literal

from agentspeed_engine.models.quantization import FP8_BLOCK
from agentspeed_engine.models.tensor_shapes import Shape

WeightFormat = Literal["int8", "int8-32", "fp8"]
"""8 bits and a float32 scale for each output, for each 32 inputs of an output, or for each block of 128 × 128."""
_GROUP = 32
_BYTES = re.compile(r"(_proj|_proj_with_mqa|indexer\.wq_b|indexer\.wk)\.weight$")
_KEPT = re.compile(r"\.(kv_b_proj|indexer\.weights_proj)\.weight$")
"""Read in two orientations by attention, and what chooses tokens."""
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def weight_bytes(shapes: Iterable[tuple[str, Shape]], item: int, weights: WeightFormat | None) -> int:
    """Of a model with these tensors. `item`: bytes of an element of those that are not kept in `weights`."""
    held = dict(shapes)
    tied = _HEAD not in held
    return sum(tensor_bytes(name, shape, item, weights, tied=tied) for name, shape in held.items())


def tensor_bytes(name: str, shape: Shape, item: int, weights: WeightFormat | None, *, tied: bool) -> int:
    """Of one tensor. `tied`: the embedding is the head as well."""
    return _bytes(shape, item, weights if _in_bytes(name, _EMBEDDING if tied else _HEAD, weights) else None)


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

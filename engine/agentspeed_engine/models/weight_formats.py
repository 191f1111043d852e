"""Which weights are kept in 8 bits where an engine keeps any so, and what a model then takes. Torch-free."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Literal

from agentspeed_engine.models.tensor_shapes import Shape

WeightFormat = Literal["int8", "int8-32"]
"""8 bits and a float32 scale for each output, or for each 32 inputs of an output."""
_GROUP = 32
_BYTES = re.compile(r"(_proj|_proj_with_mqa|lm_head|indexer\.wq_b|indexer\.wk)\.weight$")
_KEPT = re.compile(r"\.(kv_b_proj|indexer\.weights_proj)\.weight$")
"""Read in two orientations by attention, and what chooses tokens."""
_EMBEDDING = "model.embed_tokens.weight"


def weight_bytes(shapes: Iterable[tuple[str, Shape]], item: int, weights: WeightFormat | None) -> int:
    """Of a model with these tensors. `item`: bytes of an element of those that are not kept in `weights`."""
    held = dict(shapes)
    tied = "lm_head.weight" not in held
    return sum(_bytes(shape, item, weights if _in_bytes(name, tied) else None) for name, shape in held.items())


def _in_bytes(name: str, tied: bool) -> bool:
    """A tied embedding is the head, and looked up in its bytes."""
    return (name == _EMBEDDING and tied) or (_BYTES.search(name) is not None and _KEPT.search(name) is None)


def _bytes(shape: Shape, item: int, weights: WeightFormat | None) -> int:
    if weights is None:
        return math.prod(shape) * item
    outputs, inputs = shape
    return outputs * (inputs + 4 * (-(-inputs // _GROUP) if weights == "int8-32" else 1))

"""Whether a model that computes in float32 keeps its matrices in bfloat16, as its checkpoint has them.

Every number of bfloat16 is one of float32: such a model computes what it computes with matrices in float32, and reads
half of the bytes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final, Literal

from agentspeed_engine.models.kernel_refusals import kernels_chosen
from agentspeed_engine.models.quantization import stored_as
from agentspeed_engine.models.shards import shard_paths
from agentspeed_engine.models.source import Dtype, ModelSource
from agentspeed_engine.models.weight_formats import in_sixteen_bits
from agentspeed_kernels.ops import CACHE_OPS, WEIGHT_OPS
from agentspeed_kernels.platform import Platform
from agentspeed_kernels.registry import Registry, standard
from agentspeed_kernels.selection import NoKernel, Preferences, select
from agentspeed_kernels.signature import CacheFormat, KernelSpec, Need

_BFLOAT16: Final = "bfloat16"
_STORED: Final = "BF16"
"""The name of safetensors for it."""
_MOST_HEADER: Final = 100_000_000
"""Bytes of a header that the library of safetensors takes."""


def kept_weights(
    source: ModelSource,
    dtype: Dtype,
    platform: Platform,
    *,
    cache: CacheFormat | None = None,
    batch_invariant: bool = False,
) -> Literal["bfloat16"] | None:
    """bfloat16 where every matrix is stored so and no op is slower for it there; None: `dtype`. No weight is read, and
    none need be there: then config.json says how they are stored.

    Raises `EngineFault` (bad_options) for a wish in `AGENTSPEED_KERNELS` that names no choice."""
    if dtype != "float32" or platform.device != "cpu" or not _stored_so(source):
        return None
    with kernels_chosen():
        preferences = Preferences.from_environment()
    registry = standard()
    ops = source.family.ops_on("cpu", invariant=batch_invariant)
    served = (_serves(registry, op, platform, preferences, cache, invariant=batch_invariant) for op in ops)
    return _BFLOAT16 if all(served) else None


def _serves(
    registry: Registry, op: str, platform: Platform, preferences: Preferences, cache: CacheFormat | None, *,
    invariant: bool,
) -> bool:  # fmt: skip
    """Whether an op's best kernel for single rows, where weights are what a step waits for, comes in a form that takes
    them in bfloat16; a kernel that a user forced and that takes none is kept."""
    if op not in WEIGHT_OPS:
        return True

    def chosen(weights: str | None) -> KernelSpec:
        need = Need(op=op, dtype="float32", rows=1, weights=weights, cache=cache if op in CACHE_OPS else None,
                    invariant=invariant)  # fmt: skip
        return select(need, registry.candidates(op), platform, preferences).kernel

    try:
        plain, kept = chosen(None), chosen(_BFLOAT16)
    except NoKernel:
        return False
    forced = preferences.forced.get(op)
    return kept.name == forced or (plain.name != forced and kept.priority >= plain.priority)


def _stored_so(source: ModelSource) -> bool:
    if source.random or not any(source.path.glob("*.safetensors")):
        return stored_as(source.raw) == (_BFLOAT16, False)
    stored = _formats(source.path)
    names = (name for name, shape in source.family.shapes(source.config) if in_sixteen_bits(name, shape))
    return all(stored.get(source.family.prefix + name) == _STORED for name in names)


def _formats(folder: Path) -> dict[str, str]:
    """How each tensor of a folder is stored, by the headers of its files. Of a folder that is not whole nothing: the
    load says what is wrong with it."""
    found: dict[str, str] = {}
    try:
        for path in shard_paths(folder):
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size)) if size <= _MOST_HEADER else {}
            found |= {name: tensor["dtype"] for name, tensor in header.items() if name != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return found

"""Which format a model runs in when none was asked for: the faster one that keeps what the checkpoint has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agentspeed_engine.models.quantization import stored_as
from agentspeed_engine.models.source import Dtype
from agentspeed_kernels.cpu.native import AMX, AVX512BF16
from agentspeed_kernels.platform import Platform
from agentspeed_kernels.signature import CacheFormat

_HALF = frozenset({"bfloat16", "float16", "float8_e4m3fn"})
"""Formats of checkpoints that bfloat16 keeps nearly all of."""


def choose(config: Mapping[str, Any], platform: Platform, cache: CacheFormat | None = None) -> tuple[Dtype, str]:
    """(format, why). `config` is config.json as it is, `cache` what the KV cache is kept in where not in that."""
    if cache is not None and platform.device != "cpu":
        return "bfloat16", f"on {platform.device} a cache in {cache} is read by kernels that compute in it"
    stored, quantised = stored_as(config)
    if stored not in _HALF and not quantised:
        said = f"the checkpoint is {stored}" if stored else "the checkpoint does not name its format"
        return "float32", f"{said}, and bfloat16 would round it"
    if platform.device != "cpu":
        return "bfloat16", f"the checkpoint is {stored} and {platform.device} has matrix units for it"
    if AMX.feature in platform.features:
        return "bfloat16", f"the checkpoint is {stored} and the processor has AMX tiles for it"
    # Where the system refuses AMX the processor is one whose vectors multiply float32 twice as fast as bfloat16.
    if AVX512BF16.feature in platform.features and AMX.feature not in platform.absent:
        return "bfloat16", f"the checkpoint is {stored} and the processor multiplies pairs of it (AVX512-BF16)"
    why = platform.absent.get(AMX.feature) or platform.lacks.get(AMX.feature, "there are no kernels for AMX tiles")
    return "float32", f"prompts are slower in bfloat16 here: {why}"

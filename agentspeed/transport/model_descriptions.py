"""The border to the engine's catalog: what a model folder holds and what of it fits here, from its configuration."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, final

from agentspeed.transport.error_map import converted

if TYPE_CHECKING:
    from agentspeed_engine.errors import EngineFault

Dtype = Literal["bfloat16", "float32", "float64"]
DTYPES: tuple[Dtype, ...] = ("bfloat16", "float32", "float64")
WeightFormat = Literal["int8", "fp8"]
WEIGHTS: tuple[WeightFormat, ...] = ("int8", "fp8")


@final
@dataclass(frozen=True, slots=True)
class InDtype:
    """A model in one format on this machine's CPU memory, with the engine's other options as they are by default."""

    weight_bytes: int
    matrices: str
    """What matrices are kept in, where not in the format itself; else empty."""
    cache_bytes_per_token: int
    context: int
    """Tokens of the largest context that an engine gives; 0 where it does not start."""
    pool_tokens: int
    """Of all contexts together."""
    refused: str
    """Why it does not start; empty where it does."""


@final
@dataclass(frozen=True, slots=True)
class ModelDescription:
    """What a configuration says; no weight was read."""

    model_type: str
    family: str
    attention: str
    notice: str
    parameters: int
    layers: int
    vocab_size: int
    context_limit: int
    stored: str
    """How the checkpoint says its weights are stored."""
    memory_bytes: int
    memory_owner: str
    in_dtype: Mapping[str, InDtype]
    in_bytes: Mapping[str, InDtype]
    """With `weights` of these formats beside bfloat16."""
    fp8_cache: InDtype
    """With `kv_cache_dtype` fp8 beside bfloat16."""


@final
@dataclass(frozen=True, slots=True)
class FamilyLine:
    """One family that runs."""

    name: str
    model_types: tuple[str, ...]
    attention: str


def families() -> tuple[FamilyLine, ...]:
    """In the registry's order."""
    from agentspeed_engine.models.registry import FAMILIES

    return tuple(FamilyLine(family.name, family.model_types, family.attention) for family in FAMILIES)


def description(folder: Path) -> ModelDescription:
    """Raises `ModelUnsupported` and `ModelBroken` as an engine would, before any weight is read."""
    from agentspeed_engine.models.catalog import describe, read_source
    from agentspeed_engine.models.quantization import stored_as
    from agentspeed_engine.serve.memory_limit import memory_limit

    with converted():
        source, info, memory = read_source(folder), describe(folder), memory_limit()
        return ModelDescription(
            model_type=info.model_type,
            family=info.family,
            attention=source.family.attention,
            notice=info.notice,
            parameters=info.parameters,
            layers=info.layers,
            vocab_size=info.vocab_size,
            context_limit=info.context_limit,
            stored=stored_as(info.config)[0] or "a format that config.json does not name",
            memory_bytes=memory.bytes,
            memory_owner=memory.owner,
            in_dtype={dtype: _in_dtype(folder, dtype) for dtype in DTYPES},
            in_bytes={weights: _in_dtype(folder, "bfloat16", weights) for weights in WEIGHTS},
            fp8_cache=_in_dtype(folder, "bfloat16", fp8_cache=True),
        )


def _in_dtype(folder: Path, dtype: Dtype, weights: WeightFormat | None = None, *, fp8_cache: bool = False) -> InDtype:
    from agentspeed_engine.errors import EngineFault
    from agentspeed_engine.models.catalog import describe
    from agentspeed_engine.serve.options import EngineOptions
    from agentspeed_engine.serve.sizing import sizes

    options = EngineOptions(model=str(folder), dtype=dtype)
    cache: Literal["fp8"] | None = "fp8" if fp8_cache else None
    kept = weights or _kept(folder, dtype)
    try:
        info = describe(folder, dtype=dtype, page_tokens=options.page_tokens, weights=kept, cache=cache)
    except EngineFault as fault:
        if cache is None:
            raise
        return replace(_in_dtype(folder, dtype, weights), context=0, pool_tokens=0, refused=_said(fault))
    held = None if kept is None else info.weight_bytes
    try:
        pages, context = sizes(options, info.context_limit, info.bytes_per_page, info.parameters, weight_bytes=held)
        refused = ""
    except EngineFault as fault:
        pages, context, refused = 0, 0, _said(fault)
    return InDtype(
        weight_bytes=info.weight_bytes,
        matrices=kept or "",
        cache_bytes_per_token=info.kv.bytes_per_token,
        context=context,
        pool_tokens=pages * options.page_tokens,
        refused=refused,
    )


def _kept(folder: Path, dtype: Dtype) -> Literal["bfloat16"] | None:
    """As an engine on this machine's CPU keeps matrices that it is asked nothing about; without PyTorch none runs."""
    if importlib.util.find_spec("torch") is None:
        return None
    from agentspeed_engine.models.catalog import read_source
    from agentspeed_engine.models.kept_weights import kept_weights
    from agentspeed_kernels.platform import detect

    return kept_weights(read_source(folder), dtype, detect())


def _said(fault: EngineFault) -> str:
    return f"{fault.message} {fault.remedy}"

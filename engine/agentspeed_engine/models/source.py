"""What a model's folder says of it, checked before a weight is read. Importing it loads no tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.models.config import parse_as
from agentspeed_engine.models.family import Family, ModelConfig
from agentspeed_engine.models.fields import read_json
from agentspeed_engine.models.kv_layout import DTYPE_BYTES, KvLayout
from agentspeed_engine.models.quantization import declared_scheme
from agentspeed_engine.models.registry import family_of
from agentspeed_engine.models.weight_formats import WeightFormat, weight_bytes
from agentspeed_engine.spmd.placement import Mesh
from agentspeed_kernels.signature import CacheFormat

Dtype = Literal["float32", "float64", "bfloat16"]
RANDOM = "random:"
"""`random:CONFIG` is a model of that config.json (or of the folder that has it) with weights by chance."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """A model's configuration, checked, and where its weights come from."""

    path: Path
    """A model folder, or the config.json of a random one."""
    random: bool
    family: Family[Any]
    config: ModelConfig
    eos_ids: tuple[int, ...]
    raw: Mapping[str, Any]
    """config.json as it is."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What the rest of the engine may know of a model."""

    model_type: str
    family: str
    """As its makers write it."""
    notice: str
    """What of the model does not run, as a sentence; mostly empty."""
    vocab_size: int
    context_limit: int
    eos_ids: tuple[int, ...]
    layers: int
    kv: KvLayout
    bytes_per_page: int
    """Of the cache, all pools and layers."""
    parameters: int
    weight_bytes: int
    config: Mapping[str, Any]
    """config.json as it is."""


def describe(
    path: str | Path,
    *,
    dtype: Dtype = "float32",
    page_tokens: int = 64,
    weights: WeightFormat | None = None,
    cache: CacheFormat | None = None,
) -> ModelInfo:
    """Reads and checks the configuration only. `weights` and `cache`: None keeps them in `dtype`. Raises `EngineFault`
    for whatever the configuration has wrong, and bad_options for a cache that the family does not keep so."""
    return info_of(read_source(path), dtype, page_tokens, weights, cache)


def read_source(path: str | Path) -> ModelSource:
    """Of a model folder, or of `random:CONFIG`. Raises `EngineFault`."""
    text = str(path)
    random = text.startswith(RANDOM)
    place = Path(text.removeprefix(RANDOM)) if random else Path(path)
    if random and place.is_file():
        raw, generation, folder = read_json(place), None, None
    elif place.is_dir():
        raw, folder = read_json(place / "config.json"), place
        extra = place / "generation_config.json"
        generation = read_json(extra) if extra.exists() else None
    else:
        raise EngineFault("bad_config", f"{place} is not a folder.", "Give the path of a Hugging Face model folder.")
    family = family_of(raw)
    if not random:  # whose weights are not read, so it does not matter how they would be stored
        _ = declared_scheme(raw, folder)
    config, ends = parse_as(family, raw, generation)
    return ModelSource(path=place, random=random, family=family, config=config, eos_ids=ends, raw=raw)


def info_of(
    source: ModelSource,
    dtype: Dtype,
    page_tokens: int,
    weights: WeightFormat | None = None,
    cache: CacheFormat | None = None,
) -> ModelInfo:
    """As `describe`."""
    if dtype not in DTYPE_BYTES:
        raise EngineFault("bad_options", f"dtype {dtype!r} is unknown.", f"Known: {', '.join(DTYPE_BYTES)}.")
    family, config = source.family, source.config
    kv = family.kv_layout(config, cache or dtype, Mesh())
    parameters = sum(math.prod(shape) for _, shape in family.shapes(config))
    return ModelInfo(
        model_type=config.model_type,
        family=family.name,
        notice=family.notice,
        vocab_size=config.vocab_size,
        context_limit=config.context_limit,
        eos_ids=source.eos_ids,
        layers=config.layers,
        kv=kv,
        bytes_per_page=kv.bytes_per_page(page_tokens),
        parameters=parameters,
        weight_bytes=weight_bytes(family.shapes(config), DTYPE_BYTES[dtype], weights),
        config=source.raw,
    )

"""The way into `models`: what a folder holds (`describe`, torch-free) and a model that runs (`load`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, final

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.models.config import ModelConfig, parse, read_json
from agentspeed_engine.models.shapes import parameter_count

if TYPE_CHECKING:
    from agentspeed_engine.models.loaded import LoadedModel

Dtype = Literal["float32", "float64", "bfloat16"]
DTYPE_BYTES: dict[str, int] = {"float32": 4, "float64": 8, "bfloat16": 2}


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What the rest of the engine may know of a model."""

    model_type: str
    vocab_size: int
    context_limit: int
    eos_ids: tuple[int, ...]
    layers: int
    bytes_per_page: int
    """Of the latent cache, all layers."""
    weight_bytes: int
    config: Mapping[str, Any]
    """config.json as it is."""


def describe(path: str | Path, *, dtype: Dtype = "float32", page_tokens: int = 64) -> ModelInfo:
    """Reads and checks the configuration only."""
    return _info(*read_config(Path(path)), dtype, page_tokens)


def load(
    path: str | Path, *, dtype: Dtype = "float32", pages: int, page_tokens: int = 64, threads: int | None = None
) -> LoadedModel:
    """Weights and an empty pool of `pages` pages. Raises `EngineFault` for whatever the folder has wrong."""
    from agentspeed_engine.models.loaded import LoadedModel

    if pages < 1 or page_tokens < 1:
        raise EngineFault("bad_options", f"a pool of {pages} pages of {page_tokens} tokens is empty.",
                          "Make it larger.")
    config, raw = read_config(Path(path))
    info = _info(config, raw, dtype, page_tokens)
    return LoadedModel(Path(path), config, info, dtype=dtype, pages=pages, page_tokens=page_tokens, threads=threads)


def read_config(folder: Path) -> tuple[ModelConfig, dict[str, Any]]:
    if not folder.is_dir():
        raise EngineFault("bad_config", f"{folder} is not a folder.", "Give the path of a Hugging Face model folder.")
    raw = read_json(folder / "config.json")
    extra = folder / "generation_config.json"
    return parse(raw, read_json(extra) if extra.exists() else None), raw


def _info(config: ModelConfig, raw: dict[str, Any], dtype: Dtype, page_tokens: int) -> ModelInfo:
    if dtype not in DTYPE_BYTES:
        raise EngineFault("bad_options", f"dtype {dtype!r} is unknown.", f"Known: {', '.join(DTYPE_BYTES)}.")
    item = DTYPE_BYTES[dtype]
    return ModelInfo(
        model_type=config.model_type,
        vocab_size=config.vocab_size,
        context_limit=config.context_limit,
        eos_ids=config.eos_ids,
        layers=config.layers,
        bytes_per_page=config.layers * page_tokens * config.latent_width * item,
        weight_bytes=parameter_count(config) * item,
        config=raw,
    )

"""The way into `models`: what a folder holds (`describe`, torch-free) and a model that runs (`load`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.models.source import RANDOM, Dtype, describe, info_of, read_source
from agentspeed_engine.models.weight_formats import WeightFormat
from agentspeed_engine.spmd.placement import ONE, Rank
from agentspeed_kernels.signature import CacheFormat

if TYPE_CHECKING:
    from agentspeed_engine.models.loaded import LoadedModel
    from agentspeed_engine.spmd.lower import Comm

__all__ = ["RANDOM", "Dtype", "describe", "load", "read_source"]


def load(
    path: str | Path,
    *,
    dtype: Dtype = "float32",
    pages: int,
    page_tokens: int = 64,
    threads: int | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    weights: WeightFormat | None = None,
    cache: CacheFormat | None = None,
    rank: Rank = ONE,
    comm: Comm | None = None,
    recordable: bool = True,
    agree: Callable[[bool], bool] | None = None,
    whole_logits: bool = False,
    batch_invariant: bool = False,
    progress: Callable[[float], None] | None = None,
) -> LoadedModel:
    """Weights and an empty pool of `pages` pages, in the memory of `device`; of one rank with the collectives `comm`,
    where there are several (`LoadedModel` says what else is for those). `weights` and `cache`: None keeps them in
    `dtype`. `batch_invariant`: logits of a row have the same bits in any step. `progress` is told what part of the
    files was read. Raises `EngineFault` for whatever the folder has wrong, bad_options where an op has no kernel for
    that, and out_of_memory where a GPU has no room."""
    if pages < 1 or page_tokens < 1:
        raise EngineFault(
            "bad_options", f"a pool of {pages} pages of {page_tokens} tokens is empty.", "Make it larger."
        )
    source = read_source(path)
    kv = source.family.kv_layout(source.config, cache or dtype, rank.mesh)
    whole = info_of(source, dtype, page_tokens, weights, cache)
    info = replace(whole, kv=kv, bytes_per_page=kv.bytes_per_page(page_tokens))
    from agentspeed_engine.models.loaded import LoadedModel, out_of_memory

    with out_of_memory(f"{source.path.name} and a pool of {pages} pages"):
        return LoadedModel(
            source,
            info,
            dtype=dtype,
            pages=pages,
            page_tokens=page_tokens,
            threads=threads,
            device=device,
            weights=weights,
            cache=cache,
            rank=rank,
            comm=comm,
            recordable=recordable,
            agree=agree,
            whole_logits=whole_logits,
            batch_invariant=batch_invariant,
            progress=progress,
        )

"""What `agentspeed kernels` prints: the kernel that runs each op of a model, and why the others do not."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from agentspeed import errors
from agentspeed.cli.engine_flags import CacheWord, DtypeWord, WeightsWord
from agentspeed.engine import NANO
from agentspeed.transport.hub import resolve
from agentspeed.transport.kernel_choices import chosen_kernels

if TYPE_CHECKING:
    from agentspeed.transport.kernel_choices import KernelBand, KernelChoices


def described(
    model: str | None,
    *,
    revision: str | None,
    explain: Sequence[str],
    platform: str | None,
    dtype: DtypeWord | None,
    weights: WeightsWord | None,
    kv_cache_dtype: CacheWord | None,
    batch_invariant: bool,
    as_json: bool,
) -> str:
    """Text for people, or one JSON object. Raises what `chosen_kernels` raises, and `InvalidRequest` for a wrong
    option."""
    file = None if model is None or revision is not None else Path(model)
    place = file if file is not None and file.is_file() else resolve(model or NANO, revision, weights=False)
    found = chosen_kernels(
        place,
        platform=platform,
        dtype=dtype or "auto",
        weights=None if weights == "dtype" else weights,
        cache=None if kv_cache_dtype == "dtype" else kv_cache_dtype,
        batch_invariant=batch_invariant,
    )
    unknown = [op for op in explain if op not in found.ops and op != "all"]
    if unknown:
        raise errors.InvalidRequest(
            f"This model has no op {unknown[0]!r}.", remedy=f"Its ops are {', '.join(found.ops)}, or `all`."
        )
    return json.dumps(dataclasses.asdict(found)) if as_json else text(found, explain)


def text(found: KernelChoices, explain: Sequence[str]) -> str:
    """One line a band of rows; the reasons stand below the ops that are explained."""
    weights = f", matrices in {found.weights}" if found.weights else ""
    weights += f", cache in {found.cache}" if found.cache else ""
    why = f" ({found.dtype_reason})" if found.dtype_reason else ""
    lines = [
        f"{found.model_type}, {found.attention}, on {found.platform}",
        f"dtype     {found.dtype}{why}{weights}; weights lie in {found.layout}",
        f"features  {', '.join(found.features) or 'none'}",
        *(f"  lacks   {name}: {reason}" for name, reason in found.missing.items()),
        "",
        f"{'op':16}{'rows':16}kernel",
    ]
    for op, bands in found.ops.items():
        lines += _bands(op, bands, op in explain or "all" in explain)
    if not explain:
        lines += ["", "Why the others do not run: --explain OP, or --explain all."]
    return "\n".join(lines)


def _bands(op: str, bands: Sequence[KernelBand], explained: bool) -> Iterator[str]:
    shown, below = op, 0
    for band in _joined(bands):
        rows = "any" if not below and band.most_rows is None else f"above {below}"
        if band.most_rows is not None:
            rows = f"up to {band.most_rows}"
            below = band.most_rows
        package = "" if band.origin == "agentspeed" else f" of {band.origin}"
        yield f"{shown:16}{rows:16}{band.kernel}{package}"
        shown = ""
        if explained:
            yield from (f"{'':32}not {name}: {why}" for name, why in band.rejected)


def _joined(bands: Sequence[KernelBand]) -> list[KernelBand]:
    """Neighbours that one kernel runs are one band; the reasons are those of the last."""
    kept: list[KernelBand] = []
    for band in bands:
        if kept and kept[-1].kernel == band.kernel:
            kept.pop()
        kept.append(band)
    return kept

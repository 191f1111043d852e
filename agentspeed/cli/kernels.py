"""What `agentspeed kernels` prints: the kernel that runs each op of a model, and why the others do not."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from agentspeed import errors
from agentspeed.engine import NANO
from agentspeed.transport.hub import resolve
from agentspeed.transport.kernel_choices import chosen_kernels

if TYPE_CHECKING:
    from agentspeed.transport.kernel_choices import KernelBand, KernelChoices

_DTYPES = ("auto", "float32", "bfloat16", "float64")
_WEIGHTS = ("int8", "int8-32", "fp8")
_CACHES = ("fp8",)


def described(
    model: str | None,
    *,
    explain: Sequence[str],
    platform: str | None,
    dtype: str,
    weights: str | None,
    kv_cache_dtype: str | None,
    batch_invariant: bool,
    as_json: bool,
) -> str:
    """Text for people, or one JSON object. Raises what `chosen_kernels` raises, and `InvalidRequest` for a wrong
    option."""
    for what, value, known in (
        ("dtype", dtype, _DTYPES),
        ("weights", weights or _WEIGHTS[0], _WEIGHTS),
        ("kv_cache_dtype", kv_cache_dtype or _CACHES[0], _CACHES),
    ):
        if value not in known:
            raise errors.InvalidRequest(f"{what} {value!r} is unknown.", remedy=f"Known: {', '.join(known)}.")
    place = NANO if model is None else Path(model) if Path(model).is_file() else resolve(model)
    found = chosen_kernels(
        place,
        platform=platform,
        dtype=cast(Any, dtype),
        weights=cast(Any, weights),
        cache=cast(Any, kv_cache_dtype),
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

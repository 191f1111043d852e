"""Which kernels would run a model on a platform, and why each other one would not: the choice without the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

from agentspeed_engine.models.kept_weights import kept_weights
from agentspeed_engine.models.kernel_refusals import kernels_chosen
from agentspeed_engine.models.precision import choose
from agentspeed_engine.models.source import Dtype, ModelSource
from agentspeed_engine.models.weight_formats import WeightFormat
from agentspeed_engine.spmd.placement import Mesh
from agentspeed_kernels.ops import CACHE_OPS
from agentspeed_kernels.platform import Platform, detect, named
from agentspeed_kernels.registry import standard
from agentspeed_kernels.selection import Choice, Kernels, Preferences
from agentspeed_kernels.signature import CacheFormat
from agentspeed_kernels.testing import conformance


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class KernelBand:
    """What runs an op for some numbers of rows."""

    most_rows: int | None
    """None: for any number above the band before."""
    kernel: str
    origin: str
    """`agentspeed`, or the package that offers it."""
    rejected: tuple[tuple[str, str], ...]
    """(another kernel, why it does not run)"""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class KernelChoices:
    """Of one model on one platform."""

    model_type: str
    attention: str
    dtype: str
    dtype_reason: str
    """Why, where nobody named it."""
    weights: str | None
    cache: str | None
    platform: str
    features: tuple[str, ...]
    missing: dict[str, str]
    """Features that are not here, with the reason."""
    layout: str
    """Of the weights in `dtype`."""
    ops: dict[str, tuple[KernelBand, ...]]


def kernel_choices(
    source: ModelSource,
    *,
    platform: str | None,
    dtype: Literal["auto"] | Dtype,
    weights: WeightFormat | None,
    cache: CacheFormat | None = None,
    page_tokens: int = 64,
    batch_invariant: bool = False,
) -> KernelChoices:
    """`weights`: None for what an engine keeps. `platform`: None for where an engine would run on this machine's CPU,
    else what `platform.named` takes.

    Raises `EngineFault` (bad_options) for a platform nobody knows or that is not here, for an op without a kernel, and
    for a wish in `AGENTSPEED_KERNELS` that names none.
    """
    family = source.family
    if cache is not None:
        _ = family.kv_layout(source.config, cache, Mesh())
    with kernels_chosen(batch_invariant=batch_invariant):
        place = detect() if platform is None else named(platform)
        chosen, why = choose(source.raw, place, cache) if dtype == "auto" else (dtype, "")
        weights = weights or kept_weights(source, chosen, place, cache=cache, batch_invariant=batch_invariant)
        preferences = Preferences.from_environment()
        ops = family.ops_on(place.device, joins=preferences.joins and not batch_invariant, invariant=batch_invariant)
        kernels = Kernels(
            standard(),
            place,
            chosen,
            ops,
            sizes={"page_tokens": page_tokens, **family.sizes(source.config, Mesh())},
            preferences=preferences,
            # A kernel from outside can be run where it would run, and nowhere else.
            check=conformance.objection if platform is None else None,
            weights=weights,
            cache=cache,
            invariant=batch_invariant,
            optional=CACHE_OPS.intersection(family.joined_ops),
        )
    return KernelChoices(
        model_type=source.config.model_type,
        attention=family.attention,
        dtype=chosen,
        dtype_reason=why,
        weights=weights,
        cache=cache,
        platform=_said(place),
        features=tuple(sorted(place.features)),
        missing=dict(sorted((place.lacks | place.absent).items())),
        layout=kernels.layout,
        ops={op: tuple(_band(most, choice) for most, choice in kernels[op].choices()) for op in ops if kernels.has(op)},
    )


def _band(most: int | None, choice: Choice) -> KernelBand:
    return KernelBand(
        most_rows=most,
        kernel=choice.kernel.name,
        origin=choice.kernel.origin,
        rejected=tuple((spec.name, why) for spec, why in choice.rejected),
    )


def _said(platform: Platform) -> str:
    return f"{platform.device} ({platform.model or platform.arch})"

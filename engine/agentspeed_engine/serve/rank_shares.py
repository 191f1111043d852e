"""What each rank gets of a model, and which numbers of ranks divide it: refused before a weight is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, final

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.models.kv_layout import DTYPE_BYTES
from agentspeed_engine.models.source import ModelInfo, read_source
from agentspeed_engine.models.tensor_shapes import Cut
from agentspeed_engine.models.weight_formats import WeightFormat, weight_bytes
from agentspeed_engine.spmd.experts import ExpertSpread
from agentspeed_engine.spmd.placement import Mesh
from agentspeed_engine.wording import counted

MOST_RANKS = 64
"""Of one engine."""


class RankWishes(Protocol):
    """What of the engine's options says how a model is cut."""

    @property
    def model(self) -> str: ...
    @property
    def dtype(self) -> Literal["auto", "float32", "float64", "bfloat16"]: ...
    @property
    def weights(self) -> Literal["dtype", "int8", "int8-32", "fp8"]: ...
    @property
    def kv_cache_dtype(self) -> Literal["dtype", "fp8"]: ...
    @property
    def device(self) -> Literal["auto", "cpu", "cuda"]: ...
    @property
    def page_tokens(self) -> int: ...
    @property
    def tp(self) -> int: ...
    @property
    def dp(self) -> int: ...
    @property
    def ep(self) -> int | None: ...


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """What counts against one memory: that of the machine, which has all ranks, or that of each rank's own GPU."""

    bytes_per_page: int
    parameters: int
    weight_bytes: int | None
    """Of weights that are not all in the options' dtype; None where they are."""
    said: str
    """For whoever starts the engine; empty for one rank."""
    lock_step: bool
    """Dp ranks take their steps together, because they share experts."""


def mesh_of(options: RankWishes) -> Mesh:
    """The ranks, and the groups of them that have experts of their own."""
    return Mesh(dp=options.dp, tp=options.tp, experts=ExpertSpread(groups=options.ep))


def shares_of(options: RankWishes, info: ModelInfo, weights: WeightFormat | None = None) -> Shares:
    """`options` say device and dtype; `weights`: what matrices are kept in, None: that dtype. Raises `EngineFault`
    (bad_options) for ranks that do not divide the model."""
    if options.tp == options.dp == 1 and options.ep in (None, 1):
        return Shares(
            bytes_per_page=info.bytes_per_page,
            parameters=info.parameters,
            weight_bytes=None if weights is None else info.weight_bytes,
            said="",
            lock_step=False,
        )
    source = read_source(options.model)
    moe = source.config.moe
    if options.ep is not None and moe is None:
        raise EngineFault("bad_options", f"ep is {options.ep}, and this model has no experts.", "Leave ep out.")
    check_ranks(options, lambda mesh: source.family.cuts(source.config, mesh))
    ranks = options.tp * options.dp
    here = 1 if options.device == "cuda" else ranks
    # Imported late, as torch is.
    from agentspeed_engine.models.pieces import held_shapes

    assert options.dtype != "auto"
    mesh, item = mesh_of(options), DTYPE_BYTES[options.dtype]
    held = list(held_shapes(source.family.shapes(source.config), mesh.rank(0), 0 if moe is None else moe.experts))
    each = weight_bytes(held, item, weights)
    kept = options.dtype if options.kv_cache_dtype == "dtype" else options.kv_cache_dtype
    page = source.family.kv_layout(source.config, kept, mesh).bytes_per_page(options.page_tokens)
    return Shares(
        bytes_per_page=page * here,
        parameters=sum(math.prod(shape) for _, shape in held) * here,
        weight_bytes=None if weights is None else each * here,
        said=f", on {ranks} ranks of {each / 1e6:.0f} MB of weights each",
        lock_step=options.dp > 1 and moe is not None and bool(moe.layers),
    )


def check_ranks(options: RankWishes, cuts: Callable[[Mesh], Sequence[Cut]]) -> None:
    """`cuts`: what a mesh must divide. Raises `EngineFault` (bad_options)."""
    ranks = options.dp * options.tp
    if ranks > MOST_RANKS:
        raise EngineFault(
            "bad_options", f"dp is {options.dp} and tp {options.tp}.", f"Give {MOST_RANKS} ranks at most in all."
        )
    ep = options.ep or 1
    if ranks % ep:
        fitting = [str(number) for number in range(1, ranks + 1) if ranks % number == 0]
        raise EngineFault(
            "bad_options",
            f"ep is {ep}, and {counted(ranks, 'rank')} (dp times tp) cannot make so many equal groups.",
            f"Give ep as one of {', '.join(fitting)}, or leave it out: then every rank has experts of its own.",
        )
    uneven = next((cut for cut in cuts(mesh_of(options)) if cut[1] % cut[2]), None)
    if uneven is None:
        return
    meshes = (
        Mesh(dp=options.dp, tp=tp, experts=ExpertSpread(groups=options.ep))
        for tp in range(1, MOST_RANKS // options.dp + 1)
        if options.dp * tp % ep == 0
    )
    fitting = [str(mesh.tp) for mesh in meshes if all(extent % ranks == 0 for _, extent, ranks in cuts(mesh))]
    named = f"tp is {options.tp}" if options.dp == 1 else f"dp is {options.dp} and tp {options.tp}"
    raise EngineFault(
        "bad_options",
        f"{named}, and {uneven[0]} {uneven[1]} does not divide by {uneven[2]} ranks.",
        f"This model can be cut over {', '.join(fitting)} ranks." if fitting else "Choose another ep or dp.",
    )

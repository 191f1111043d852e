"""What each rank gets of a model, and which numbers of ranks divide it: refused before a weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, final

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.models.kv_layout import DTYPE_BYTES
from agentspeed_engine.models.source import ModelInfo, read_source
from agentspeed_engine.spmd.placement import Mesh

_MOST_RANKS = 64


class RankWishes(Protocol):
    """What of the engine's options says how a model is cut."""

    @property
    def model(self) -> str: ...
    @property
    def dtype(self) -> Literal["auto", "float32", "float64", "bfloat16"]: ...
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
    said: str
    """For whoever starts the engine; empty for one rank."""


def shares_of(options: RankWishes, info: ModelInfo) -> Shares:
    """`options` say device and dtype. Raises `EngineFault` (bad_options) for ranks that do not divide the model."""
    if options.tp == options.dp == 1 and options.ep in (None, 1):
        return Shares(bytes_per_page=info.bytes_per_page, parameters=info.parameters, said="")
    source = read_source(options.model)
    check_ranks(options, [(name, extent) for name, extent, _ in source.family.cuts(source.config, Mesh(tp=2))])
    # Imported late: it builds the model, without memory.
    from agentspeed_engine.models.planning import plan_model

    assert options.dtype != "auto"
    planned = plan_model(source, Mesh(tp=options.tp), dtype=options.dtype, rows=1, page_tokens=options.page_tokens)
    here = 1 if options.device == "cuda" else options.tp
    parameters = planned.weight_bytes // DTYPE_BYTES[options.dtype]
    page = planned.cache_bytes_per_token * options.page_tokens
    return Shares(
        bytes_per_page=page * here,
        parameters=parameters * here,
        said=f", on {options.tp} ranks of {planned.weight_bytes / 1e6:.0f} MB of weights each",
    )


def check_ranks(options: RankWishes, cuts: Sequence[tuple[str, int]]) -> None:
    """`cuts`: what is cut over tp, and its extent. Raises `EngineFault` (bad_options)."""
    if options.dp > 1:
        raise EngineFault(
            "bad_options",
            f"dp is {options.dp}; an engine has one scheduler, and ranks with sessions of their own need one each.",
            "Give tp alone, or start several engines.",
        )
    if options.ep not in (None, options.tp):
        raise EngineFault(
            "bad_options",
            f"ep is {options.ep} with tp {options.tp}; experts are spread over all tp ranks, and nothing else runs.",
            f"Leave ep out, or give ep={options.tp}.",
        )
    uneven = next(((name, extent) for name, extent in cuts if extent % options.tp), None)
    if uneven is None:
        return
    fitting = [str(tp) for tp in range(1, _MOST_RANKS + 1) if all(extent % tp == 0 for _, extent in cuts)]
    raise EngineFault(
        "bad_options",
        f"tp is {options.tp}, which does not divide {uneven[0]} {uneven[1]}.",
        f"This model can be cut over {', '.join(fitting)} ranks." if len(fitting) > 1 else "This model cannot be cut.",
    )

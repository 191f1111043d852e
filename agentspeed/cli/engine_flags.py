"""The options by which commands are told what engine to start: the same words wherever one is started."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeAlias, cast

import typer

from agentspeed import errors
from agentspeed._core.engine_options import EngineOptions, checked_engine_options

DtypeWord: TypeAlias = Literal["auto", "float32", "float64", "bfloat16"]
WeightsWord: TypeAlias = Literal["dtype", "int8", "int8-32", "fp8"]
CacheWord: TypeAlias = Literal["dtype", "fp8"]

Revision = Annotated[str | None, typer.Option(help="Of a repository: a branch, a tag or a commit.")]
Pages = Annotated[int | None, typer.Option(min=1, help="Pages of the KV pool.")]
Dtype = Annotated[DtypeWord | None, typer.Option(help="Of weights, activations and cache; nothing: auto.")]
Weights = Annotated[
    WeightsWord | None,
    typer.Option(help="Of the matrices alone: 8 bits (on a GPU fp8), or dtype, as nothing is."),
]
KvCacheDtype = Annotated[CacheWord | None, typer.Option(help="Of the KV cache alone: 8 bits, or dtype, as nothing is.")]
BatchInvariant = Annotated[
    bool, typer.Option("--batch-invariant", help="Equal bits whatever else is in a step; slower.")
]
Context = Annotated[int | None, typer.Option(min=1, help="Context limit in tokens.")]
HostSlots = Annotated[int | None, typer.Option(min=0, help="Pages of host memory for paused sessions.")]
Tp = Annotated[int, typer.Option("--tp", min=1, help="Processes that the model is cut over.")]
Dp = Annotated[int, typer.Option("--dp", min=1, help="Schedulers with a pool and `--tp` processes each.")]
Ep = Annotated[int | None, typer.Option("--ep", min=1, help="Groups of processes that have experts of their own.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="NAME=VALUE, any engine option; may be given several times.")
]
_UNSAID: Final[Mapping[str, object]] = {"batch_invariant": False, "tp": 1, "dp": 1}
"""What says no more than nothing does, where that is not None: so an engine elsewhere is asked for nothing."""


def engine_options_of(settings: Sequence[str] | None, **named: Any) -> EngineOptions:
    """The engine options that were said, of both kinds. `settings`: NAME=VALUE, the value as JSON or as a text. Raises
    `InvalidRequest`."""
    found = {name: value for name, value in named.items() if value is not None and value != _UNSAID.get(name)}
    for setting in settings or ():
        name, equals, text = setting.partition("=")
        if not equals:
            raise errors.InvalidRequest(
                f"--set {setting} has no value.", remedy="Write NAME=VALUE; `agentspeed env` lists the names."
            )
        try:
            found[name] = json.loads(text)
        except ValueError:
            found[name] = text
    return cast("EngineOptions", checked_engine_options(found))


def at_revision(model: str | None, revision: str | None) -> str | Path | None:
    """The model as a session takes it; of a revision its folder, fetched first. Raises what `resolve` raises."""
    if revision is None:
        return model
    # Imported late, as what a command does is: `agentspeed top` has no use for it.
    from agentspeed._core.model_files import NANO
    from agentspeed.transport.hub import resolve

    return resolve(NANO if model is None else model, revision)


def ranks_said(options: EngineOptions) -> str:
    """ " on 4 ranks", where there are several."""
    ranks = options.get("tp", 1) * options.get("dp", 1)
    return f" on {ranks} ranks" if ranks > 1 else ""

"""How the commands are told over how many processes an engine computes."""

from __future__ import annotations

from typing import Annotated

import typer

from agentspeed._core.engine_options import EngineOptions

Tp = Annotated[int, typer.Option("--tp", min=1, help="Processes that the model is cut over.")]
Dp = Annotated[int, typer.Option("--dp", min=1, help="Schedulers with a pool and `--tp` processes each.")]
Ep = Annotated[int | None, typer.Option("--ep", min=1, help="Groups of processes that have experts of their own.")]


def cut(tp: int, dp: int, ep: int | None) -> EngineOptions:
    """The engine options for them; none for one process."""
    found = EngineOptions()
    if tp > 1:
        found["tp"] = tp
    if dp > 1:
        found["dp"] = dp
    if ep is not None:
        found["ep"] = ep
    return found


def said(tp: int, dp: int) -> str:
    """ " on 4 ranks", where there are several."""
    return f" on {tp * dp} ranks" if tp * dp > 1 else ""

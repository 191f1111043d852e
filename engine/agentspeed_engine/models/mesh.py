"""Whether a mesh cuts evenly: what a family asks when it builds one rank's modules."""

from __future__ import annotations

from collections.abc import Sequence

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.models.tensor_shapes import Cut


def check_cuts(cuts: Sequence[Cut]) -> None:
    """Every cut must be even. Raises `EngineFault` (bad_config)."""
    for name, extent, ranks in cuts:
        if extent % ranks:
            raise EngineFault(
                "bad_config",
                f"{name} {extent} does not divide by {ranks} ranks.",
                "Choose a mesh (dp, tp) that divides it.",
            )

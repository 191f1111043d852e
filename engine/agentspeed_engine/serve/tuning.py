"""What glibc and OpenMP read once, at the start of a process: the settings under which a step is fast."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

SWITCH: Final = "AGENTSPEED_MALLOC"
"""Environment variable: set to anything, an engine runs with the environment exactly as it is."""
MALLOC: Final = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 36),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
"""glibc then keeps large freed tensors, instead of giving their pages back and faulting them in again at every step."""
_SPINS: Final = {"GOMP_SPINCOUNT": "1000"}
"""OpenMP's threads spin at every barrier, 300,000 times unless told otherwise. Where another process uses a core, that
is time the awaited thread does not get: beside one busy process on two cores a token of the shipped model took 10.9 ms,
and takes 4.3 with this; where nothing else runs it takes 4.6 instead of 2.9 (docs/performance.md)."""


def tuned(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` with the settings; just as it is where it has `SWITCH`. What it says already stays; where it has
    OMP_WAIT_POLICY somebody has chosen how threads wait, and GOMP_SPINCOUNT, which would override that, is left
    out."""
    if SWITCH in environment:
        return dict(environment)
    spins = {} if "OMP_WAIT_POLICY" in environment else _SPINS
    return {**MALLOC, **spins, **environment}

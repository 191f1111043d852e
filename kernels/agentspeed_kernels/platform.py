"""What this machine offers, found once and handed to selection as a plain value."""

from __future__ import annotations

import platform as host
from dataclasses import dataclass, field
from typing import final

from agentspeed_kernels.signature import Device


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Platform:
    device: Device
    arch: str
    features: frozenset[str]
    absent: dict[str, str] = field(default_factory=dict)
    """Why a feature that could be here is not: worth a warning, since something can be done about it."""
    lacks: dict[str, str] = field(default_factory=dict)
    """Why a feature cannot be here: what the processor does not have."""


def detect() -> Platform:
    """The CPU of this process. Builds the native kernels if a compiler is found; that takes seconds once a machine."""
    from agentspeed_kernels.cpu import native

    library = native.library()
    if isinstance(library, native.Unavailable):
        return Platform(
            device="cpu",
            arch=host.machine(),
            features=frozenset(),
            absent={native.FEATURE: library.reason},
            lacks={form.feature: library.reason for form in native.forms_here()},
        )
    return Platform(
        device="cpu",
        arch=host.machine(),
        features=frozenset({native.FEATURE, *(form.feature for form in library.forms)}),
        absent=library.refused,
        lacks=library.lacks,
    )

"""What a branch is opened with, at first and again after an engine's death."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """How a branch is opened, at first and after an engine's death."""

    label: str
    """The session's id, for who watches the engine."""
    tenant: str
    private: bool
    seed: int
    close_timeout: float

    def of_child(self, number: int) -> Opening:
        """A child that must be opened anew draws other tokens than its siblings."""
        return Opening(
            label=self.label,
            tenant=self.tenant,
            private=self.private,
            close_timeout=self.close_timeout,
            seed=zlib.crc32(f"{self.seed}.{number}".encode()),
        )

"""Builds the C kernels once a machine and opens them, or says why it cannot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

FEATURE = "native-c"


@final
@dataclass(frozen=True, slots=True)
class Unavailable:
    reason: str


def library() -> Unavailable:
    return Unavailable("no C kernel exists yet")

"""Stand-ins for token ids and names, keyed with what is never written down."""

from __future__ import annotations

import os
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

_PADS: Final = 4
_FIRST_POSITIONS: Final = 4096


@final
class Opaque:
    """A fresh random permutation of all 32-bit numbers for every position, so that a token that occurs twice shows only
    where two logs have it at the same position: the core needs no more. The keys end with the process."""

    clear = False

    def __init__(self) -> None:
        self._key = os.urandom(32)
        self._pads = _fresh_pads(_FIRST_POSITIONS)

    def ids(self, packed: bytes, start: int) -> bytes:
        ids = np.frombuffer(packed, dtype="<u4")
        self._reach(start + len(ids))
        return _mixed(ids, self._pads[:, start : start + len(ids)]).tobytes()

    def drawn(self, ids: Sequence[int], positions: Sequence[int]) -> bytes:
        if not ids:
            return b""
        self._reach(max(positions) + 1)
        return _mixed(np.array(ids, dtype="<u4"), self._pads[:, positions]).tobytes()

    def name(self, text: str) -> str:
        return text and blake2b(text.encode(), key=self._key, digest_size=6).hexdigest()

    def _reach(self, positions: int) -> None:
        have = self._pads.shape[1]
        if positions > have:
            more = _fresh_pads(max(have, positions - have))
            self._pads = np.concatenate([self._pads, more], axis=1)


def _fresh_pads(positions: int) -> NDArray[np.uint32]:
    pads = np.frombuffer(os.urandom(4 * _PADS * positions), dtype="<u4").reshape(_PADS, positions).copy()
    pads[2:] |= np.uint32(1)  # multipliers: odd, so that no two ids fall together
    return pads


def _mixed(ids: NDArray[Any], pads: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Invertible at every position: xor, multiply, fold, twice."""
    mixed: NDArray[np.uint32] = (ids ^ pads[0]) * pads[2]
    mixed ^= mixed >> np.uint32(16)
    mixed = (mixed + pads[1]) * pads[3]
    mixed ^= mixed >> np.uint32(15)
    return mixed

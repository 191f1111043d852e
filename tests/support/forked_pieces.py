"""What attention reads of a step of forks: a trunk of four pages that all share, and a tail for each."""

from __future__ import annotations

import numpy as np

from agentspeed_kernels.testing import conformance


def fork(branches: int, new: int) -> tuple[list[conformance.Piece], np.ndarray]:
    """Branches with `new` tokens each below one trunk, and tails of their own lengths."""
    rows = np.arange(branches * new, dtype=np.int32)
    trunk = conformance.piece(np.array([7, 3, 1, 30], np.int32), 0, 64, rows, False)
    pieces, positions = [trunk], []
    for i in range(branches):
        own = new + 5 * i
        pages = np.array([8 + 3 * i, 9 + 3 * i, 10 + 3 * i], np.int32)
        pieces.append(conformance.piece(pages, 64, own, rows[i * new : (i + 1) * new], True))
        positions += range(64 + own - new, 64 + own)
    return pieces, np.array(positions, np.int64)

"""How large the memory is that ranks share. Without torch: whoever starts them makes it before anything is loaded."""

from __future__ import annotations

SLOT_BYTES = 1 << 20
"""What a rank hands over at once; larger values go in pieces."""
_LINE = 64


def shared_bytes(ranks: int) -> int:
    """Of a file of zeros for a group: a line of its own and one for each rank, then two slots for each."""
    return _LINE + ranks * (_LINE + 2 * SLOT_BYTES)

"""Token ids as the protocol carries them: little-endian unsigned 32-bit numbers, whatever the machine's order."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence

assert array("I").itemsize == 4, "this platform's unsigned int is not 32 bits wide"


def pack_ids(ids: Sequence[int]) -> bytes:
    """`ids` as NumPy's `<u4`: four bytes each, the lowest byte first. Raises `OverflowError` for a number below 0 or
    from 2**32 on."""
    packed = array("I", ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def pack_id(number: int) -> bytes:
    """`pack_ids` of one, as a drawn token needs it. Raises `OverflowError` likewise."""
    return number.to_bytes(4, "little")


def unpack_ids(data: bytes) -> array[int]:
    """The inverse of `pack_ids`. Raises `ValueError` when `data` is not a whole number of ids."""
    ids = array("I")
    ids.frombytes(data)
    if sys.byteorder == "big":
        ids.byteswap()
    return ids

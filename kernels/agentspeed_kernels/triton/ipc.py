"""Memory of a GPU in another process: CUDA's handles of it, by the driver's own library."""

from __future__ import annotations

import ctypes
from typing import Any, Final

from torch import Tensor

_HANDLE_BYTES: Final = 64
OFFER_BYTES: Final = _HANDLE_BYTES + 8
"""A handle, and how far into its memory the tensor begins."""
_LAZY_PEER_ACCESS: Final = 1
"""Of cuda.h: the GPU that has the memory is reached when it is first needed."""


class NoAccess(Exception):
    """A GPU does not let others into its memory."""


class _Handle(ctypes.Structure):
    _fields_ = (("data", ctypes.c_ubyte * _HANDLE_BYTES),)


def offered(held: Tensor) -> bytes:
    """What another process needs to reach a tensor on this process's GPU, as long as this process lives. Raises
    `NoAccess`."""
    handle, base, size = _Handle(), ctypes.c_uint64(), ctypes.c_size_t()
    driver = _driver()
    at = ctypes.c_uint64(held.data_ptr())
    _checked(driver.cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(size), at), "where it begins")
    _checked(driver.cuIpcGetMemHandle(ctypes.byref(handle), base), "a handle of it")
    return bytes(handle.data) + (held.data_ptr() - base.value).to_bytes(8, "little")


def opened(offer: bytes) -> int:
    """Where the tensor begins that another process offered, for kernels of the calling thread's GPU; until this process
    ends. Raises `NoAccess`."""
    handle, base = _Handle.from_buffer_copy(offer[:_HANDLE_BYTES]), ctypes.c_uint64()
    _checked(_driver().cuIpcOpenMemHandle_v2(ctypes.byref(base), handle, ctypes.c_uint(_LAZY_PEER_ACCESS)), "a way in")
    return base.value + int.from_bytes(offer[_HANDLE_BYTES:OFFER_BYTES], "little")


def _driver() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise NoAccess(str(error)) from error


def _checked(status: int, what: str) -> None:
    if status:
        raise NoAccess(f"the driver gives memory of a GPU, but not {what}: error {status}")

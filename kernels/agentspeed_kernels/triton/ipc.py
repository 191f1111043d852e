"""Memory of a GPU in another process: CUDA's handles of it, by the driver's own library."""

from __future__ import annotations

import ctypes
from typing import Any, Final, final

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
    cuda = driver()
    at = ctypes.c_uint64(held.data_ptr())
    _checked(cuda.cuMemGetAddressRange_v2(ctypes.pointer(base), ctypes.pointer(size), at), "where it begins")
    _checked(cuda.cuIpcGetMemHandle(ctypes.pointer(handle), base), "a handle of it")
    return bytes(handle.data) + (held.data_ptr() - base.value).to_bytes(8, "little")


@final
class MappedMemory:
    """Memory of another process, for kernels of the GPU that was the calling thread's when it was opened."""

    def __init__(self, offer: bytes) -> None:
        """Raises `NoAccess`."""
        handle, base, context = _Handle.from_buffer_copy(offer[:_HANDLE_BYTES]), ctypes.c_uint64(), ctypes.c_void_p()
        cuda = driver()
        _checked(cuda.cuCtxGetCurrent(ctypes.pointer(context)), "which GPU it is for")
        lazily = ctypes.c_uint(_LAZY_PEER_ACCESS)
        _checked(cuda.cuIpcOpenMemHandle_v2(ctypes.pointer(base), handle, lazily), "a way in")
        self._base, self._context = base, context
        self.at = base.value + int.from_bytes(offer[_HANDLE_BYTES:OFFER_BYTES], "little")
        """Where the tensor begins that was offered."""

    def close(self) -> None:
        """Nothing may use it any more. From any thread; raises `NoAccess`."""
        cuda = driver()
        _checked(cuda.cuCtxPushCurrent_v2(self._context), "the GPU that it was opened for")
        try:
            _checked(cuda.cuIpcCloseMemHandle(self._base), "its end")
        finally:
            cuda.cuCtxPopCurrent_v2(ctypes.pointer(ctypes.c_void_p()))


def driver() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise NoAccess(str(error)) from error


def _checked(status: int, what: str) -> None:
    if status:
        raise NoAccess(f"the driver gives memory of a GPU, but not {what}: error {status}")

"""Where device code is fetched from: by name and when it is first launched, so that importing the host side is light.

Its types are the compiler's: what comes back is `Any`.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any, final


@cache
def device_code(name: str) -> Any:
    """The kernels of `device.NAME`, to be launched."""
    return _Launched(device_module(name))


def device_module(name: str) -> Any:
    """The module `device.NAME` itself, to be compiled."""
    return importlib.import_module(f"agentspeed_kernels.triton.device.{name}")


@final
class _Launched:
    """A module whose kernels are under direct launches."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        from agentspeed_kernels.triton.direct import direct

        held = direct(getattr(self._module, name))
        setattr(self, name, held)
        return held

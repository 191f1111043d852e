"""Where device code is fetched from: by name and when it is first launched, so that importing the host side is light.

Its types are the compiler's: what comes back is `Any`.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any


@cache
def device_code(name: str) -> Any:
    """The module `device.NAME`."""
    return importlib.import_module(f"agentspeed_kernels.triton.device.{name}")

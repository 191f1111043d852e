"""What `agentspeed env` prints: enough to reproduce a report, nothing secret."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys

import agentspeed
from agentspeed.backends.local import engine_defaults
from agentspeed.backends.watching import registry_folder
from agentspeed.engine import NANO

_PACKAGES = ("torch", "numpy", "tokenizers", "safetensors", "llguidance", "anyio", "msgspec", "pydantic")


def describe(model: str | None) -> str:
    """Plain text, one fact a line."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    lines = [
        f"agentspeed   {agentspeed.__version__}",
        f"python       {platform.python_version()} ({platform.system()} {platform.machine()})",
        f"machine      {os.cpu_count()} cores, {memory:.0f} GiB",
        f"model        {model or f'the shipped one ({NANO.name})'}",
        f"attached to  {os.environ.get('AGENTSPEED_ENGINE', 'nothing: engines are started when needed')}",
        f"listed in    {registry_folder()}", "", "packages",
    ]
    lines += [f"  {name:12} {_version(name)}" for name in _PACKAGES]
    lines += ["", "engine options and their defaults"]
    lines += [f"  {name:18} {value}" for name, value in engine_defaults().items()]
    return "\n".join(lines)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return f"not installed ({sys.executable})"

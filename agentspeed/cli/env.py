"""What `agentspeed env` prints: enough to reproduce a report, nothing secret; a wrong model is refused."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
from pathlib import Path

import agentspeed
from agentspeed._base.wording import counted
from agentspeed.engine import NANO
from agentspeed.transport.hub import resolve
from agentspeed.transport.shared_engines import engine_defaults, engine_model
from agentspeed.transport.stats_client import registry_folder

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_PACKAGES = ("torch", "numpy", "tokenizers", "safetensors", "llguidance", "anyio", "msgspec", "pydantic")


def describe(model: str | None) -> str:
    """Plain text, one fact a line. Raises what a session on this model would raise, as far as its configuration and
    tokenizer tell; weights are not read, and nothing is downloaded."""
    defaults = engine_defaults()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    lines = [
        f"agentspeed   {agentspeed.__version__}",
        f"python       {platform.python_version()} ({platform.system()} {platform.machine()})",
        f"machine      {counted(os.cpu_count() or 1, 'core')}, {memory:.0f} GiB",
        f"model        {_model(model)}",
        f"attached to  {os.environ.get('AGENTSPEED_ENGINE', 'nothing: engines are started when needed')}",
        f"listed in    {registry_folder()}",
        "",
        "packages",
    ]
    lines += [f"  {name:12} {_version(name)}" for name in _PACKAGES]
    lines += ["", "engine options and their defaults"]
    lines += [f"  {name:18} {value}" for name, value in defaults.items()]
    return "\n".join(lines)


def _model(model: str | None) -> str:
    if model is not None and not Path(model).expanduser().is_dir() and _REPOSITORY.fullmatch(model):
        return f"{model}, a repository; the first session fetches it"
    from agentspeed.chat.codec import ChatCodec

    folder = NANO if model is None else resolve(model)
    _ = ChatCodec(folder)
    name = f"the shipped one ({NANO.name})" if model is None else model
    return f"{name}: {engine_model(folder)}"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return f"not installed ({sys.executable})"

"""Builds the C kernels once a machine and opens them, or says why it cannot.

The library goes to the user's cache folder under a name that hashes the sources, the compiler, its flags and the CPU's
features, so a change of any of them builds anew and nothing stale is ever opened.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, final

import torch

log = logging.getLogger("agentspeed.kernels")

FEATURE = "native-c"
SWITCH = "AGENTSPEED_NATIVE"
"""Set to 0, the C kernels are neither built nor used."""
BUILD_TIMEOUT_SECONDS = 120
FLAGS = (
    "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math",
    "-fopenmp", "-fPIC", "-shared", "-fvisibility=hidden", "-Wno-psabi",
)  # fmt: skip

P, L, N, F = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "linear": (P, L, P, P, P, L, L, L, L, N),
    "heads_linear": (P, L, L, P, P, L, L, L, L, L, L, N),
    "experts": (P, P, P, P, P, P, P, P, P, L, L, L, L, L, N),
    "rms_norm": (P, L, P, F, P, L, L, L, N),
    "add_rms_norm": (P, P, P, F, P, L, L, N),
    "rope": (P, L, L, P, P, L, L, L, N),
    "latent_append": (P, L, P, F, P, P, P, P, L, L, L, N),
    "route": (P, P, P, P, P, P, P, L, L, L, L, L, L, N, N, N, F),
    "soften": (P, P, F, P, P, L, L, L, N),
    "merge": (P, P, P, P, P, P, P, L, L, L, N),
    "normalise": (P, P, P, P, L, L, L, N),
    "mla_rows": (P, L, L, P, L, L, L, L, L, P, P, P, P, P, P, P, L, P, P, P, F, P, L, P, P, N),
}


@final
@dataclass(frozen=True, slots=True)
class Unavailable:
    reason: str


@final
class Library:
    """The C functions by name: an op, or a step of one."""

    __slots__ = ("functions", "path")

    def __init__(self, path: Path) -> None:
        # torch is imported already and brings its libgomp under the same name, so both share one pool of threads. With
        # two pools each would wait for the other's cores.
        assert torch.__version__
        opened = ctypes.CDLL(str(path))
        self.path = path
        self.functions: dict[str, Any] = {}
        for op, arguments in ARGUMENTS.items():
            function = getattr(opened, f"agentspeed_{op}")
            function.argtypes, function.restype = arguments, None
            self.functions[op] = function


@cache
def library() -> Library | Unavailable:
    """The built library of this machine; the answer is kept for the life of the process."""
    if os.environ.get(SWITCH) == "0":
        return Unavailable(f"switched off by {SWITCH}=0")
    compiler = _compiler()
    if compiler is None:
        return Unavailable("no C compiler found (tried $CC, gcc, clang, cc)")
    try:
        return Library(_built(compiler))
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        return Unavailable(f"building with {compiler} failed: {_said(error)}")


def _compiler() -> str | None:
    named = (os.environ.get("CC"), "gcc", "clang", "cc")
    return next((found for name in named if name and (found := shutil.which(name))), None)


def _built(compiler: str) -> Path:
    folder = Path(__file__).parent
    sources = sorted(folder.glob("native_*.[ch]"))
    target = _cache_folder() / f"kernels-{_key(compiler, sources)}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / target.name
        files = [str(source) for source in sources if source.suffix == ".c"]
        subprocess.run(
            [compiler, *FLAGS, *files, "-lm", "-o", str(made)],
            check=True,
            capture_output=True,
            text=True,
            timeout=BUILD_TIMEOUT_SECONDS,
        )
        # Processes that build at the same time each rename a complete file over the other's equal one.
        made.replace(target)
    log.info("built the native kernels: %s", target)
    return target


def _key(compiler: str, sources: list[Path]) -> str:
    digest = hashlib.sha256()
    for source in sources:
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True, timeout=30).stdout
    digest.update("\0".join((compiler, version, *FLAGS, _cpu_features())).encode())
    return digest.hexdigest()[:20]


def _cpu_features() -> str:
    """What `-march=native` looks at."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return "unknown"
    lines = info.read_text().splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "unknown")


def _cache_folder() -> Path:
    """Raises `OSError` for a user without a home, who named no folder."""
    if root := os.environ.get("XDG_CACHE_HOME"):
        return Path(root) / "agentspeed"
    try:
        return Path.home() / ".cache" / "agentspeed"
    except RuntimeError as error:
        raise OSError(f"{error} Set XDG_CACHE_HOME to a folder of yours.") from error


def _said(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        return str(error.stderr).strip()[-500:]
    return str(error)

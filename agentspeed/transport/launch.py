"""How an engine process is started: by which interpreter, with which modules in reach, in which environment."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from agentspeed import errors

PYTHON: Final = "AGENTSPEED_PYTHON"
"""Environment variable: the interpreter that runs engines, where this process is not an ordinary `python`."""


def command() -> list[str]:
    """The engine's command without its options. `-P`: Python does not put the working folder before its own modules,
    so a file there is never run because it is called like one. Raises `EngineStartFailed` where no interpreter is
    known."""
    return [interpreter(), "-P", "-m", "agentspeed_engine.serve"]


def interpreter() -> str:
    """The interpreter that finds the same packages as this process. One that is embedded in another program, or frozen
    into one, has no `sys.executable` or names that program, which must not be started again."""
    if chosen := os.environ.get(PYTHON):
        return chosen
    found = next(_interpreters(), None)
    if found is None:
        raise errors.EngineStartFailed(
            f"This program is no Python interpreter (sys.executable is {sys.executable!r}) and none was found in "
            f"{sys.exec_prefix}, so no engine process can be started.",
            remedy=f"Set {PYTHON} to a python with the same packages, or AGENTSPEED_ENGINE to a running engine.",
        )
    return found


def _interpreters() -> Iterator[str]:
    running = Path(sys.executable or "")
    if not getattr(sys, "frozen", False) and running.name.startswith(("python", "pypy")) and _runs(running):
        yield str(running)
    for name in (f"python{sys.version_info.major}.{sys.version_info.minor}", "python3", "python"):
        path = Path(sys.exec_prefix) / "bin" / name
        if _runs(path):
            yield str(path)


def _runs(path: Path) -> bool:
    return path.is_file() and os.access(path, os.X_OK)


def environment() -> dict[str, str]:
    """Of the engine: this process's own, tuned, and with a PYTHONPATH where the engine would not be found without
    it."""
    # Late: `import agentspeed` needs the protocol alone.
    from agentspeed_engine.serve.import_path import with_import_path
    from agentspeed_engine.serve.tuning import tuned

    return with_import_path(tuned(os.environ))

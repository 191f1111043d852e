"""Finds and starts the benchmarks of a checkout."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_FOLDER = Path(__file__).resolve().parents[2] / "bench"
_STARTS = 'if __name__ == "__main__":'
"""Not in a module that only serves others."""


def names() -> list[str]:
    """Scripts of `bench/` that can be started, without ending; none in an installed wheel."""
    return sorted(path.stem for path in _FOLDER.glob("*.py") if _STARTS in path.read_text(encoding="utf-8"))


def start(name: str, options: list[str]) -> int:
    """Runs it in this terminal; its exit status."""
    return subprocess.run([sys.executable, str(_FOLDER / f"{name}.py"), *options], check=False).returncode

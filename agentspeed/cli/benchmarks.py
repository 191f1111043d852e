"""Finds and starts the benchmarks of a checkout."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_FOLDER = Path(__file__).resolve().parents[2] / "bench"


def names() -> list[str]:
    """Scripts of `bench/`, without ending; none in an installed wheel."""
    return sorted(path.stem for path in _FOLDER.glob("*.py") if not path.stem.startswith("_"))


def start(name: str, options: list[str]) -> int:
    """Runs it in this terminal; its exit status."""
    return subprocess.run([sys.executable, str(_FOLDER / f"{name}.py"), *options], check=False).returncode

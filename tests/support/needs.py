"""What a test needs and may not find: skipped on a developer's machine, an error where everything must be checked."""

from __future__ import annotations

import importlib
import os
from typing import Any, NoReturn

import pytest


def missing(why: str) -> NoReturn:
    """Skips the test, or the module that is being imported. An error under CI and in `make check`, which has a variable
    of its own: with CI set, hypothesis would repeat the same examples at every run."""
    if os.environ.get("CI") or os.environ.get("AGENTSPEED_CHECK"):
        raise AssertionError(f"nothing may be skipped here: {why}")
    pytest.skip(why, allow_module_level=True)


def needed(module: str, why: str) -> Any:
    """The module; `missing` without it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing(f"{why}; {error.name} is not installed: install agentspeed[dev]")

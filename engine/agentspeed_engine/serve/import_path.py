"""The environment in which another Python finds the engine's packages as this one does."""

from __future__ import annotations

import importlib.util
import os
import site
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

_PACKAGES: Final = ("agentspeed_engine", "agentspeed_kernels")


def with_import_path(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` with a PYTHONPATH where the engine would not be found without it.

    Folders that an interpreter searches by itself are not named there: on PYTHONPATH they would come before Python's
    own modules, and whatever is installed under the name of one would hide it."""
    given = environment.get("PYTHONPATH", "")
    paths = [path for path in given.split(os.pathsep) if path]  # an empty entry means the working folder
    searched = {Path(path).resolve() for path in _searched()}
    for folder in _package_folders():
        if folder.resolve() not in searched:
            paths.append(str(folder))
    said = {name: value for name, value in environment.items() if name != "PYTHONPATH"}
    if paths:
        said["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    return said


def _searched() -> list[str]:
    own = [*site.getsitepackages()]
    if site.ENABLE_USER_SITE:
        own.append(site.getusersitepackages())
    return own


def _package_folders() -> Iterator[Path]:
    for name in _PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            yield Path(next(iter(spec.submodule_search_locations))).resolve().parent

"""Which files of a model folder hold its weights. Torch-free: fetching a model needs it first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.models.fields import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def shard_names(index: Mapping[str, Any], where: str) -> list[str]:
    """The files an index names, each once. Raises `EngineFault` (bad_weights) for names that leave the folder."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise EngineFault("bad_weights", f"{where} has no weight_map.", "Download the checkpoint again.")
    names: Iterable[object] = weight_map.values()
    for name in names:
        path = PurePosixPath(name) if isinstance(name, str) else None
        if path is None or path.is_absolute() or ".." in path.parts or path.suffix != ".safetensors":
            raise EngineFault(
                "bad_weights",
                f"{where} names {name!r}, which is no safetensors file inside the model folder.",
                "Take the index that was published with the weights.",
            )
    return sorted({str(name) for name in names})


def shard_paths(folder: Path) -> list[Path]:
    """Of a model folder; they need not exist. Raises `EngineFault` for an index that cannot be used."""
    if (folder / INDEX).exists():
        return [folder / name for name in shard_names(read_json(folder / INDEX), str(folder / INDEX))]
    return [folder / SINGLE]

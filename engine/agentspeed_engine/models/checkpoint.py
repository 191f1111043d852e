"""Safetensors shards as one checked mapping of names to tensors; what is absent, cut short or misshapen is refused."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.models.config import ModelConfig, read_json
from agentspeed_engine.models.shapes import Shape, tensor_shapes

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FP8_BLOCK = 128
_SCALE = "_scale_inv"
_HARMLESS = re.compile(r"rotary_emb\.inv_freq$")
"""Tables that older checkpoints carry and every loader recomputes."""
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")
_DOWNLOAD = "Download the checkpoint again."


@final
class Checkpoint:
    """The weights of one folder. Tensors are read when asked for and given in the compute dtype."""

    __slots__ = ("_drafts", "_dtype", "_files", "_shapes", "_shards")

    def __init__(self, folder: Path, config: ModelConfig, dtype: torch.dtype) -> None:
        """Opens every shard and checks every name and shape. Raises `EngineFault("bad_weights")`."""
        self._dtype = dtype
        self._shapes = tensor_shapes(config)
        self._shards = {path: _open(path) for path in _shard_paths(folder)}
        self._files: dict[str, Any] = {}
        for shard in self._shards.values():
            self._files |= dict.fromkeys(shard.keys(), shard)
        self._drafts = range(config.layers, config.layers + config.draft_layers)
        self._check_names(folder)
        for name, shape in self._shapes.items():
            self._check_shape(name, shape)

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor, contiguous; fp8 blocks are multiplied by their scales."""
        held = self._read(name)
        if held.dtype == torch.float8_e4m3fn:
            held = _unblock(held, self._read(name + _SCALE))
        return held.to(dtype or self._dtype).contiguous()

    def _read(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def _check_names(self, folder: Path) -> None:
        missing = [name for name in self._shapes if name not in self._files]
        if missing:
            raise EngineFault("bad_weights", f"{folder} lacks {len(missing)} tensors, first {missing[0]}.", _DOWNLOAD)
        unknown = [name for name in self._files if not self._explained(name)]
        if unknown:
            raise EngineFault(
                "bad_weights",
                f"{folder} holds {len(unknown)} tensors that config.json does not explain, first {unknown[0]}.",
                "The configuration belongs to another checkpoint; use the one that came with these weights.",
            )

    def _explained(self, name: str) -> bool:
        """Layers for drafting follow the model's own: DeepSeek-V3 has 61 and says `num_nextn_predict_layers` 1, so its
        layer 61 is known and left unread. Without that word a further layer is one that `num_hidden_layers` denies."""
        if name in self._shapes or _HARMLESS.search(name):
            return True
        layer = _LAYER.match(name)
        if layer is not None and int(layer.group(1)) in self._drafts:
            return True
        if name.endswith(_SCALE):
            return name.removesuffix(_SCALE) in self._shapes
        return name == "lm_head.weight"

    def _check_shape(self, name: str, wanted: Shape) -> None:
        held = self._files[name].get_slice(name)
        shape = tuple(held.get_shape())
        if shape != wanted:
            raise EngineFault(
                "bad_weights",
                f"{name} has shape {shape}, config.json says {wanted}.",
                "The configuration belongs to another checkpoint; use the one that came with these weights.",
            )
        if held.get_dtype() == "F8_E4M3":
            self._check_scales(name, shape)

    def _check_scales(self, name: str, shape: Shape) -> None:
        scales = name + _SCALE
        if scales not in self._files:
            raise EngineFault("bad_weights", f"{name} is fp8 but {scales} is missing.", _DOWNLOAD)
        blocks = tuple(-(-extent // FP8_BLOCK) for extent in shape)
        held = tuple(self._files[scales].get_slice(scales).get_shape())
        if held != blocks:
            raise EngineFault(
                "bad_weights", f"{scales} has shape {held}, blocks of {FP8_BLOCK} need {blocks}.", _DOWNLOAD
            )


def _unblock(weight: Tensor, scales: Tensor) -> Tensor:
    rows, columns = weight.shape
    wide = scales.float().repeat_interleave(FP8_BLOCK, 0)[:rows].repeat_interleave(FP8_BLOCK, 1)[:, :columns]
    return weight.float() * wide


def _shard_paths(folder: Path) -> list[Path]:
    if (folder / INDEX).exists():
        return [folder / name for name in _indexed(read_json(folder / INDEX).get("weight_map"), folder)]
    return [folder / SINGLE]


def _indexed(weight_map: object, folder: Path) -> Iterable[str]:
    if not isinstance(weight_map, dict) or not weight_map:
        raise EngineFault("bad_weights", f"{folder / INDEX} has no weight_map.", _DOWNLOAD)
    return sorted({str(name) for name in weight_map.values()})


def _open(path: Path) -> Any:
    if not path.exists():
        raise EngineFault("bad_weights", f"{path} does not exist.", "Weights must be safetensors; download all shards.")
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise EngineFault("bad_weights", f"{path} is damaged or cut short: {error}.", _DOWNLOAD) from error

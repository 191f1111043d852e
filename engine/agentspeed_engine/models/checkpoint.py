"""Safetensors shards as one checked mapping of names to tensors; what is absent, cut short or misshapen is refused."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError
from torch import Tensor

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.models import int4_groups
from agentspeed_engine.models.family import Family, ModelConfig
from agentspeed_engine.models.quantization import FP8_BLOCK, PACKED, Scheme, packed_refusal, torn_block
from agentspeed_engine.models.shard_file import ShardFile
from agentspeed_engine.models.shards import shard_paths
from agentspeed_engine.models.tensor_shapes import Shape
from agentspeed_engine.models.weight_formats import WeightFormat
from agentspeed_engine.models.weights import Part
from agentspeed_kernels.fp8_blocks import Fp8Rows, Stored

_SCALE = "_scale_inv"
_FLOATS = ("F64", "F32", "F16", "BF16")
"""Names of safetensors for the formats of a weight that is stored as it is, and of scales."""
_FP8 = "F8_E4M3"
_INT4 = (int4_groups.PACKED, int4_groups.SCALE, int4_groups.SHAPE)
_HARMLESS = re.compile(r"rotary_emb\.inv_freq$")
"""Tables that older checkpoints carry and every loader recomputes."""
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")
_READERS = 8
"""Threads that wait for files: a disk that is asked for one thing at a time is slow. They compute nothing."""
_DOWNLOAD = "Download the checkpoint again."
_OTHER_CONFIG = "The configuration belongs to another checkpoint; use the one that came with these weights."


@final
class Checkpoint:
    """The weights of one folder, a `WeightSource`. Tensors are read when asked for and given in the compute dtype."""

    __slots__ = (
        "__weakref__",
        "_drafts",
        "_dtype",
        "_family",
        "_files",
        "_folder",
        "_packed",
        "_progress",
        "_readers",
        "_shapes",
        "_taken",
        "_total",
        "_weights",
    )

    def __init__(
        self,
        folder: Path,
        family: Family[Any],
        config: ModelConfig,
        dtype: torch.dtype,
        progress: Callable[[float], None] | None = None,
        scheme: Scheme = "none",
        weights: WeightFormat | None = None,
    ) -> None:
        """Opens every shard and checks every name, shape and format. `progress` is told what part of the bytes was
        read; `scheme` is what the configuration declares; `weights`: what matrices are kept in, so that `matrix`
        gives fp8 as it is for fp8, and bfloat16 for bfloat16. Raises
        `EngineFault`: bad_weights, or unsupported_model where the tensors are quantised in a way that is not
        implemented."""
        self._folder, self._family, self._dtype = folder, family, dtype
        self._shapes: dict[str, Shape] = dict(family.shapes(config))
        self._drafts = range(config.layers, config.layers + config.draft_layers)
        self._readers = ThreadPoolExecutor(_READERS, "agentspeed-weights")
        _ = weakref.finalize(self, self._readers.shutdown, wait=False)  # they end with the load
        self._files = self._opened()
        packed = (name for name in self._shapes if name + int4_groups.PACKED in self._files)
        self._packed = frozenset(packed if scheme == "int4_groups" else ())
        self._check_names()
        for name, shape in self._shapes.items():
            self._check(name, shape)
        self._weights, self._progress, self._taken = weights, progress, 0
        self._total = self._bytes({})

    def expect(self, parts: Mapping[str, Part]) -> None:
        """A piece of fp8 must be whole blocks, each of which has one scale, and so must columns in 4 bits."""
        self._total = self._bytes(parts)
        for name, part in parts.items():
            extent = self._shapes[name][part.dim]
            if name in self._packed:
                group = self._shapes[name][1] // self._shape(name + int4_groups.SCALE)[1]
                if part.dim == 1 and extent // part.count % group:
                    raise torn_block(self._family.prefix + name, extent, part.count, f"int4 in groups of {group}")
            elif part.count > 1 and extent // part.count % FP8_BLOCK and self._kind(name) == _FP8:
                raise torn_block(self._family.prefix + name, extent, part.count)

    def tensor(self, name: str, dtype: torch.dtype | None = None, part: Part | None = None) -> Tensor:
        """One tensor or a piece of it, contiguous; blocks of fp8 and groups of int4 are multiplied by their scales."""
        if name in self._packed:
            unpacked = int4_groups.unpacked(*(self._read(stored, part) for stored in self._parts_of(name)))
            return unpacked.to(dtype or self._dtype)
        held = self._stored(name, part)
        dtype = dtype or self._dtype
        return held.wide(dtype) if isinstance(held, Fp8Rows) else held.to(dtype).contiguous()

    def matrix(self, name: str, part: Part | None = None) -> Stored:
        """As `tensor`, or in the format that is kept."""
        in_bytes = self._weights not in (None, "bfloat16")
        if in_bytes and name not in self._packed and self._kind(name) == _FP8:
            return self._stored(name, part)
        return self.tensor(name, torch.bfloat16 if self._weights == "bfloat16" else None, part)

    def _stored(self, name: str, part: Part | None) -> Stored:
        held = self._read(name, part)
        if held.dtype != torch.float8_e4m3fn:
            return held
        return Fp8Rows.of(held, self._read(name + _SCALE, part))

    def _read(self, name: str, part: Part | None) -> Tensor:
        file, full = self._files[name], self._family.prefix + name
        try:
            if part is None or part.count == 1:
                self._tell(file.bytes(full))
                return file.read(full)
            self._tell(file.bytes(full) // part.count)
            size = file.shape(full)[part.dim] // part.count
            mine = slice(part.index * size, (part.index + 1) * size)
            return file.read(full, rows=mine) if part.dim == 0 else file.read(full, columns=mine)
        except OSError as error:
            raise EngineFault("bad_weights", f"{name} of {self._folder} cannot be read: {error}.", _DOWNLOAD) from error

    def _bytes(self, parts: Mapping[str, Part]) -> int:
        """What there is to read where tensors are asked for in these pieces."""
        return sum(
            self._files[stored].bytes(self._family.prefix + stored) // (parts[name].count if name in parts else 1)
            for name in self._shapes
            for stored in self._parts_of(name)
        )

    def _parts_of(self, name: str) -> tuple[str, ...]:
        """What is read of the files for a tensor; the scales of fp8 are few."""
        return (name + int4_groups.PACKED, name + int4_groups.SCALE) if name in self._packed else (name,)

    def _tell(self, taken: int) -> None:
        """What was read of what the model needs."""
        self._taken += taken
        if self._progress is not None and self._total:
            self._progress(min(1.0, self._taken / self._total))

    def _opened(self) -> dict[str, ShardFile]:
        """The shard of every tensor, by its name without the family's prefix; what is left unread is not in it."""
        found: dict[str, ShardFile] = {}
        for path in shard_paths(self._folder):
            shard = _open(path, self._readers)
            for full in shard.names:
                if self._family.unread is not None and self._family.unread.search(full):
                    continue
                name = full.removeprefix(self._family.prefix)
                if not full.startswith(self._family.prefix):
                    raise self._unexplained([full])
                if name in found:
                    raise EngineFault("bad_weights", f"{full} is in two files of {self._folder}.", _DOWNLOAD)
                found[name] = shard
        return found

    def _check_names(self) -> None:
        packed = [name for name in self._files if PACKED.search(name) and not self._explained(name)]
        if packed:
            raise packed_refusal(packed[0])
        missing = [part for name in self._shapes for part in self._parts_of(name) if part not in self._files]
        if missing:
            raise EngineFault(
                "bad_weights",
                f"{self._folder} lacks {len(missing)} tensors, first {self._family.prefix}{missing[0]}.",
                _DOWNLOAD,
            )
        unknown = [name for name in self._files if not self._explained(name)]
        if unknown:
            raise self._unexplained([self._family.prefix + name for name in unknown])

    def _unexplained(self, names: list[str]) -> EngineFault:
        message = f"{self._folder} holds {len(names)} tensors that config.json does not explain, first {names[0]}."
        return EngineFault("bad_weights", message, _OTHER_CONFIG)

    def _explained(self, name: str) -> bool:
        """Layers for drafting follow the model's own: DeepSeek-V3 has 61 and says `num_nextn_predict_layers` 1, so its
        layer 61 is known and left unread. Without that word a further layer is one that `num_hidden_layers` denies."""
        if name in self._shapes or _HARMLESS.search(name):
            return True
        layer = _LAYER.match(name)
        if layer is not None and int(layer.group(1)) in self._drafts:
            return True
        if any(name.endswith(part) and name.removesuffix(part) in self._packed for part in _INT4):
            return True
        if name.endswith(_SCALE):
            return name.removesuffix(_SCALE) in self._shapes
        # No shared experts are written as matrices without rows.
        return name == "lm_head.weight" or 0 in self._shape(name)

    def _shape(self, name: str) -> Shape:
        return self._files[name].shape(self._family.prefix + name)

    def _kind(self, name: str) -> str:
        return self._files[name].kind(self._family.prefix + name)

    def _check(self, name: str, wanted: Shape) -> None:
        if name in self._packed:
            self._check_packed(name, wanted)
            return
        shape, kind = self._shape(name), self._kind(name)
        full = self._family.prefix + name
        if kind not in (*_FLOATS, _FP8):
            raise EngineFault(
                "unsupported_model",
                f"{full} is stored as {kind}.",
                f"Weights must be {', '.join(_FLOATS)}, or {_FP8} with a scale for each block; take such a version.",
            )
        if shape != wanted:
            raise EngineFault("bad_weights", f"{full} has shape {shape}, config.json says {wanted}.", _OTHER_CONFIG)
        if kind == _FP8:
            self._check_scales(name, shape)
        elif name + _SCALE in self._files:
            raise EngineFault(
                "bad_weights",
                f"{full} is stored as {kind} and has scales as well ({full}{_SCALE}).",
                "Nobody can tell whether they were applied; take the checkpoint as it was published.",
            )

    def _check_packed(self, name: str, wanted: Shape) -> None:
        packed, scales, full = name + int4_groups.PACKED, name + int4_groups.SCALE, self._family.prefix + name
        if name in self._files:
            raise EngineFault("bad_weights", f"{full} is there, and {full}{int4_groups.PACKED} too.", _DOWNLOAD)
        kinds = (self._kind(packed), self._kind(scales))
        if kinds[0] != "I32" or kinds[1] not in _FLOATS:
            raise EngineFault(
                "unsupported_model",
                f"{full} is packed as {kinds[0]} with scales of {kinds[1]}.",
                f"Packed weights must be I32, their scales {', '.join(_FLOATS)}.",
            )
        if int4_groups.group_of(self._shape(packed), self._shape(scales), wanted) is None:
            raise EngineFault(
                "bad_weights",
                f"{full} is packed as {self._shape(packed)} with scales {self._shape(scales)}, which is no matrix of "
                f"{wanted} in 4 bits, as config.json says.",
                _OTHER_CONFIG,
            )

    def _check_scales(self, name: str, shape: Shape) -> None:
        scales, full = name + _SCALE, self._family.prefix + name
        if scales not in self._files:
            raise EngineFault("bad_weights", f"{full} is fp8 but {full}{_SCALE} is missing.", _DOWNLOAD)
        blocks = tuple(-(-extent // FP8_BLOCK) for extent in shape)
        if len(shape) != 2 or self._shape(scales) != blocks:
            raise EngineFault(
                "unsupported_model",
                f"{full}{_SCALE} has shape {self._shape(scales)}, blocks of {FP8_BLOCK} × {FP8_BLOCK} of "
                f"{shape} need {blocks}.",
                f"Only matrices with a scale for each block of {FP8_BLOCK} × {FP8_BLOCK} are supported.",
            )
        if self._kind(scales) not in _FLOATS:
            raise EngineFault(
                "unsupported_model",
                f"{full}{_SCALE} is stored as {self._kind(scales)}.",
                f"Scales must be {', '.join(_FLOATS)}.",
            )


def _open(path: Path, readers: Executor) -> ShardFile:
    if not path.exists():
        raise EngineFault("bad_weights", f"{path} does not exist.", "Weights must be safetensors; download all shards.")
    try:
        return ShardFile(path, readers)
    except (SafetensorError, OSError) as error:
        raise EngineFault("bad_weights", f"{path} is damaged or cut short: {error}.", _DOWNLOAD) from error

"""Where the tensors of a model come from: files (`checkpoint`), shapes alone, or chance. All give the same names."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import Protocol, final

import torch
from torch import Tensor

from agentspeed_engine.models.tensor_shapes import Shape


class WeightSource(Protocol):
    """What a family builds its modules from."""

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One whole tensor, contiguous, in `dtype` or else in the source's own. The caller may keep it, not write it.

        `name` is one of the family's shapes. Raises `EngineFault` (bad_weights) where a file has gone bad since it was
        checked.
        """
        ...


@final
class MetaWeights:
    """Shapes without memory: what planning and sizing need."""

    __slots__ = ("_dtype", "_shapes")

    def __init__(self, shapes: Mapping[str, Shape], dtype: torch.dtype) -> None:
        self._shapes, self._dtype = shapes, dtype

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """On torch's meta device."""
        return torch.empty(self._shapes[name], dtype=dtype or self._dtype, device="meta")


@final
class RandomWeights:
    """Weights by chance, made on a device: for benchmarks of models whose weights are nowhere near.

    A tensor depends on the seed and on its name only, so ranks that ask for different ones agree.
    """

    __slots__ = ("_device", "_dtype", "_seed", "_shapes")

    def __init__(self, shapes: Mapping[str, Shape], dtype: torch.dtype, *, seed: int = 0, device: str = "cpu") -> None:
        self._shapes, self._dtype, self._seed, self._device = shapes, dtype, seed, device

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The same bits at every call on one kind of device."""
        noise = torch.Generator(self._device).manual_seed((self._seed << 32) | zlib.crc32(name.encode()))
        return random_tensor(name, self._shapes[name], noise).to(dtype or self._dtype)


@final
class OnDevice:
    """The tensors of another source, moved to a device one by one."""

    __slots__ = ("_device", "_source")

    def __init__(self, source: WeightSource, device: torch.device) -> None:
        self._source, self._device = source, device

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        return self._source.tensor(name, dtype).to(self._device)


def random_tensor(name: str, shape: Shape, noise: torch.Generator) -> Tensor:
    """float32 on the generator's device. Matrices have variance 1 / fan-in, so that activations and logits keep a
    scale of about one at any size; gains lie around 1, biases around 0."""
    drawn = torch.randn(shape, generator=noise, dtype=torch.float32, device=noise.device)
    if name.endswith("norm.weight"):
        return 1 + 0.1 * drawn
    if len(shape) == 1:
        return 0.05 * drawn
    return drawn if "embed_tokens" in name else drawn / math.sqrt(shape[1])

"""Where the tensors of a model come from: files (`checkpoint`), shapes alone, or chance. All give the same names."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, final

import torch
from torch import Tensor

from agentspeed_engine.models.tensor_shapes import Shape
from agentspeed_kernels.fp8_blocks import Stored


@final
@dataclass(frozen=True, slots=True)
class Part:
    """The `index`-th of `count` equal pieces along `dim`."""

    dim: int
    index: int
    count: int

    def of(self, whole: Tensor) -> Tensor:
        """Contiguous, and with memory of its own: the whole can go."""
        piece = whole.chunk(self.count, dim=self.dim)[self.index]
        return piece.clone(memory_format=torch.contiguous_format)

    def shape(self, whole: Shape) -> Shape:
        return tuple(extent // self.count if dim == self.dim else extent for dim, extent in enumerate(whole))


class WeightSource(Protocol):
    """What a family builds its modules from."""

    def expect(self, parts: Mapping[str, Part]) -> None:
        """Told before the first tensor what will be asked for in pieces. Raises `EngineFault` (bad_config) where
        something is stored in blocks that the pieces would tear."""
        ...

    def tensor(self, name: str, dtype: torch.dtype | None = None, part: Part | None = None) -> Tensor:
        """One tensor or a piece of it, contiguous, in `dtype` or else in the source's own. Of a piece no more is kept
        than its own bytes. The caller may keep it, not write it.

        `name` is one of the family's shapes. Raises `EngineFault` (bad_weights) where a file has gone bad since it was
        checked.
        """
        ...

    def matrix(self, name: str, part: Part | None = None) -> Stored:
        """As `tensor` in the source's own dtype; of a source that was told to keep fp8 what is stored so, as it is, and
        of one that keeps bfloat16 in that."""
        ...


@final
class MetaWeights:
    """Shapes without memory: what planning and sizing need."""

    __slots__ = ("_dtype", "_shapes")

    def __init__(self, shapes: Mapping[str, Shape], dtype: torch.dtype) -> None:
        self._shapes, self._dtype = shapes, dtype

    def expect(self, parts: Mapping[str, Part]) -> None:
        """Shapes have no blocks."""

    def tensor(self, name: str, dtype: torch.dtype | None = None, part: Part | None = None) -> Tensor:
        """On torch's meta device."""
        shape = self._shapes[name]
        return torch.empty(part.shape(shape) if part else shape, dtype=dtype or self._dtype, device="meta")

    def matrix(self, name: str, part: Part | None = None) -> Stored:
        """As `tensor`: nothing is stored."""
        return self.tensor(name, part=part)


@final
class RandomWeights:
    """Weights by chance, made on a device: for benchmarks of models whose weights are nowhere near.

    A tensor depends on the seed and on its name only, so ranks that ask for different ones agree.
    """

    __slots__ = ("_device", "_dtype", "_kept", "_seed", "_shapes")

    def __init__(
        self,
        shapes: Mapping[str, Shape],
        dtype: torch.dtype,
        *,
        seed: int = 0,
        device: str = "cpu",
        kept: torch.dtype | None = None,
    ) -> None:
        """`kept`: format of what `matrix` gives; None: `dtype`."""
        self._shapes, self._dtype, self._seed, self._device = shapes, dtype, seed, device
        self._kept = dtype if kept is None else kept

    def expect(self, parts: Mapping[str, Part]) -> None:
        """Chance has no blocks."""

    def tensor(self, name: str, dtype: torch.dtype | None = None, part: Part | None = None) -> Tensor:
        """The same bits at every call on one kind of device. A piece is cut of the whole, so that ranks agree."""
        noise = torch.Generator(self._device).manual_seed((self._seed << 32) | zlib.crc32(name.encode()))
        drawn = random_tensor(name, self._shapes[name], noise)
        return (part.of(drawn) if part else drawn).to(dtype or self._dtype)

    def matrix(self, name: str, part: Part | None = None) -> Stored:
        """As `tensor`: nothing is stored."""
        return self.tensor(name, self._kept, part)


@final
class OnDevice:
    """The tensors of another source, moved to a device one by one."""

    __slots__ = ("_device", "_source")

    def __init__(self, source: WeightSource, device: torch.device) -> None:
        self._source, self._device = source, device

    def expect(self, parts: Mapping[str, Part]) -> None:
        self._source.expect(parts)

    def tensor(self, name: str, dtype: torch.dtype | None = None, part: Part | None = None) -> Tensor:
        return self._source.tensor(name, dtype, part).to(self._device)

    def matrix(self, name: str, part: Part | None = None) -> Stored:
        return self._source.matrix(name, part).to(self._device)


def random_tensor(name: str, shape: Shape, noise: torch.Generator) -> Tensor:
    """float32 on the generator's device. Matrices have variance 1 / fan-in, so that activations and logits keep a
    scale of about one at any size; gains lie around 1, biases around 0."""
    drawn = torch.randn(shape, generator=noise, dtype=torch.float32, device=noise.device)
    if name.endswith("norm.weight"):
        return 1 + 0.1 * drawn
    if len(shape) == 1:
        return 0.05 * drawn
    return drawn if "embed_tokens" in name else drawn / math.sqrt(shape[1])

"""Where an engine computes: the GPU where one serves the model, else the CPU, with the reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, final

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.models.catalog import read_source
from agentspeed_engine.models.kv_layout import DTYPE_BYTES
from agentspeed_engine.models.weight_formats import WeightFormat, weight_bytes
from agentspeed_engine.serve.memory_limit import MemoryLimit
from agentspeed_engine.spmd.placement import Mesh

if TYPE_CHECKING:
    from agentspeed_kernels.platform import Platform


class PlaceOptions(Protocol):
    """What of the engine's options decides where it computes."""

    @property
    def model(self) -> str: ...
    @property
    def dtype(self) -> Literal["auto", "float32", "float64", "bfloat16"]: ...
    @property
    def weights(self) -> str: ...
    @property
    def kv_cache_dtype(self) -> Literal["dtype", "fp8"]: ...
    @property
    def device(self) -> Literal["auto", "cpu", "cuda"]: ...


@final
@dataclass(frozen=True, slots=True)
class Place:
    """A device and what it offers."""

    device: Literal["cpu", "cuda"]
    platform: Platform
    memory: MemoryLimit | None
    """What is free of a GPU; None: the process's own."""
    said: str
    """What a user hears at the start; empty where there was nothing to choose."""


def placed(options: PlaceOptions) -> Place:
    """The device that `options` names or, for auto, the best one. Raises `EngineFault` (bad_options) for a GPU that was
    asked for and cannot be used."""
    # Imported late: what is wrong with options is answered before anything heavy is loaded.
    from agentspeed_kernels.platform import NoDevice, detect

    if options.device == "cpu":
        return Place("cpu", detect(), None, "")
    try:
        platform = detect("cuda")
    except NoDevice as reason:
        if options.device == "cuda":
            raise EngineFault("bad_options", f"device is 'cuda'. {reason}", "Give device='cpu'.") from reason
        return Place("cpu", detect(), None, "")
    if options.device == "cuda" and (why := _no_weights(options.weights, platform)) is not None:
        raise EngineFault(
            "bad_options",
            f"weights is {options.weights!r} and device is 'cuda', but {why}.",
            "Give device='cpu', or leave `weights` out.",
        )
    if options.device == "cuda" and (why := _no_cache(options, platform)) is not None:
        raise EngineFault(
            "bad_options",
            f"kv_cache_dtype is {options.kv_cache_dtype!r} and device is 'cuda', but {why}.",
            "Give device='cpu', or leave `kv_cache_dtype` out.",
        )
    memory = _free(platform)
    if options.device == "auto" and (why := objection(options, platform, memory)) is not None:
        return Place("cpu", detect(), None, f"cpu: {platform.model} is present, but {why}")
    return Place("cuda", platform, memory, f"cuda: {platform.model}, {memory.bytes / 1e9:.1f} GB free")


def objection(options: PlaceOptions, platform: Platform, memory: MemoryLimit) -> str | None:
    """Why `auto` does not choose this GPU; None when it serves the model."""
    if "triton" not in platform.features:
        return f"its kernels cannot run: {platform.absent.get('triton', 'triton is absent')}"
    source = read_source(options.model)
    if not {"mla_rows", "gqa_rows"} & set(source.family.ops):
        return f"it has no kernels of its own for {source.family.attention}; device='cuda' runs it on torch, slowly"
    if options.dtype == "float64":
        return "it has no kernels of its own for float64; device='cuda' runs it on torch, slowly"
    if (why := _no_weights(options.weights, platform)) is not None:
        return why
    if (why := _no_cache(options, platform)) is not None:
        return why
    item = DTYPE_BYTES["bfloat16" if options.dtype == "auto" else options.dtype]
    kept: WeightFormat | None = "fp8" if options.weights == "fp8" else None
    weights = weight_bytes(source.family.shapes(source.config), item, kept)
    if weights > memory.bytes:
        return f"the weights take {weights / 1e9:.1f} GB of the {memory.bytes / 1e9:.1f} GB that are free"
    return None


def _no_weights(weights: str, platform: Platform) -> str | None:
    """Why this GPU has no kernels for the format; None where it has."""
    if weights == "dtype" or (weights == "fp8" and "fp8" in platform.features):
        return None
    return platform.lacks["fp8"] if weights == "fp8" else f"only a CPU has kernels for weights={weights!r}"


def _no_cache(options: PlaceOptions, platform: Platform) -> str | None:
    """Why this GPU cannot keep the model's cache in that format; None where it can."""
    if options.kv_cache_dtype == "dtype":
        return None
    source = read_source(options.model)
    # Imported late, as above.
    from agentspeed_kernels.ops import CACHE_OPS
    from agentspeed_kernels.registry import standard
    from agentspeed_kernels.selection import NoKernel, select
    from agentspeed_kernels.signature import Need

    registry, dtype = standard(), "bfloat16" if options.dtype == "auto" else options.dtype
    sizes = source.family.sizes(source.config, Mesh())
    for op in source.family.ops:
        if op in CACHE_OPS:
            need = Need(op=op, dtype=dtype, rows=1, cache=options.kv_cache_dtype, sizes=sizes)
            own = tuple(spec for spec in registry.candidates(op) if spec.device == platform.device)
            try:
                _ = select(need, own, platform)
            except NoKernel as reason:
                return str(reason)
    return None


def _free(platform: Platform) -> MemoryLimit:
    import torch

    free, _ = torch.cuda.mem_get_info(0)
    return MemoryLimit(int(free), f"the GPU ({platform.model})", idle=True)

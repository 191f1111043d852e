"""What this machine offers, found once and handed to selection as a plain value."""

from __future__ import annotations

import importlib.util
import platform as host
from dataclasses import dataclass, field
from typing import final

from agentspeed_kernels.signature import Device


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Platform:
    device: Device
    arch: str
    """Of a CPU what `uname -m` says; of a GPU `sm_90` and the like."""
    features: frozenset[str]
    absent: dict[str, str] = field(default_factory=dict)
    """Why a feature that could be here is not: worth a warning, since something can be done about it."""
    lacks: dict[str, str] = field(default_factory=dict)
    """Why a feature cannot be here: what the processor does not have."""
    processors: int = 0
    """Multiprocessors of a GPU."""
    memory_bytes: int = 0
    """Of a GPU."""
    model: str = ""
    """Of a GPU, as its driver names it."""


def detect(device: Device = "cpu", index: int = 0) -> Platform:
    """The CPU of this process, or the `index`-th GPU.

    For the CPU it builds the native kernels if a compiler is found; that takes seconds once a machine. Raises
    `NoDevice` where no such GPU can be used."""
    return _cuda(index) if device == "cuda" else _cpu()


class UnknownPlatform(ValueError):
    """A name that stands for no platform; the message lists those that do."""


def named(text: str) -> Platform:
    """`cpu`, `cuda`: what this machine has. `cpu:avx512`: this kind of CPU with that form of the native kernels and
    those below it; `cpu:torch` with none. `cuda:100`: a GPU of that compute capability, whether there is one or not.

    Raises `UnknownPlatform`, and `NoDevice` where no GPU is."""
    from agentspeed_kernels.cpu import native

    device, colon, kind = text.partition(":")
    forms = {form.name: form for form in native.forms_here()}
    if device in ("cpu", "cuda") and not colon:
        return detect("cuda" if device == "cuda" else "cpu")
    if device == "cpu" and kind == "torch":
        return Platform(device="cpu", arch=host.machine(), features=frozenset())
    if device == "cpu" and kind in forms:
        held = list(forms.values())[list(forms).index(kind) :]
        features = frozenset({native.FEATURE, *(form.feature for form in held)})
        lacks = {form.feature: f"the platform is {text}" for form in forms.values() if form not in held}
        return Platform(device="cpu", arch=host.machine(), features=features, lacks=lacks)
    if device == "cuda" and kind.isdecimal():
        capability = divmod(int(kind), 10)
        features = frozenset({"cuda", "triton", *_of_capability(capability)})
        return Platform(device="cuda", arch=f"sm_{kind}", features=features, lacks=_lacks(features))
    known = ", ".join(("cpu", "cuda", "cpu:torch", *(f"cpu:{name}" for name in forms), "cuda:90", "cuda:100"))
    raise UnknownPlatform(f"{text!r} is no platform. Some that are: {known}.")


class NoDevice(LookupError):
    """The device that was asked for cannot be used; the message says why."""


def _cpu() -> Platform:
    from agentspeed_kernels.cpu import native

    library = native.library()
    if isinstance(library, native.Unavailable):
        return Platform(
            device="cpu",
            arch=host.machine(),
            features=frozenset(),
            absent={native.FEATURE: library.reason},
            lacks={form.feature: library.reason for form in native.forms_here()},
        )
    return Platform(
        device="cpu",
        arch=host.machine(),
        features=frozenset({native.FEATURE, *(form.feature for form in library.forms)}),
        absent=library.refused,
        lacks=library.lacks,
    )


def _cuda(index: int) -> Platform:
    import torch

    if not torch.cuda.is_available():
        built = "" if torch.version.cuda else " This torch is built without CUDA: install one that has it."
        raise NoDevice(f"No CUDA device can be used: torch.cuda.is_available() is false.{built}")
    if index >= torch.cuda.device_count():
        raise NoDevice(f"There is no CUDA device {index}: {torch.cuda.device_count()} are present.")
    properties = torch.cuda.get_device_properties(index)
    features, absent = {"cuda"}, {}
    if importlib.util.find_spec("triton") is not None:
        features.add("triton")
    else:
        absent["triton"] = "the package triton is not installed (pip install 'agentspeed[gpu]')"
    features.update(_of_capability((properties.major, properties.minor)))
    return Platform(
        device="cuda",
        arch=f"sm_{properties.major}{properties.minor}",
        features=frozenset(features),
        absent=absent,
        lacks=_lacks(frozenset(features)),
        processors=properties.multi_processor_count,
        memory_bytes=properties.total_memory,
        model=properties.name,
    )


def _of_capability(capability: tuple[int, int]) -> tuple[str, ...]:
    """`hopper` has its matrix units; `fp8` converts e4m3 by instructions."""
    return (("hopper",) if capability[0] == 9 else ()) + (("fp8",) if capability >= (8, 9) else ())


def _lacks(features: frozenset[str]) -> dict[str, str]:
    return {} if "fp8" in features else {"fp8": "the GPU does not convert e4m3; compute capability 8.9 and above do"}

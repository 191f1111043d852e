"""The border to the choice of kernels: which ones would run a model here or elsewhere, and why the others would not."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from agentspeed import errors
from agentspeed.transport.error_map import converted

if TYPE_CHECKING:
    # Imported late: they come with the tensors.
    from agentspeed_engine.models.kernel_choices import KernelBand as KernelBand
    from agentspeed_engine.models.kernel_choices import KernelChoices as KernelChoices


def chosen_kernels(
    model: Path,
    *,
    platform: str | None,
    dtype: Literal["auto", "float32", "float64", "bfloat16"],
    weights: Literal["int8", "int8-32", "fp8"] | None,
    cache: Literal["fp8"] | None = None,
    batch_invariant: bool = False,
) -> KernelChoices:
    """`model`: a model folder or a config.json; weights are not read, and need not be there.

    Raises `ModelUnsupported` and `ModelBroken` for a configuration that does not run; `InvalidRequest` for what is no
    configuration, and for a platform that nobody knows or that has no kernel for an op; `ExtraMissing` without PyTorch.
    """
    if importlib.util.find_spec("torch") is None:
        raise errors.ExtraMissing("Kernels need PyTorch.", remedy="Install agentspeed[engine].")
    from agentspeed_engine.models.catalog import RANDOM, read_source
    from agentspeed_engine.models.kernel_choices import kernel_choices

    if not model.exists():
        raise errors.InvalidRequest(
            f"{model} does not exist.", remedy="Give a model folder, or the config.json of a model."
        )
    with converted():
        source = read_source(f"{RANDOM}{model}")
        # How weights are stored is read from files, where there are some.
        source = replace(source, random=not any(model.glob("*.safetensors")))
        return kernel_choices(
            source, platform=platform, dtype=dtype, weights=weights, cache=cache, batch_invariant=batch_invariant
        )

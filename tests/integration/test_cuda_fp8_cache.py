"""A KV cache in fp8 on a GPU: logits beside the definition in float64 on a CPU, whatever is shared or cut."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agentspeed import Engine, tool
from agentspeed.engine import NANO
from agentspeed_engine.models.catalog import load
from agentspeed_engine.models.loaded import LoadedModel
from tests.devices import needs_gpu
from tests.integration.test_cuda_invariance import GROUPED, V2_LITE
from tests.support.paged import Trail, batch
from tests.support.random_checkpoint import make_checkpoint

pytestmark = [needs_gpu, pytest.mark.timeout(300)]

PAGE = 64
IDS = np.random.default_rng(5).integers(3, 300, 1400).tolist()
NEAR, MOST = 0.04, 0.4
"""|d| / |definition| of logits in most steps, and in each: bfloat16 and its other rounding to 8 bits, through all
layers; where a near tie of the router falls otherwise, a row is another expert's."""


@pytest.fixture(scope="module", params=["nano", "16 heads", "grouped"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, LoadedModel]:
    """(In bfloat16 on the GPU, in float64 on the CPU), both with a cache in fp8."""
    configs: dict[str, dict[str, Any]] = {"16 heads": V2_LITE, "grouped": GROUPED}
    folder: Path = NANO
    if request.param != "nano":
        folder = make_checkpoint(configs[request.param], tmp_path_factory.mktemp("model"), seed=6, dtype="float32")
    given: dict[str, Any] = {"pages": 120, "page_tokens": PAGE, "cache": "fp8"}
    return (load(folder, dtype="bfloat16", device="cuda", **given), load(folder, dtype="float64", **given))


def apart(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.double().cpu() - wanted).norm() / wanted.norm())


def test_prompts_and_branches_have_the_logits_of_the_definition(models: tuple[LoadedModel, LoadedModel]) -> None:
    """A long extend, a short one, rows of a decode step, and branches below a trunk, in graphs from the third on."""
    held: list[list[torch.Tensor]] = []
    for model in models:
        trunk = Trail(PAGE, list(range(30)))
        found = [model.forward(batch(PAGE, [(trunk, IDS[:1000])], select="last")).clone()]
        found.append(model.forward(batch(PAGE, [(trunk, IDS[1000:1024])], select="last")).clone())
        forks = [Trail(PAGE, [*range(16), 40 + i], shared=1024, known=1024) for i in range(5)]
        for at in range(6):
            found.append(model.forward(batch(PAGE, [(fork, [7 * i + at + 3]) for i, fork in enumerate(forks)])).clone())
        held.append(found)
    errors = [apart(got, wanted) for got, wanted in zip(*held, strict=True)]
    assert statistics.median(errors) < NEAR, errors
    assert max(errors) < MOST, errors


@pytest.fixture
def anyio_backend() -> str:
    """One is enough: it is the cache that is tried here."""
    return "asyncio"


@tool
def weather(city: str) -> str:
    """The weather of a city.

    city: its name.
    """
    return f"Sunny in {city}."


@pytest.mark.anyio
async def test_a_session_runs_tools_and_forks_over_a_cache_in_fp8() -> None:
    options: Any = {"device": "cuda", "dtype": "bfloat16", "kv_cache_dtype": "fp8"}
    async with Engine(**options) as engine, engine.session(tools=[weather]) as s:
        result = await s.run("What is the weather in Paris?")
        assert "Paris" in result.text
        async with s.fork(3) as children:
            said = [await child.generate("And in Rome?", max_tokens=8) for child in children]
        assert len({tuple(one.ids) for one in said}) == 1

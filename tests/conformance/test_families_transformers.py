"""Every family against transformers in float64, logit by logit, over random small configurations."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from agentspeed_engine.models.catalog import load
from agentspeed_engine.models.registry import supported_types
from tests.conformance.family_configs import ARCHITECTURE, random_config
from tests.support.needs import needed
from tests.support.paged import Trail, batch
from tests.support.random_checkpoint import make_checkpoint

transformers = needed("transformers", "transformers is the reference")

SEEDS = 12
"""Of which the suite takes three; `pytest -m slow` takes the others."""
NEW = 200
"""Long enough that a prompt at once takes the path for many rows."""
_MODULES = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "youtu", "llama", "qwen3", "qwen3_moe", "kimi_k25")
_KNOWN_AS = {"kimi_k2": "deepseek_v3"}
"""Published with code of its own, which transformers reads as another type."""


@contextmanager
def all_in_float64() -> Iterator[None]:
    """The reference takes norms, scores and softmax in float32 by name; here that name means float64."""
    modules: list[Any] = [import_module(f"transformers.models.{name}.modeling_{name}") for name in _MODULES]
    proxy = SimpleNamespace(**{name: getattr(torch, name) for name in dir(torch) if not name.startswith("__")})
    proxy.float32 = proxy.float = torch.float64
    for module in modules:
        module.torch = proxy
    plain = torch.Tensor.float
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.float = plain  # type: ignore[method-assign]
        for module in modules:
            module.torch = torch


def reference_logits(folder: Path, ids: list[int]) -> torch.Tensor:
    """What transformers computes of a model folder, [T, vocab]."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    config = json.loads((folder / "config.json").read_text())
    name = _KNOWN_AS.get(config["model_type"])
    if name is not None:
        (folder / "config.json").write_text(json.dumps(config | {"model_type": name}))
    kind = getattr(transformers, ARCHITECTURE[config["model_type"]])
    model = kind.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )
    with torch.inference_mode(), all_in_float64():
        logits: torch.Tensor = model(torch.tensor([ids])).logits[0]
    return logits


def test_every_type_that_runs_is_compared() -> None:
    assert set(supported_types()) == set(ARCHITECTURE)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # no shared experts, in the reference
@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=[pytest.mark.slow] if seed > 2 else []) for seed in range(SEEDS)]
)
@pytest.mark.parametrize("model_type", ARCHITECTURE)
def test_logits_equal_the_reference(model_type: str, seed: int, tmp_path: Path) -> None:
    folder = make_checkpoint(random_config(model_type, seed), tmp_path, seed=seed, dtype="float64")
    ids = torch.randint(0, 256, (NEW + 8,), generator=torch.Generator().manual_seed(seed)).tolist()
    model = load(folder, dtype="float64", pages=40, page_tokens=8)
    trail = Trail(8, list(range(39, -1, -1)))
    prompt = model.forward(batch(8, [(trail, ids[:NEW])]))
    decoded = [model.forward(batch(8, [(trail, [token])])) for token in ids[NEW:]]
    wanted = reference_logits(folder, ids)
    error = (torch.cat([prompt, *decoded]) - wanted).abs().max() / wanted.abs().max()
    assert float(error) <= 1e-12

"""Every family against transformers in float64, logit by logit, over random small configurations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from agentspeed_engine.models.catalog import load
from agentspeed_engine.models.registry import supported_types
from tests.conformance.family_configs import ARCHITECTURE, random_config
from tests.support.needs import needed
from tests.support.paged import Trail, batch
from tests.support.random_checkpoint import make_checkpoint
from tests.support.reference_models import reference_logits

_ = needed("transformers", "transformers is the reference")

SEEDS = 12
"""Of which the suite takes three; `pytest -m slow` takes the others."""
NEW = 200
"""Long enough that a prompt at once takes the path for many rows."""


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

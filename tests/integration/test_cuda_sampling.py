"""The sampling kernel on a GPU draws and reports what the sampler on the CPU does, over whole vocabularies."""

from __future__ import annotations

import pytest
import torch

from tests.devices import needs_gpu
from tests.support.sampled_rows import disagreements

pytestmark = [needs_gpu, pytest.mark.timeout(300)]


@pytest.mark.parametrize("vocabulary", [701, 102_400, 151_936])
@pytest.mark.parametrize("penalised", [False, True], ids=["plain", "penalties and a bias"])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_gpu_draws_what_the_sampler_on_the_cpu_draws(kind: torch.dtype, penalised: bool, vocabulary: int) -> None:
    told = [
        line
        for seed in range(8)
        for line in disagreements(kind, penalised, vocabulary=vocabulary, seed=seed, device="cuda")
    ]
    assert told == []

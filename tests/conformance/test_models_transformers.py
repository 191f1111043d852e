"""Logit by logit against transformers in float64, over small random configurations of both families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from agentspeed_engine.models.catalog import load
from tests.support.needs import needed
from tests.support.paged import CONFIG, Trail, batch
from tests.support.random_checkpoint import make_checkpoint
from tests.support.reference_models import reference_logits

_ = needed("transformers", "transformers is the reference")

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1}
V2 = {
    "model_type": "deepseek_v2",
    "architectures": ["DeepseekV2ForCausalLM"],
    "topk_method": "group_limited_greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
}
CASES: dict[str, dict[str, Any]] = {
    "v3": {},
    "no query rank": {"q_lora_rank": None},
    "one group": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    "half rotary layout": {"rope_interleave": False},
    "weights not normalised": {"norm_topk_prob": False},
    "two shared experts": {"n_shared_experts": 2},
    "all layers dense": {"first_k_dense_replace": 3},
    "all layers routed": {"first_k_dense_replace": 0},
    "tied embeddings": {"tie_word_embeddings": True},
    "attention bias": {"attention_bias": True},
    "values wider than keys": {"v_head_dim": 26},
    "yarn, old naming": {"rope_scaling": YARN | {"mscale": 0.8, "mscale_all_dim": 1.2}},
    "yarn without mscale": {"rope_scaling": YARN},
    "yarn, new naming": {
        "rope_theta": None,
        "rope_parameters": {k: v for k, v in YARN.items() if k != "type"} | {"rope_type": "yarn", "rope_theta": 8000.0},
    },
    "v2": V2,
    "v2 greedy": V2 | {"topk_method": "greedy", "q_lora_rank": None},
    "v2 yarn": V2 | {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}},
}
NEW = 300
"""Long enough that a prompt at once takes the decompressed path."""


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_the_reference(name: str, tmp_path: Path) -> None:
    config = {key: value for key, value in (CONFIG | CASES[name]).items() if value is not None or key == "q_lora_rank"}
    folder = make_checkpoint(config, tmp_path, seed=3, dtype="float64")
    ids = torch.randint(0, 300, (NEW + 20,), generator=torch.Generator().manual_seed(1)).tolist()
    wanted = reference_logits(folder, ids)
    model = load(folder, dtype="float64", pages=60, page_tokens=8)
    trail = Trail(8, list(range(59, -1, -1)))
    prompt = model.forward(batch(8, [(trail, ids[:NEW])]))
    decoded = [model.forward(batch(8, [(trail, [token])])) for token in ids[NEW:]]
    assert float((prompt - wanted[:NEW]).abs().max()) < 1e-8
    assert float((torch.cat(decoded) - wanted[NEW:]).abs().max()) < 1e-8

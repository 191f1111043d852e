"""Steps in which norms and the modules behind them are joined give what the modules give one after the other."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from agentspeed_engine.models.catalog import read_source
from agentspeed_engine.models.family import ModelConfig
from agentspeed_engine.models.inputs import FlatBatch
from agentspeed_engine.models.joined import joined
from agentspeed_engine.models.kv_pools import KvPools
from agentspeed_engine.models.loaded import step_state
from agentspeed_engine.models.rope import Rope
from agentspeed_engine.models.weights import RandomWeights
from agentspeed_engine.spmd.lower import lower, run
from agentspeed_engine.spmd.placement import ONE
from agentspeed_engine.spmd.plan import plan
from agentspeed_engine.spmd.spec import TOKEN_SHARD
from agentspeed_kernels.platform import detect
from agentspeed_kernels.registry import standard
from agentspeed_kernels.selection import Kernels
from agentspeed_kernels.workspace import Workspace
from tests.conformance.family_configs import random_config
from tests.support.paged import Trail, batch

PAGE, PAGES = 16, 40
JOINING = ["deepseek_v2", "deepseek_v3", "kimi_k2", "glm4_moe_lite", "youtu", "qwen3_moe", "qwen3", "qwen2", "llama"]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("model_type", JOINING)
def test_joined_steps_give_what_the_modules_give(model_type: str, seed: int, tmp_path: Path) -> None:
    """Logits and cache, in float64: for rows of one branch, then of two."""
    (tmp_path / "config.json").write_text(json.dumps(random_config(model_type, seed)))
    source = read_source(f"random:{tmp_path / 'config.json'}")
    config: ModelConfig = source.config
    family = source.family
    sizes = {"page_tokens": PAGE, **family.sizes(config, ONE.mesh)}
    outcomes = []
    for few in (False, True):
        kernels = Kernels(standard(), detect(), "float64", family.ops_on("cuda"), sizes=sizes)
        pools = KvPools(family.kv_layout(config, "float64", ONE.mesh), PAGES, PAGE)
        weights = RandomWeights(dict(family.shapes(config)), torch.float64)
        chain = family.build(config, weights, pools, ONE, kernels)
        boundaries = [module.boundary for module in chain]
        made = plan(boundaries, ONE.mesh, start=TOKEN_SHARD, finish=boundaries[-1].output)
        steps = joined(chain) if few else lower(made, chain, None)
        assert len(steps) < len(chain) if few else len(steps) == len(chain)
        rope = Rope(config.rope, config.context_limit, torch.float64)
        first, second = Trail(PAGE, list(range(9))), Trail(PAGE, list(range(9, 18)))
        given = [[(first, [5, 6, 7])], [(first, [8])], [(first, [9]), (second, [10, 11])]]
        logits = [forward(steps, batch(PAGE, entries), rope) for entries in given]  # type: ignore[arg-type]
        outcomes.append([*logits, *(pool.clone() for pool in pools.tensors)])
    for plain, other in zip(*outcomes, strict=True):
        assert torch.allclose(plain, other, rtol=1e-9, atol=1e-11)


def forward(steps: object, given: FlatBatch, rope: Rope) -> torch.Tensor:
    with torch.inference_mode():
        ids, state = step_state(given, rope, PAGE, Workspace())
        out: torch.Tensor = run(steps, ids, state, (len(given.ids),))  # type: ignore[arg-type]
    assert np.isfinite(out.numpy()).all()
    return out.clone()

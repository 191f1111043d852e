"""Steps in which norms and the modules behind them are joined give what the modules give one after the other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
from agentspeed_kernels.registry import Registry, standard
from agentspeed_kernels.selection import Kernels
from agentspeed_kernels.signature import CacheFormat
from agentspeed_kernels.workspace import Workspace
from tests.conformance.family_configs import random_config
from tests.support.paged import Trail, batch

PAGE, PAGES = 16, 40
JOINING = ["deepseek_v2", "deepseek_v3", "kimi_k2", "glm4_moe_lite", "youtu", "qwen3_moe", "qwen3", "qwen2", "llama"]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("model_type", JOINING)
def test_joined_steps_give_what_the_modules_give(model_type: str, seed: int, tmp_path: Path) -> None:
    _compared(random_config(model_type, seed), tmp_path, None, frozenset())


@pytest.mark.parametrize("left_out", [frozenset[str](), frozenset({"mla_queries"})], ids=["all", "without mla_queries"])
@pytest.mark.parametrize("model_type", ["deepseek_v3", "qwen3_moe"])
def test_so_they_do_over_a_cache_in_fp8_also_where_no_kernel_joins_its_rows(
    model_type: str, left_out: frozenset[str], tmp_path: Path
) -> None:
    _compared(random_config(model_type, 0) | {"head_dim": 16}, tmp_path, "fp8", left_out)


def _compared(config_json: dict[str, Any], folder: Path, cache: CacheFormat | None, left_out: frozenset[str]) -> None:
    """Logits and cache, in float64: for rows of one branch, then of two. `left_out`: ops without a kernel."""
    (folder / "config.json").write_text(json.dumps(config_json))
    source = read_source(f"random:{folder / 'config.json'}")
    registry = Registry(spec for spec in standard() if spec.op not in left_out)
    config: ModelConfig = source.config
    family = source.family
    sizes = {"page_tokens": PAGE, **family.sizes(config, ONE.mesh)}
    outcomes = []
    for few in (False, True):
        ops = family.ops_on("cuda")
        kernels = Kernels(registry, detect(), "float64", ops, sizes=sizes, cache=cache, optional=left_out)
        pools = KvPools(family.kv_layout(config, cache or "float64", ONE.mesh), PAGES, PAGE)
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
        outcomes.append([*logits, pools.numbers(torch.arange(PAGES * PAGE)).double()])
    for plain, other in zip(*outcomes, strict=True):
        assert torch.allclose(plain, other, rtol=1e-9, atol=1e-11)


def forward(steps: object, given: FlatBatch, rope: Rope) -> torch.Tensor:
    with torch.inference_mode():
        ids, state = step_state(given, rope, PAGE, Workspace())
        out: torch.Tensor = run(steps, ids, state, (len(given.ids),))  # type: ignore[arg-type]
    assert np.isfinite(out.numpy()).all()
    return out.clone()

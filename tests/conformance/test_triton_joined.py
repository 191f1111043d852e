"""A decode step as a GPU's graph makes it, joined and padded, through the interpreter: what the CPU's modules give."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
import tests.triton_interpreter  # noqa: F401 - must come before the first kernel
from agentspeed_engine.models import graphs
from agentspeed_engine.models.catalog import read_source
from agentspeed_engine.models.inputs import FlatBatch
from agentspeed_engine.models.joined import joined
from agentspeed_engine.models.kv_pools import KvPools
from agentspeed_engine.models.loaded import step_state
from agentspeed_engine.models.rope import Rope
from agentspeed_engine.models.source import ModelSource
from agentspeed_engine.models.state import StepState
from agentspeed_engine.models.weights import RandomWeights
from agentspeed_engine.spmd.lower import run
from agentspeed_engine.spmd.placement import ONE
from agentspeed_kernels.attention import AttentionBackend, AttentionStep
from agentspeed_kernels.platform import detect, named
from agentspeed_kernels.registry import standard
from agentspeed_kernels.selection import Kernels
from agentspeed_kernels.signature import WeightFormat
from agentspeed_kernels.triton import padded as padded_module
from agentspeed_kernels.triton.backend import TritonAttention, attention_of
from agentspeed_kernels.triton.padded import PlanMemory, padded, shape_for
from agentspeed_kernels.workspace import Workspace
from tests.support.paged import CONFIG, Trail, batch
from tests.support.recorder import CallsAgain

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered.*:RuntimeWarning")
"""Before scratch memory is cleared, rows that pad a step hold what was there."""

PAGE, PAGES = 16, 40
CPU = torch.device("cpu")
SIZES = {"kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "hidden_size": 64}
SOFTMAX: dict[str, Any] = {
    "model_type": "deepseek_v2", "q_lora_rank": None, "scoring_func": "softmax", "topk_method": "greedy", "n_group": 1,
    "topk_group": 1, "norm_topk_prob": False, "n_shared_experts": 2, "routed_scaling_factor": 1.0,
}  # fmt: skip
GROUPED: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6, "head_dim": 16,
    "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0, "tie_word_embeddings": False, "hidden_act": "silu", "attention_bias": False,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "latent, sigmoid, low rank": CONFIG | SIZES,
    "latent, softmax": CONFIG | SIZES | SOFTMAX,
    "qwen2": GROUPED | {"model_type": "qwen2"},
    "qwen3_moe": GROUPED
    | {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
       "decoder_sparse_step": 1, "mlp_only_layers": [0], "norm_topk_prob": True},
}  # fmt: skip


def backend_of(source: ModelSource) -> TritonAttention:
    sizes = {"page_tokens": PAGE, **source.family.sizes(source.config, ONE.mesh)}
    return attention_of(sizes, CPU, 4)


def chain_of(source: ModelSource, pools: KvPools, on_gpu: bool, kept: WeightFormat | None = None) -> Any:
    family, config = source.family, source.config
    sizes = {"page_tokens": PAGE, **family.sizes(config, ONE.mesh)}
    place, ops = (named("cuda:90"), family.ops_on("cuda")) if on_gpu else (detect(), family.ops)
    kernels = Kernels(standard(), place, "float32", ops, sizes=sizes, weights=kept)
    weights = RandomWeights(dict(family.shapes(config)), torch.float32)
    return family.build(config, weights, pools, ONE, kernels)


@pytest.mark.parametrize(
    ("model", "rows", "queries", "extended", "kept"),
    [
        *product(list(MODELS)[:2], [1], [1], [1], [None, "fp8"]),
        *product(list(MODELS), [3], [4], [1], [None]),
        *product(list(MODELS)[:2], [6], [8], [1], [None]),
        *product(list(MODELS)[::3], [3], [12], [7], [None]),
        ("latent, softmax", 6, 8, 1, "fp8"),
        ("qwen3_moe", 3, 4, 1, "fp8"),
    ],
)
def test_a_joined_step_on_a_padded_plan_gives_what_the_modules_give(
    model: str,
    rows: int,
    queries: int,
    extended: int,
    kept: WeightFormat | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`extended`: tokens that the first branch is fed; the others are fed one."""
    monkeypatch.setattr(padded_module, "MANY_QUERIES", 8)
    (tmp_path / "config.json").write_text(json.dumps(MODELS[model]))
    source = read_source(f"random:{tmp_path / 'config.json'}")
    config, family = source.config, source.family
    here, there = (KvPools(family.kv_layout(config, "float32", ONE.mesh), PAGES, PAGE) for _ in range(2))
    plain = [step_of(module) for module in chain_of(source, here, on_gpu=False, kept=kept)]
    rope = Rope(config.rope, config.context_limit, torch.float32)
    trails = [Trail(PAGE, list(range(4 * row, 4 * row + 4))) for row in range(rows)]
    whole(plain, batch(PAGE, [(trail, list(range(5, 25 + 3 * row))) for row, trail in enumerate(trails)]), rope)
    for pool, other in zip(here.tensors, there.tensors, strict=True):
        other.copy_(pool)
    given = batch(PAGE, [(trail, [30 + row] * (1 if row else extended)) for row, trail in enumerate(trails)])
    wanted = whole(plain, given, rope)
    got = padded_step(source, chain_of(source, there, on_gpu=True, kept=kept), given, rope, queries)
    assert torch.allclose(got[: len(given.ids)], wanted, rtol=1e-3, atol=1e-4)
    assert torch.isfinite(got).all(), "rows that pad a step are read by later kernels"
    for pool, other in zip(here.tensors, there.tensors, strict=True):
        assert torch.allclose(pool, other, rtol=1e-4, atol=1e-5)


def step_of(module: Any) -> Any:
    return lambda x, residual, state, _: module(x, residual, state)


def whole(steps: Sequence[Any], given: FlatBatch, rope: Rope, backend: AttentionBackend | None = None) -> torch.Tensor:
    with torch.inference_mode():
        ids, state = step_state(given, rope, PAGE, Workspace(), backend)
        return run(steps, ids, state, (len(given.ids),)).clone()


def padded_step(source: ModelSource, chain: Any, given: FlatBatch, rope: Rope, queries: int) -> torch.Tensor:
    """As `models.graphs` lays a step out."""
    attention = backend_of(source)
    plan, form = attention.rows(given.runs, given.positions)
    shape = shape_for(plan, form, queries, attention.shape)
    assert shape is not None
    few = PlanMemory(shape, CPU).load(padded(plan, shape))
    more = queries - len(given.ids)
    ids, positions, slots = (
        torch.from_numpy(np.pad(part, (0, more), constant_values=fill))
        for part, fill in ((given.ids, 0), (given.positions, 0), (given.slots, -1))
    )
    cos, sin = rope.at(positions)
    step = AttentionStep(few=few, many=None, many_rows=torch.zeros(0, dtype=torch.int64))
    workspace = Workspace()
    state = StepState(
        cos=cos, sin=sin, slots=slots, attention=step, select=torch.arange(queries), workspace=workspace
    )  # fmt: skip
    with torch.inference_mode():
        run(joined(chain), ids, state, (queries,))
        workspace.clear()
        return run(joined(chain), ids, state, (queries,)).clone()


@pytest.mark.parametrize(("model", "layers"), [("latent, sigmoid, low rank", 2), ("qwen2", 1)])
def test_graphs_of_joined_steps_pass_the_check_of_an_engines_start(
    model: str, layers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "BUCKETS", (4,))
    (tmp_path / "config.json").write_text(json.dumps(MODELS[model] | {"num_hidden_layers": layers}))
    source = read_source(f"random:{tmp_path / 'config.json'}")
    config, family = source.config, source.family
    pools = KvPools(family.kv_layout(config, "float32", ONE.mesh), PAGES, PAGE)
    rope = Rope(config.rope, config.context_limit, torch.float32)
    attention = backend_of(source)
    chain = chain_of(source, pools, on_gpu=True)
    plain = [step_of(module) for module in chain]
    held = graphs.Graphs(
        joined(chain),
        plain,
        lambda given: whole(plain, given, rope, attention),
        pools,
        config.vocab_size,
        rope,
        attention,
        CPU,
        recorder=CallsAgain(),
    )
    with torch.inference_mode():
        assert held.capture(128, PAGES * PAGE, 64, lambda _: None)
    assert held.joins and held.count

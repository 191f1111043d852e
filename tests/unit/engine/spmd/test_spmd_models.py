"""The deepseek chain over several logical ranks gives what one rank gives, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.models.catalog import load, read_source
from agentspeed_engine.models.inputs import FlatBatch
from agentspeed_engine.models.kv_pools import KvPools
from agentspeed_engine.models.loaded import step_state, weight_source
from agentspeed_engine.models.mesh import check_cuts
from agentspeed_engine.models.rope import Rope
from agentspeed_engine.spmd.logical import run_logical
from agentspeed_engine.spmd.placement import TOKENS, Layout, Mesh, Replicate, Shard
from agentspeed_engine.spmd.plan import Plan, plan
from agentspeed_engine.spmd.spec import EVERYWHERE
from agentspeed_kernels.ops import OPS
from agentspeed_kernels.platform import detect
from agentspeed_kernels.registry import standard
from agentspeed_kernels.selection import Kernels
from agentspeed_kernels.workspace import Workspace
from tests.conformance.family_configs import random_config
from tests.support.paged import CONFIG, Trail, batch
from tests.support.random_checkpoint import make_checkpoint

PAGE = 8
IDS = np.random.default_rng(8).integers(0, 300, 200).tolist()
TOKENS_OVER_DP = Layout(dp=Shard(TOKENS), tp=Replicate())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(CONFIG | {"attention_bias": True}, tmp_path_factory.mktemp("model"), seed=9, dtype="float64")


class Ranks:
    """N ranks of one model in this process."""

    def __init__(self, folder: Path, mesh: Mesh) -> None:
        source = read_source(folder)
        family, config = source.family, source.config
        kernels = Kernels(standard(), detect(), "float64", tuple(OPS))
        weights = weight_source(source, "float64")
        self.mesh = mesh
        self.rope = Rope(config.rope, config.context_limit, torch.float64)
        self.workspaces = [Workspace() for _ in range(mesh.size)]
        self.chains = [
            family.build(config, weights, KvPools(family.kv_layout(config, "float64", mesh), 32, PAGE), rank, kernels)
            for rank in mesh.ranks()
        ]
        boundaries = [module.boundary for module in self.chains[0]]
        self.plan: Plan = plan(boundaries, mesh, start=TOKENS_OVER_DP, finish=EVERYWHERE)

    def forward(self, batches: list[FlatBatch]) -> list[torch.Tensor]:
        """One batch per dp rank, the same for its tp ranks."""
        mine = [batches[rank.dp] for rank in self.mesh.ranks()]
        states = [step_state(b, self.rope, PAGE, w)[1] for b, w in zip(mine, self.workspaces, strict=True)]
        inputs = [torch.from_numpy(b.ids) for b in mine]
        return run_logical(self.plan, self.chains, inputs, states, [len(b.ids) for b in batches])


@pytest.mark.parametrize("mesh", [Mesh(), Mesh(tp=2), Mesh(tp=4), Mesh(dp=2), Mesh(dp=2, tp=2)], ids=str)
def test_ranks_together_give_the_logits_of_one(folder: Path, mesh: Mesh) -> None:
    """Two steps, so that every rank reads the latents it wrote; dp ranks have uneven shares."""
    assert_equal_to_one(folder, mesh, [[IDS[:11], IDS[20:50]][: mesh.dp], [[5], [6, 7]][: mesh.dp]])


def assert_equal_to_one(folder: Path, mesh: Mesh, steps: list[list[list[int]]]) -> None:
    """`steps[i][dp]` are the ids of a dp rank's one sequence in a step."""
    ranks, trails = Ranks(folder, mesh), [Trail(PAGE, list(range(3, 31))) for _ in range(mesh.dp)]
    alone = load(folder, dtype="float64", pages=64, page_tokens=PAGE)
    trails_alone = [Trail(PAGE, list(range(30 * i, 30 * i + 30))) for i in range(mesh.dp)]
    for step in steps:
        wanted = torch.cat(
            [alone.forward(batch(PAGE, [(trail, ids)])) for trail, ids in zip(trails_alone, step, strict=True)]
        )
        got = ranks.forward([batch(PAGE, [(trail, ids)]) for trail, ids in zip(trails, step, strict=True)])
        assert all(piece.shape == wanted.shape and torch.allclose(piece, wanted, rtol=0, atol=1e-10) for piece in got)


GROUPED = random_config("qwen3_moe", 0) | {
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 12, "hidden_size": 48, "num_experts": 8,
    "intermediate_size": 64, "decoder_sparse_step": 1, "mlp_only_layers": [0], "attention_bias": True,
}  # fmt: skip


@pytest.mark.parametrize("mesh", [Mesh(tp=2), Mesh(tp=4), Mesh(dp=2), Mesh(dp=2, tp=2)], ids=str)
def test_ranks_of_grouped_query_attention_keep_their_own_heads_and_give_the_logits_of_one(
    tmp_path: Path, mesh: Mesh
) -> None:
    folder = make_checkpoint(GROUPED, tmp_path, seed=9, dtype="float64")
    assert_equal_to_one(folder, mesh, [[IDS[:11], IDS[20:50]][: mesh.dp], [[5], [6, 7]][: mesh.dp]])


@pytest.mark.parametrize(
    "shares",
    [[[IDS[:9], []], [[], [6, 7]]], [[[], IDS[:200]], [[], [3]]], [[[], []], [[4], [5]]]],
    ids=["now the one, now the other", "always the first", "both"],
)
@pytest.mark.parametrize("config", [CONFIG, GROUPED], ids=["latent", "grouped"])
@pytest.mark.parametrize("mesh", [Mesh(dp=2), Mesh(dp=2, tp=2)], ids=str)
def test_a_rank_without_rows_takes_part_and_gives_nothing(
    tmp_path: Path, config: dict[str, Any], mesh: Mesh, shares: list[list[list[int]]]
) -> None:
    assert_equal_to_one(make_checkpoint(config, tmp_path, seed=9, dtype="float64"), mesh, shares)


@pytest.mark.parametrize("config", [CONFIG, GROUPED], ids=["latent", "grouped"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_a_step_without_rows_gives_no_logits_and_writes_nothing(
    tmp_path: Path, config: dict[str, Any], dtype: Any
) -> None:
    model = load(make_checkpoint(config, tmp_path, seed=9), dtype=dtype, pages=4, page_tokens=PAGE)
    empty = FlatBatch(
        ids=np.zeros(0, np.int64),
        positions=np.zeros(0, np.int64),
        slots=np.zeros(0, np.int64),
        runs=(),
        select=np.zeros(0, np.int64),
    )
    assert model.forward(empty).shape == (0, 300)
    assert all(not pool.any() for pool in model.pools.tensors)


def test_attention_and_feed_forward_cost_one_all_reduce_each_under_tp(folder: Path) -> None:
    found = Ranks(folder, Mesh(tp=2)).plan.collectives
    kinds = [step.kind for step in found]
    assert kinds == ["all_reduce"] * (1 + 2 * 3) + ["all_gather"]
    assert found[-1].between == ("head", "the output")


def test_experts_spread_over_dp_gather_tokens_before_and_scatter_sums_after(folder: Path) -> None:
    found = Ranks(folder, Mesh(dp=2)).plan.collectives
    assert [step.kind for step in found] == ["all_gather", "reduce_scatter"] * 2 + ["all_gather"]


@pytest.mark.parametrize("mesh", [Mesh(tp=3), Mesh(dp=16), Mesh(tp=8)], ids=str)
def test_a_mesh_that_does_not_divide_the_model_is_refused(folder: Path, mesh: Mesh) -> None:
    source = read_source(folder)
    with pytest.raises(EngineFault, match="does not divide by"):
        check_cuts(source.family.cuts(source.config, mesh))

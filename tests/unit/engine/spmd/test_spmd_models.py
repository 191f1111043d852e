"""The deepseek chain over several logical ranks gives what one rank gives, in float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.models.catalog import load, read_source
from agentspeed_engine.models.inputs import FlatBatch
from agentspeed_engine.models.mesh import check_cuts
from agentspeed_engine.spmd.experts import ExpertSpread
from agentspeed_engine.spmd.placement import Mesh
from tests.conformance.family_configs import random_config
from tests.support.logical_ranks import PAGE, LogicalRanks, assert_equal_to_one
from tests.support.paged import CONFIG
from tests.support.random_checkpoint import make_checkpoint

SUM, SENT = ExpertSpread(), ExpertSpread(exchange="all_to_all")
IDS = np.random.default_rng(8).integers(0, 300, 200).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(CONFIG | {"attention_bias": True}, tmp_path_factory.mktemp("model"), seed=9, dtype="float64")


MESHES = [
    Mesh(tp=2), Mesh(tp=4), Mesh(dp=2), Mesh(dp=2, tp=2), Mesh(dp=2, experts=SENT), Mesh(dp=2, tp=2, experts=SENT),
]  # fmt: skip


def short(mesh: Mesh) -> str:
    spread = mesh.experts
    words = [f"dp{mesh.dp}", f"tp{mesh.tp}", f"ep{mesh.expert_groups}", spread.exchange, f"spare{spread.spare}"]
    return "-".join([*words, "loads"] if spread.loads else words)


@pytest.mark.parametrize("mesh", [Mesh(), *MESHES], ids=short)
def test_ranks_together_give_the_logits_of_one(folder: Path, mesh: Mesh) -> None:
    """Two steps, so that every rank reads the latents it wrote; dp ranks have uneven shares."""
    assert_equal_to_one(folder, mesh, [[IDS[:11], IDS[20:50]][: mesh.dp], [[5], [6, 7]][: mesh.dp]])


GROUPED = random_config("qwen3_moe", 0) | {
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 12, "hidden_size": 48, "num_experts": 8,
    "intermediate_size": 64, "decoder_sparse_step": 1, "mlp_only_layers": [0], "attention_bias": True,
}  # fmt: skip


@pytest.mark.parametrize("mesh", MESHES, ids=short)
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
@pytest.mark.parametrize("spread", [SUM, SENT], ids=["sum", "sent"])
@pytest.mark.parametrize("mesh", [Mesh(dp=2), Mesh(dp=2, tp=2)], ids=str)
def test_a_rank_without_rows_takes_part_and_gives_nothing(
    tmp_path: Path, config: dict[str, Any], mesh: Mesh, spread: ExpertSpread, shares: list[list[list[int]]]
) -> None:
    meshed = replace(mesh, experts=spread)
    assert_equal_to_one(make_checkpoint(config, tmp_path, seed=9, dtype="float64"), meshed, shares)


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
    found = LogicalRanks(folder, Mesh(tp=2)).plan.collectives
    kinds = [step.kind for step in found]
    assert kinds == ["all_reduce"] * (1 + 2 * 3) + ["all_gather"]
    assert found[-1].between == ("head", "the output")


def test_experts_spread_over_dp_gather_tokens_before_and_scatter_sums_after(folder: Path) -> None:
    found = LogicalRanks(folder, Mesh(dp=2)).plan.collectives
    assert [step.kind for step in found] == ["all_gather", "reduce_scatter"] * 2 + ["all_gather"]


@pytest.mark.parametrize("mesh", [Mesh(tp=3), Mesh(dp=16), Mesh(tp=8)], ids=str)
def test_a_mesh_that_does_not_divide_the_model_is_refused(folder: Path, mesh: Mesh) -> None:
    source = read_source(folder)
    with pytest.raises(EngineFault, match="does not divide by"):
        check_cuts(source.family.cuts(source.config, mesh))


@pytest.mark.parametrize("exchange", ["sum", "all_to_all"])
@pytest.mark.parametrize(
    ("dp", "tp", "spread"),
    [
        (2, 2, ExpertSpread(groups=2)),
        (2, 2, ExpertSpread(groups=1)),
        (2, 2, ExpertSpread(spare=4)),
        (3, 1, ExpertSpread(spare=1)),
        (3, 2, ExpertSpread(groups=2)),
        (4, 1, ExpertSpread(spare=4, loads=(9, 1, 1, 5, 1, 1, 1, 1))),
        (4, 1, ExpertSpread(loads=(9, 1, 1, 5, 1, 1, 1, 1))),
    ],
    ids=str,
)
def test_groups_of_experts_and_spare_copies_change_no_logit(
    folder: Path, exchange: Any, dp: int, tp: int, spread: ExpertSpread
) -> None:
    """Groups that lie across dp ranks are among them, and a rank without rows that has experts others chose."""
    mesh = Mesh(dp=dp, tp=tp, experts=replace(spread, exchange=exchange))
    steps = [[IDS[:5], [], IDS[20:38], IDS[60:61]][:dp], [[5], [6, 7], [], IDS[50:55]][:dp]]
    assert_equal_to_one(folder, mesh, steps)


def test_rows_are_sent_to_experts_and_come_back_instead_of_being_gathered_and_summed(folder: Path) -> None:
    found = LogicalRanks(folder, Mesh(dp=2, tp=2, experts=SENT)).plan.collectives
    summed, sent = ("all_reduce", "tp"), [("dispatch", "dp"), ("combine", "dp")]
    dense, routed = [summed, summed], [summed, *sent, summed]
    assert [(step.kind, step.axis) for step in found] == [
        summed, *dense, *routed, *routed, ("all_gather", "dp"), ("all_gather", "tp"),
    ]  # fmt: skip


def test_every_sum_before_a_norm_is_one_pass_with_it(folder: Path) -> None:
    """Behind the embedding, attention and each feed-forward; not where a sum is cut along dp."""
    assert LogicalRanks(folder, Mesh(tp=2)).plan.fused == 1 + 2 * 3
    assert LogicalRanks(folder, Mesh(dp=2, tp=2, experts=SENT)).plan.fused == 1 + 2 * 3
    assert LogicalRanks(folder, Mesh(dp=2)).plan.fused == 0

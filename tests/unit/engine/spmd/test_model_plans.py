"""A model planned on a mesh from its configuration alone: against arithmetic by hand, and against what ranks hold."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.models.catalog import read_source
from agentspeed_engine.models.kv_pools import KvPools
from agentspeed_engine.models.loaded import weight_source
from agentspeed_engine.models.mesh_choice import Weights
from agentspeed_engine.models.moe import Places
from agentspeed_engine.models.planning import plan_model
from agentspeed_engine.spmd.placement import Mesh
from agentspeed_engine.spmd.report import ModelPlan, room_in
from agentspeed_kernels.ops import OPS
from agentspeed_kernels.platform import Platform
from agentspeed_kernels.registry import standard
from agentspeed_kernels.selection import Kernels
from tests.conformance.family_configs import random_config
from tests.support.paged import CONFIG
from tests.support.random_checkpoint import make_checkpoint

V3 = Path(__file__).parents[4] / "bench/models/deepseek-v3.json"
GB = 10**9
GROUPED = random_config("qwen3_moe", 0) | {
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 12, "hidden_size": 48, "num_experts": 8,
    "intermediate_size": 64, "decoder_sparse_step": 1, "mlp_only_layers": [0], "attention_bias": True,
}  # fmt: skip


def v3(mesh: Mesh, memory: int | None = None, **options: Any) -> ModelPlan:
    return plan_model(read_source(f"random:{V3}"), mesh, dtype="bfloat16", rows=512, memory=memory, **options)


@pytest.fixture(scope="module")
def sixteen() -> ModelPlan:
    return v3(Mesh(tp=16), memory=141 * GB)


def test_v3_has_671_billion_parameters_of_which_a_token_meets_37(sixteen: ModelPlan) -> None:
    hidden, heads = 7168, 128
    attention = (
        hidden * 1536 + 1536 + 1536 * heads * 192  # queries, through their low rank
        + hidden * 576 + 512 + 512 * heads * 256  # the latent, and keys and values from it
        + heads * 128 * hidden  # output
    )  # fmt: skip
    expert, router, norms, vocabulary = 3 * hidden * 2048, 256 * hidden + 256, 2 * hidden, 129280 * hidden
    dense = 3 * hidden * 18432
    outside = 61 * (attention + norms) + 3 * dense + 58 * (router + expert) + hidden + vocabulary  # one shared expert
    assert sixteen.parameters == outside + 58 * 256 * expert + vocabulary == 671_026_419_200
    assert sixteen.active_parameters == outside + 58 * 8 * expert
    assert round(sixteen.active_parameters / 1e9) == 37


def test_v3_keeps_70272_bytes_of_a_token_on_every_rank_of_tp(sixteen: ModelPlan) -> None:
    assert sixteen.cache_bytes_per_token == 61 * (512 + 64) * 2 == 70_272


def test_v3_sums_once_after_attention_and_once_after_the_feed_forward_of_each_layer(sixteen: ModelPlan) -> None:
    """Beside them the embedding is summed, and the logits are gathered."""
    kinds = [line.kind for line in sixteen.collectives]
    assert kinds == ["all_reduce"] * (1 + 2 * 61) + ["all_gather"]
    assert sixteen.launches == 124
    sums = 123 * (2 * 15 * (7168 * 2) // 16)
    assert sixteen.bytes_per_token == sums + 15 * (129280 * 2) // 16
    assert {line.before for line in sixteen.collectives[:-1]} == {(512, 7168)}
    assert (sixteen.collectives[-1].before, sixteen.collectives[-1].after) == ((512, 129280 // 16), (512, 129280))


def test_v3_over_dp_gathers_tokens_for_its_experts_and_cuts_the_sums_again() -> None:
    plan = v3(Mesh(dp=16))
    assert [line.kind for line in plan.collectives] == ["all_gather", "reduce_scatter"] * 58
    gathered, scattered = plan.collectives[:2]
    assert (gathered.before, gathered.after) == ((512, 7168), (16 * 512, 7168))
    assert (scattered.before, scattered.after) == ((16 * 512, 7168), (512, 7168))
    assert scattered.bytes_sent == 2 * gathered.bytes_sent, "it runs as an all-reduce"


def test_what_the_weights_leave_of_a_memory_is_cache(sixteen: ModelPlan) -> None:
    room = sixteen.room
    assert room is not None
    assert room.cache == 141 * GB - 141 * GB // 16 - sixteen.weight_bytes - sixteen.workspace_bytes
    assert room.tokens == room.cache // (70_272 * 64) * 64
    assert (room.largest_context, room.sessions) == (163_840, room.tokens // 163_840)


def test_a_memory_too_small_for_the_weights_holds_no_session() -> None:
    room = room_in(100, weights=99, workspace=0, bytes_per_token=1, page_tokens=4, limit=8, session_tokens=None, dp=1)
    assert (room.tokens, room.largest_context, room.sessions) == (0, 0, 0) and room.cache < 0


def test_sessions_take_whole_pages_and_every_dp_rank_has_some() -> None:
    room = room_in(160, weights=50, workspace=0, bytes_per_token=1, page_tokens=8, limit=999, session_tokens=9, dp=3)
    assert (room.cache, room.tokens, room.largest_context, room.sessions) == (100, 96, 96, 6 * 3)


def test_the_next_cut_that_fails_is_named(sixteen: ModelPlan) -> None:
    tp = next(limit for limit in sixteen.limits if limit.axis == "tp")
    assert (tp.most, tp.fails_at) == (128, 256) and "num_attention_heads 128" in tp.reason
    with pytest.raises(EngineFault, match="does not divide by 3 ranks"):
        v3(Mesh(tp=3))


def test_a_session_longer_than_the_models_context_is_refused() -> None:
    with pytest.raises(EngineFault, match="longer than the model's context of 163840"):
        v3(Mesh(tp=16), memory=GB, session_tokens=163_841)


@pytest.mark.parametrize("config", [CONFIG, GROUPED], ids=["latent", "grouped"])
@pytest.mark.parametrize("mesh", [Mesh(), Mesh(tp=2), Mesh(tp=4), Mesh(dp=2), Mesh(dp=2, tp=2)], ids=str)
def test_planned_weights_are_the_bytes_that_a_rank_holds(tmp_path: Path, config: dict[str, Any], mesh: Mesh) -> None:
    source = read_source(make_checkpoint(config, tmp_path, seed=2))
    plain = Platform(device="cpu", arch="any", features=frozenset())
    kernels = Kernels(standard(), plain, "float32", tuple(OPS))
    pools = KvPools(source.family.kv_layout(source.config, "float32", mesh), 1, 8)
    chain = source.family.build(source.config, weight_source(source, "float32"), pools, mesh.rank(0), kernels)
    theirs = {tensor.untyped_storage().data_ptr() for tensor in pools.tensors}
    held: dict[int, int] = {}
    left: list[Any] = [chain]
    while left:
        value = left.pop()
        if isinstance(value, torch.Tensor) and (at := value.untyped_storage().data_ptr()) not in theirs:
            held[at] = value.untyped_storage().nbytes()
        elif isinstance(value, list | tuple):
            left += value
        elif type(value).__module__.startswith("agentspeed_engine.models") and not isinstance(value, Places):
            left += [getattr(value, name) for name in getattr(type(value), "__slots__", ())]
    assert plan_model(source, mesh, dtype="float32", rows=3).weight_bytes == sum(held.values())


@pytest.mark.parametrize("mesh", [Mesh(), Mesh(tp=16), Mesh(dp=4, tp=4)], ids=str)
def test_v3_in_fp8_is_half_of_v3_in_bfloat16_but_for_what_stays(mesh: Mesh) -> None:
    """The embedding, the head, the router and the matrices that attention absorbs stay, and scales come on top."""
    source = read_source(f"random:{V3}")
    wide, kept = v3(mesh).weight_bytes, v3(mesh, weights="fp8").weight_bytes
    assert 0.5 < kept / wide < 0.515
    assert Weights(source, "fp8").bytes(mesh, "bfloat16") == kept


def test_v3_is_planned_within_ten_seconds_and_two_gigabytes() -> None:
    """In a process of its own, imports and all; seconds of processor time, for others may be busy here."""
    code = (
        "from agentspeed_engine.models.catalog import read_source\n"
        "from agentspeed_engine.models.planning import plan_model\n"
        "from agentspeed_engine.spmd.placement import Mesh\n"
        f"plan_model(read_source('random:{V3}'), Mesh(tp=16), dtype='bfloat16', rows=512)\n"
        "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    paths = [path for path in sys.path if path]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {paths!r}\n{code}"],
        timeout=100, check=True, capture_output=True, text=True,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10
    assert int(done.stdout) * 1024 < 2 * GB

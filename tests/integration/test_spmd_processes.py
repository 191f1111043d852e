"""The compiled chain in real processes over gloo gives the logits of one process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agentspeed_engine.models.catalog import load
from tests.conformance.family_configs import random_config
from tests.support.paged import CONFIG, Trail, batch
from tests.support.random_checkpoint import make_checkpoint

PAGE, RANKS = 8, 4
IDS = np.random.default_rng(3).integers(0, 300, 40).tolist()
GROUPED = random_config("qwen3_moe", 0) | {
    "hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "num_experts": 8,
    "intermediate_size": 64,
}  # fmt: skip
SENT = {"exchange": "all_to_all"}
CASES: dict[str, tuple[str, int, int, list[list[int]], dict[str, Any]]] = {
    "tp": ("latent", 1, 4, [IDS[:17]], {}),
    "uneven": ("latent", 2, 2, [IDS[:17], IDS[20:25]], {}),
    "without rows": ("latent", 2, 2, [IDS[:17], []], {}),
    "sent": ("latent", 2, 2, [IDS[:3], IDS[20:29]], SENT),
    "sent, spare, without rows": ("latent", 4, 1, [IDS[:5], [], IDS[7:8], []], SENT | {"spare": 4}),
    "grouped, uneven": ("grouped", 2, 2, [IDS[:17], IDS[20:25]], {}),
    "grouped, sent, without rows": ("grouped", 2, 2, [[], IDS[20:29]], SENT),
}
"""Name -> (model, dp, tp, ids of every dp rank's sequence, how experts lie)."""
RANK = """
import sys
sys.path[:0] = {paths!r}
import json, torch, torch.distributed as dist
from pathlib import Path
from agentspeed_engine.models.catalog import read_source
from agentspeed_engine.models.kv_pools import KvPools
from agentspeed_engine.models.loaded import step_state, weight_source
from agentspeed_engine.models.rope import Rope
from agentspeed_engine.spmd.distributed import DistributedComm
from agentspeed_engine.spmd.experts import ExpertSpread
from agentspeed_engine.spmd.lower import lower, run
from agentspeed_engine.spmd.placement import Mesh
from agentspeed_engine.spmd.plan import fuse, plan
from agentspeed_engine.spmd.spec import EVERYWHERE, TOKEN_SHARD
from agentspeed_kernels.ops import OPS
from agentspeed_kernels.platform import detect
from agentspeed_kernels.registry import standard
from agentspeed_kernels.selection import Kernels
from agentspeed_kernels.workspace import Workspace
from tests.support.paged import Trail, batch
index, out = int(sys.argv[1]), Path(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{{out}}/meet", rank=index, world_size={ranks})
kernels = Kernels(standard(), detect(), "float64", tuple(OPS))
for name, (model, dp, tp, shares, spread) in json.loads((out / "cases.json").read_text()).items():
    mesh = Mesh(dp=dp, tp=tp, experts=ExpertSpread(**spread))
    rank, source = mesh.rank(index), read_source(out / model)
    family, config = source.family, source.config
    pools = KvPools(family.kv_layout(config, "float64", mesh), 16, {page})
    chain = family.build(config, weight_source(source, "float64"), pools, rank, kernels)
    declared = [module.boundary for module in chain]
    made = fuse(plan(declared, mesh, start=TOKEN_SHARD, finish=EVERYWHERE), declared)
    mine = batch({page}, [(Trail({page}, list(range(10))), shares[rank.dp])])
    _, state = step_state(mine, Rope(config.rope, config.context_limit, torch.float64), {page}, Workspace())
    steps = lower(made, chain, DistributedComm(rank))
    logits = run(steps, torch.from_numpy(mine.ids), state, [len(share) for share in shares])
    torch.save(logits, out / f"{{name}} {{index}}.pt")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases in one group of processes, which take longer to start than to run."""
    folder = tmp_path_factory.mktemp("ranks")
    for name, config in (("latent", CONFIG), ("grouped", GROUPED)):
        make_checkpoint(config, folder / name, seed=11, dtype="float64")
    (folder / "cases.json").write_text(json.dumps(CASES))
    code = RANK.format(paths=[path for path in sys.path if path], page=PAGE, ranks=RANKS)
    processes = [subprocess.Popen([sys.executable, "-c", code, str(index), str(folder)]) for index in range(RANKS)]
    try:
        assert [process.wait(timeout=100) for process in processes] == [0] * RANKS
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return folder


@pytest.mark.parametrize("name", CASES)
def test_processes_give_the_logits_of_one(ran: Path, name: str) -> None:
    """Also where some have no rows in a step. With sums fused, and rows sent to their experts."""
    model_name, dp, _, shares, _ = CASES[name]
    model = load(ran / model_name, dtype="float64", pages=64, page_tokens=PAGE)
    alone = [Trail(PAGE, list(range(10 * i, 10 * i + 10))) for i in range(dp)]
    wanted = torch.cat([model.forward(batch(PAGE, [(t, s)])) for t, s in zip(alone, shares, strict=True)])
    for index in range(RANKS):
        got = torch.load(ran / f"{name} {index}.pt")
        assert got.shape == wanted.shape and float((got - wanted).abs().max()) < 1e-12

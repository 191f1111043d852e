"""The compiled chain in real processes over gloo gives the logits of one process."""

from __future__ import annotations

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

PAGE = 8
IDS = np.random.default_rng(3).integers(0, 300, 40).tolist()
RANK = """
import sys
sys.path[:0] = {paths!r}
import torch, torch.distributed as dist
from pathlib import Path
from agentspeed_engine.models.catalog import read_source
from agentspeed_engine.models.kv_pools import KvPools
from agentspeed_engine.models.loaded import step_state, weight_source
from agentspeed_engine.models.rope import Rope
from agentspeed_engine.spmd.distributed import DistributedComm
from agentspeed_engine.spmd.lower import lower, run
from agentspeed_engine.spmd.placement import TOKENS, Layout, Mesh, Replicate, Shard
from agentspeed_engine.spmd.plan import plan
from agentspeed_engine.spmd.spec import EVERYWHERE
from agentspeed_kernels.ops import OPS
from agentspeed_kernels.platform import detect
from agentspeed_kernels.registry import standard
from agentspeed_kernels.selection import Kernels
from agentspeed_kernels.workspace import Workspace
from tests.support.paged import Trail, batch
index, out, shares = int(sys.argv[1]), Path(sys.argv[2]), {shares!r}
mesh = Mesh(dp=int(sys.argv[3]), tp=int(sys.argv[4]))
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{{out}}/meet", rank=index, world_size=mesh.size)
rank, kind = mesh.rank(index), torch.float64
source = read_source(Path({folder!r}))
family, config = source.family, source.config
pools = KvPools(family.kv_layout(config, 'float64', mesh), 16, {page})
kernels = Kernels(standard(), detect(), "float64", tuple(OPS))
chain = family.build(config, weight_source(source, 'float64'), pools, rank, kernels)
start = Layout(dp=Shard(TOKENS), tp=Replicate())
made = plan([module.boundary for module in chain], mesh, start=start, finish=EVERYWHERE)
mine = batch({page}, [(Trail({page}, list(range(10))), shares[rank.dp])])
_, state = step_state(mine, Rope(config.rope, config.context_limit, kind), {page}, Workspace())
steps = lower(made, chain, DistributedComm(rank))
logits = run(steps, torch.from_numpy(mine.ids), state, [len(share) for share in shares])
torch.save(logits, out / f"{{index}}.pt")
dist.barrier()
dist.destroy_process_group()
"""


GROUPED = random_config("qwen3_moe", 0) | {
    "hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "num_experts": 8,
    "intermediate_size": 64,
}  # fmt: skip


@pytest.mark.parametrize(("dp", "tp", "second"), [(1, 2, None), (2, 1, IDS[20:25]), (2, 1, [])], ids=str)
@pytest.mark.parametrize("config", [CONFIG, GROUPED], ids=["latent", "grouped"])
def test_two_processes_give_the_logits_of_one(
    tmp_path: Path, config: dict[str, Any], dp: int, tp: int, second: list[int] | None
) -> None:
    """Also when one of them has no rows in a step."""
    folder = make_checkpoint(config, tmp_path / "model", seed=11, dtype="float64")
    shares = [IDS[:17]] if second is None else [IDS[:17], second]
    paths = [path for path in sys.path if path]
    code = RANK.format(paths=paths, folder=str(folder), page=PAGE, shares=shares)
    ranks = [
        subprocess.Popen([sys.executable, "-c", code, str(index), str(tmp_path), str(dp), str(tp)])
        for index in range(dp * tp)
    ]
    try:
        assert [rank.wait(timeout=50) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    model = load(folder, dtype="float64", pages=32, page_tokens=PAGE)
    alone = [Trail(PAGE, list(range(10 * i, 10 * i + 10))) for i in range(dp)]
    wanted = torch.cat([model.forward(batch(PAGE, [(t, s)])) for t, s in zip(alone, shares, strict=True)])
    for index in range(dp * tp):
        got = torch.load(tmp_path / f"{index}.pt")
        assert float((got - wanted).abs().max()) < 1e-10

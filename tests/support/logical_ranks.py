"""A model over N logical ranks in this process, against the same model over one."""

from __future__ import annotations

from pathlib import Path

import torch

from agentspeed_engine.models.catalog import load, read_source
from agentspeed_engine.models.inputs import FlatBatch
from agentspeed_engine.models.kv_pools import KvPools
from agentspeed_engine.models.loaded import step_state, weight_source
from agentspeed_engine.models.rope import Rope
from agentspeed_engine.spmd.logical import run_logical
from agentspeed_engine.spmd.placement import Mesh
from agentspeed_engine.spmd.plan import Plan, fuse, plan
from agentspeed_engine.spmd.spec import EVERYWHERE, TOKEN_SHARD
from agentspeed_kernels.ops import OPS
from agentspeed_kernels.platform import detect
from agentspeed_kernels.registry import standard
from agentspeed_kernels.selection import Kernels
from agentspeed_kernels.workspace import Workspace
from tests.support.paged import Trail, batch

PAGE = 8


class LogicalRanks:
    """N ranks of one model, in float64."""

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
        self.plan: Plan = fuse(plan(boundaries, mesh, start=TOKEN_SHARD, finish=EVERYWHERE), boundaries)

    def forward(self, batches: list[FlatBatch]) -> list[torch.Tensor]:
        """One batch per dp rank, the same for its tp ranks."""
        mine = [batches[rank.dp] for rank in self.mesh.ranks()]
        states = [step_state(b, self.rope, PAGE, w)[1] for b, w in zip(mine, self.workspaces, strict=True)]
        inputs = [torch.from_numpy(b.ids) for b in mine]
        return run_logical(self.plan, self.chains, inputs, states, [len(b.ids) for b in batches])


def assert_equal_to_one(folder: Path, mesh: Mesh, steps: list[list[list[int]]]) -> None:
    """`steps[i][dp]` are the ids of a dp rank's one sequence in a step."""
    ranks, trails = LogicalRanks(folder, mesh), [Trail(PAGE, list(range(3, 31))) for _ in range(mesh.dp)]
    alone = load(folder, dtype="float64", pages=128, page_tokens=PAGE)
    trails_alone = [Trail(PAGE, list(range(30 * i, 30 * i + 30))) for i in range(mesh.dp)]
    for step in steps:
        wanted = torch.cat(
            [alone.forward(batch(PAGE, [(trail, ids)])) for trail, ids in zip(trails_alone, step, strict=True)]
        )
        got = ranks.forward([batch(PAGE, [(trail, ids)]) for trail, ids in zip(trails, step, strict=True)])
        assert all(piece.shape == wanted.shape and torch.allclose(piece, wanted, rtol=0, atol=1e-12) for piece in got)

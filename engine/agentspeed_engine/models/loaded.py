"""A model in memory: its compiled chain, its cache, and the moves of pages the engine orders."""

from __future__ import annotations

from typing import final

import numpy as np
import torch
from torch import Tensor

from agentspeed_engine.models.attention_plan import plan_attention
from agentspeed_engine.models.catalog import Dtype, ModelInfo, ModelSource
from agentspeed_engine.models.checkpoint import Checkpoint
from agentspeed_engine.models.inputs import FlatBatch
from agentspeed_engine.models.kv_pools import TORCH_DTYPES, KvPools
from agentspeed_engine.models.programs import Programs
from agentspeed_engine.models.rope import Rope
from agentspeed_engine.models.state import StepState
from agentspeed_engine.models.weights import RandomWeights, WeightSource
from agentspeed_engine.spmd.lower import lower, run
from agentspeed_engine.spmd.placement import ONE
from agentspeed_engine.spmd.plan import Plan, plan
from agentspeed_engine.spmd.spec import EVERYWHERE
from agentspeed_kernels.ops import OPS
from agentspeed_kernels.platform import detect
from agentspeed_kernels.registry import standard
from agentspeed_kernels.selection import Kernels
from agentspeed_kernels.workspace import Workspace


def weight_source(source: ModelSource, dtype: Dtype) -> WeightSource:
    """The files of a folder, checked, or chance. Raises `EngineFault`."""
    if source.random:
        return RandomWeights(dict(source.family.shapes(source.config)), TORCH_DTYPES[dtype])
    return Checkpoint(source.path, source.family, source.config, TORCH_DTYPES[dtype])


@final
class LoadedModel:
    """Not thread-safe: one worker thread drives it."""

    def __init__(
        self,
        source: ModelSource,
        info: ModelInfo,
        *,
        dtype: Dtype,
        pages: int,
        page_tokens: int,
        threads: int | None,
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.info = info
        self.page_tokens = page_tokens
        weights = weight_source(source, dtype)
        self.pools = KvPools(info.kv, pages, page_tokens)
        self._kernels = Kernels(standard(), detect(), dtype, tuple(OPS))
        chain = source.family.build(source.config, weights, self.pools, ONE, self._kernels)
        self.plan: Plan = plan([module.boundary for module in chain], ONE.mesh, start=EVERYWHERE, finish=EVERYWHERE)
        self._steps = lower(self.plan, chain, None)
        self._programs = Programs(self._steps, self._kernels)
        self._rope = Rope(source.config.rope, source.config.context_limit, TORCH_DTYPES[dtype])
        self._workspace = Workspace()

    @property
    def repeats(self) -> bool:
        """Whether steps of few rows may be recorded and repeated. Records are kept while it is False."""
        return self._programs.allowed

    @repeats.setter
    def repeats(self, allowed: bool) -> None:
        self._programs.allowed = allowed

    @torch.inference_mode()
    def forward(self, batch: FlatBatch) -> Tensor:
        """Logits [S, vocab] of the selected rows; the cache has the rows of all tokens afterwards."""
        state = step_state(batch, self._rope, self.page_tokens, self._workspace)
        ids = torch.from_numpy(batch.ids)
        repeated = self._programs.run(ids, state)
        if repeated is not None:
            return repeated
        logits: Tensor = run(self._steps, ids, state, (len(batch.ids),))
        return logits

    def copy_rows(self, src_page: int, dst_page: int, rows: int) -> None:
        """The first `rows` rows of a page, in every layer."""
        self.pools.copy_rows(src_page, dst_page, rows)


def step_state(batch: FlatBatch, rope: Rope, page_tokens: int, workspace: Workspace) -> StepState:
    cos, sin = rope.at(torch.from_numpy(batch.positions))
    few, many = plan_attention(batch.runs, batch.positions, page_tokens)
    return StepState(
        cos=cos,
        sin=sin,
        slots=torch.from_numpy(batch.slots),
        few=few,
        many=many,
        select=torch.from_numpy(np.ascontiguousarray(batch.select)),
        workspace=workspace,
    )

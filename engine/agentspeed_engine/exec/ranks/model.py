"""What a rank computes of one step, and how all ranks draw from it: the same lines on rank 0 and on the others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.exec.model import Model
from agentspeed_engine.exec.ranks.group import Group
from agentspeed_engine.exec.ranks.orders import SampleOrder, shard_sample
from agentspeed_engine.exec.ranks.shard_draw import draw_shards, together
from agentspeed_engine.exec.sampler import Draw
from agentspeed_engine.kv.views import PageCopy
from agentspeed_engine.models.inputs import FlatBatch


class ShardModel(Model, Protocol):
    """`logits` gives [S, ids of this rank]."""

    @property
    def first_id(self) -> int:
        """Of those of this rank."""
        ...


def shard_logits(model: ShardModel, batch: FlatBatch, copies: Iterable[PageCopy]) -> NDArray[Any]:
    """[S, ids of this rank], after the page copies."""
    for copy in copies:
        model.copy_rows(copy.src, copy.dst, copy.rows)
    return model.logits(batch)


def draw_together(
    group: Group, model: ShardModel, logits: NDArray[Any], samples: Sequence[SampleOrder]
) -> list[Draw | EngineFault]:
    """One for each sample, equal on all ranks. When it returns, every rank is through with the step. Raises
    `GroupBroken`."""
    first, count = model.first_id, logits.shape[1]
    rows = [shard_sample(one, first, count) for one in samples]
    return together(draw_shards(logits[: len(rows)], first, rows), group.gather)

"""What one rank of a model is started with, and what it makes of that: its group, and its piece of the model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, final

import msgspec

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.exec.noop import NoopModel
from agentspeed_engine.models.catalog import Dtype, load
from agentspeed_engine.models.weight_formats import WeightFormat
from agentspeed_engine.serve.noop_name import NOOP, noop_sizes
from agentspeed_engine.spmd.experts import ExpertSpread
from agentspeed_engine.spmd.placement import Mesh, Rank
from agentspeed_kernels.signature import CacheFormat

if TYPE_CHECKING:
    from agentspeed_engine.exec.ranks.group import Group
    from agentspeed_engine.exec.ranks.model import ShardModel


_LOG: Final = logging.getLogger("agentspeed.engine")


@final
@dataclass(frozen=True, slots=True)
class Files:
    """Memory that a rank shares: descriptors, None where it has nobody to share with."""

    tp: int | None
    """With those of its dp rank."""
    dp: int | None
    """With those that have its place on the others, where dp ranks are in lock-step."""


@final
class RankOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Everything is decided: a rank chooses nothing by itself."""

    model: str
    dtype: Dtype
    device: Literal["cpu", "cuda"]
    pages: int
    page_tokens: int
    threads: int | None
    host_slots: int
    tp: int
    ep: int | None
    rank: int
    seconds: float
    """How long one rank waits for another."""
    dp: int = 1
    lock_step: bool = False
    """Steps of dp ranks are taken together, because they share experts."""
    weights: WeightFormat | None = None
    cache: CacheFormat | None = None
    meet: str = ""
    """The folder where the ranks meet that use torch.distributed."""

    @property
    def place(self) -> Rank:
        """Among the ranks that compute with this one."""
        experts = ExpertSpread(groups=self.ep)
        if self.lock_step:
            return Mesh(dp=self.dp, tp=self.tp, experts=experts).rank(self.rank)
        return Mesh(tp=self.tp, experts=experts).rank(self.rank % self.tp)

    @property
    def dp_rank(self) -> int:
        """Whose rows it computes."""
        return self.rank // self.tp


def opened_group(options: RankOptions, memory: Files | None, arrived: Callable[[], None]) -> Group:
    """`memory`: the shared files. Where there are none, or no C library for them, the ranks use torch.distributed, and
    this returns when all have met; each finds the same, being on the same machine. `arrived`: called before."""
    # Imported late: what is wrong with options is answered before anything heavy is loaded.
    import torch

    from agentspeed_engine.exec.ranks.group import Alone, SharedMemory, TorchGroup

    place = options.place
    if place.mesh.size == 1:
        return Alone()
    if memory is not None:
        try:
            first = options.rank - place.index
            return SharedMemory(memory.tp, place, seconds=options.seconds, dp_file=memory.dp, first=first)
        except OSError as reason:
            _LOG.warning("ranks meet through gloo, not through shared memory: %s. Steps are slower", reason)
    arrived()
    folder = Path(options.meet) / ("all" if options.lock_step else str(options.dp_rank))
    try:
        folder.mkdir(exist_ok=True)
        return TorchGroup(folder, place, seconds=options.seconds, device=torch.device(options.device))
    except (OSError, RuntimeError) as error:
        raise EngineFault("rank_lost", f"The ranks did not meet: {error}.", "Start the engine again.") from error


def loaded_shard(options: RankOptions, group: Group, progress: Callable[[float], None] | None = None) -> ShardModel:
    """This rank's piece of the model, with its pool and its host slots. `progress` is told what part of its weights was
    read. Raises `EngineFault`."""
    rank = options.place
    if options.model.startswith(NOOP):
        vocabulary, seconds = noop_sizes(options.model)
        share = vocabulary // rank.mesh.tp
        return NoopModel(vocabulary, seconds, options.page_tokens, ids=range(rank.tp * share, (rank.tp + 1) * share))
    from agentspeed_engine.exec.torch_model import TorchModel

    loaded = load(
        options.model,
        dtype=options.dtype,
        pages=options.pages,
        page_tokens=options.page_tokens,
        threads=options.threads,
        device=options.device,
        weights=options.weights,
        cache=options.cache,
        rank=rank,
        comm=group.comm,
        recordable=group.recordable,
        progress=progress,
    )
    model = TorchModel(loaded)
    if options.host_slots:
        model.reserve_host(options.host_slots)
    return model

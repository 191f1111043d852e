"""What one rank of a model is started with, and what it makes of that: its group, and its piece of the model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, final

import msgspec

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.exec.noop import NoopModel
from agentspeed_engine.models.catalog import Dtype, load
from agentspeed_engine.serve.noop_name import NOOP, noop_sizes
from agentspeed_engine.spmd.experts import ExpertSpread
from agentspeed_engine.spmd.placement import Mesh, Rank

if TYPE_CHECKING:
    from agentspeed_engine.exec.ranks.group import Group
    from agentspeed_engine.exec.ranks.model import ShardModel


_LOG: Final = logging.getLogger("agentspeed.engine")


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
    meet: str = ""
    """The folder where the ranks meet that use torch.distributed."""

    @property
    def place(self) -> Rank:
        return Mesh(tp=self.tp, experts=ExpertSpread(groups=self.ep)).rank(self.rank)


def opened_group(options: RankOptions, memory: int | None) -> Group:
    """`memory`: descriptor of the shared file. Where there is none, or no C library for it, the ranks use
    torch.distributed, and this returns when all have met; each finds the same, being on the same machine."""
    # Imported late: what is wrong with options is answered before anything heavy is loaded.
    import torch

    from agentspeed_engine.exec.ranks.group import SharedMemory, TorchGroup

    if memory is not None:
        try:
            return SharedMemory(memory, options.place, seconds=options.seconds)
        except OSError as reason:
            _LOG.warning("ranks meet through gloo, not through shared memory: %s. Steps are slower", reason)
    try:
        return TorchGroup(
            Path(options.meet), options.place, seconds=options.seconds, device=torch.device(options.device)
        )
    except RuntimeError as error:
        raise EngineFault("rank_lost", f"The ranks did not meet: {error}.", "Start the engine again.") from error


def loaded_shard(options: RankOptions, group: Group) -> ShardModel:
    """This rank's piece of the model, with its pool and its host slots. Raises `EngineFault`."""
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
        rank=rank,
        comm=group.comm,
        recordable=group.recordable,
    )
    model = TorchModel(loaded)
    if options.host_slots:
        model.reserve_host(options.host_slots)
    return model

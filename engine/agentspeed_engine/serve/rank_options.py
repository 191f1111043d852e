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
from agentspeed_engine.models.catalog import Dtype, load, read_source
from agentspeed_engine.models.kv_layout import DTYPE_BYTES
from agentspeed_engine.models.weight_formats import WeightFormat
from agentspeed_engine.serve.capturing import captured
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
    launches: bool = False
    """Every rank launches steps and draws from them on a GPU of its own; else they draw together on the host."""
    depth: int = 0
    """Steps that are launched before an earlier one was collected, where that is so."""
    context_limit: int = 0
    most_new: int = 0
    """Tokens of a context, and of prompts in one step: what graphs of usual steps are captured for."""

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
    read. Raises `EngineFault`, and `GroupBroken` where another rank is gone."""
    rank = options.place
    if options.model.startswith(NOOP):
        vocabulary, seconds = noop_sizes(options.model)
        share = vocabulary // rank.mesh.tp
        return NoopModel(vocabulary, seconds, options.page_tokens, ids=range(rank.tp * share, (rank.tp + 1) * share))
    from agentspeed_engine.exec.torch_model import TorchModel

    if options.launches and (why := _reached(options, group)) is not None:
        _LOG.warning("GPUs do not write into each other's memory: %s. Steps of few rows are slower", why)
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
        agree=group.agree,
        whole_logits=options.launches,
        progress=progress,
    )
    model = TorchModel(loaded)
    if options.host_slots:
        model.reserve_host(options.host_slots)
    return model


def capture(
    options: RankOptions,
    model: ShardModel,
    say: Callable[[str], None],
    each: Callable[[int], None] = lambda count: None,
) -> None:
    """Graphs of usual steps, once all ranks have loaded: all capture the same ones in the same order; `each` is told
    their count with every one. Raises `EngineFault`, and `GroupBroken` where another rank is gone."""
    # Imported late, with the tensors that they need.
    from agentspeed_engine.exec.torch_model import TorchModel
    from agentspeed_engine.models.loaded import out_of_memory

    assert isinstance(model, TorchModel)
    with out_of_memory("graphs of steps"):
        captured(model.loaded, options.context_limit, options.most_new, say, each)


def _reached(options: RankOptions, group: Group) -> str | None:
    """Why GPUs do not sum in memory that all of them write; None where they do. It holds what graphs sum and gather."""
    from agentspeed_engine.exec.ranks.group import TorchGroup
    from agentspeed_engine.models.graphs import BUCKETS

    if not isinstance(group, TorchGroup):
        return None
    config, item = read_source(options.model).config, DTYPE_BYTES[options.dtype]
    rows = BUCKETS[-1]
    return group.reach(sum_bytes=rows * config.hidden * item, rows=rows, row_bytes=config.vocab_size * item)

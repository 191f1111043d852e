"""Ranks that launch steps and draw by themselves, as on GPUs, on the CPU: kernels run in Triton's interpreter.

    python -m tests.support.launching_ranks FOLDER CONFIG STEPS-FD COPIES-FD

is rank 1 of two. What is not CUDA's is what GPUs run: kernels, plans, graphs (which call their chain again), orders.
"""

from __future__ import annotations

import mmap
import os
import socket
import sys
from pathlib import Path
from typing import Any, cast

os.environ.setdefault("TRITON_INTERPRET", "1")
import torch
from torch import Tensor

import tests.triton_interpreter  # noqa: F401 - before any kernel
from agentspeed_engine.exec import cuda
from agentspeed_engine.exec.ranks import launches
from agentspeed_engine.exec.ranks.follower import Follower
from agentspeed_engine.exec.ranks.group import TorchGroup
from agentspeed_engine.exec.ranks.launches import Launcher
from agentspeed_engine.exec.ranks.orders import Channel
from agentspeed_engine.exec.torch_model import TorchModel
from agentspeed_engine.models import graphs
from agentspeed_engine.models.catalog import read_source
from agentspeed_engine.models.graphs import Graphs
from agentspeed_engine.models.inputs import FlatBatch
from agentspeed_engine.models.joined import joined
from agentspeed_engine.models.kv_pools import KvPools
from agentspeed_engine.models.loaded import step_state
from agentspeed_engine.models.rope import Rope
from agentspeed_engine.models.weights import RandomWeights
from agentspeed_engine.spmd.lower import Comm, lower, run
from agentspeed_engine.spmd.peer_comm import PeerComm
from agentspeed_engine.spmd.placement import Mesh, Rank
from agentspeed_engine.spmd.plan import fuse, plan
from agentspeed_engine.spmd.spec import TOKEN_SHARD
from agentspeed_kernels.platform import named
from agentspeed_kernels.registry import standard
from agentspeed_kernels.selection import Kernels
from agentspeed_kernels.triton.backend import attention_of
from agentspeed_kernels.triton.peers import PeerMemory
from agentspeed_kernels.workspace import Workspace
from tests.support.recorder import CallsAgain

PAGE, PAGES, RANKS, DEPTH = 16, 16, 2, 1
CPU = torch.device("cpu")
_KEPT: list[Tensor] = []
"""Memory of other ranks, of which only addresses are known elsewhere."""


class _Event:
    """What was enqueued is done."""

    def __init__(self, **_: object) -> None:
        pass

    def record(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


def without_cuda() -> None:
    """Events that have passed, and memory that needs no pins."""
    made: Any = torch.empty

    def empty(*shape: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        del pin_memory
        held: Tensor = made(*shape, **options)
        return held

    torch.empty = empty  # type: ignore[assignment]
    for module in (cuda, launches):
        module._cuda = type("Cuda", (), {"Event": _Event})  # type: ignore[attr-defined]
    graphs.BUCKETS = (1, 4)


class Loaded:
    """`models.loaded.LoadedModel` of one rank on the kernels of a GPU."""

    device = CPU
    page_tokens, first_id = PAGE, 0

    def __init__(self, config: Path, rank: Rank, comm: Comm | None, agree: Any) -> None:
        source = read_source(f"random:{config}")
        family, parsed = source.family, source.config
        sizes = {"page_tokens": PAGE, **family.sizes(parsed, rank.mesh)}
        kernels = Kernels(standard(), named("cuda:90"), "float32", family.ops_on("cuda"), sizes=sizes)
        self.pools = KvPools(family.kv_layout(parsed, "float32", rank.mesh), PAGES, PAGE)
        chain = family.build(
            parsed, RandomWeights(dict(family.shapes(parsed)), torch.float32), self.pools, rank, kernels
        )
        boundaries = [module.boundary for module in chain]
        self.plan = fuse(plan(boundaries, rank.mesh, start=TOKEN_SHARD, finish=TOKEN_SHARD), boundaries)
        self._steps = lower(self.plan, chain, comm)
        self._rope = Rope(parsed.rope, parsed.context_limit, torch.float32)
        self._attention = attention_of(sizes, CPU, 4)
        self.info = type("Info", (), {"vocab_size": parsed.vocab_size})
        self.graphs = Graphs(
            joined(chain, self.plan, comm), self._steps, self._by_modules, self.pools, parsed.vocab_size,
            self._rope, self._attention, CPU, recorder=CallsAgain(), agree=agree if rank.mesh.size > 1 else None,
        )  # fmt: skip

    def _by_modules(self, batch: FlatBatch) -> Tensor:
        ids, state = step_state(batch, self._rope, PAGE, Workspace(), self._attention)
        logits: Tensor = run(self._steps, ids, state, (len(batch.ids),))
        return logits

    def forward(self, batch: FlatBatch, name: Any) -> Tensor:
        found = self.graphs.run(batch, name)
        if found is not None:
            return found
        ids, state = step_state(batch, self._rope, PAGE, Workspace(), self._attention)
        name(ids)
        logits: Tensor = run(self._steps, ids, state, (len(batch.ids),))
        return logits

    def copy_rows(self, src: int, dst: int, rows: int) -> None:
        self.pools.copy_rows(src, dst, rows)


def model_of(config: Path, rank: Rank, folder: Path, group: TorchGroup | None) -> TorchModel:
    """`folder`: has the memory that ranks share."""
    comm: Comm | None = None
    if group is not None:
        parsed = read_source(f"random:{config}").config
        memory = PeerMemory(rank.tp, RANKS, CPU, sum_bytes=16 * parsed.hidden, rows=4, row_bytes=4 * parsed.vocab_size)
        files = [_mapped(folder / f"block-{one}", memory.block.numel()) for one in range(RANKS)]
        memory.block = files[rank.tp]
        memory.reach([one.data_ptr() for one in files])
        _KEPT.extend(files)
        comm = PeerComm(memory, cast(Any, group.comm))
    return TorchModel(cast(Any, Loaded(config, rank, comm, None if group is None else group.agree)))


def _mapped(path: Path, size: int) -> Tensor:
    file = os.open(path, os.O_RDWR | os.O_CREAT)
    os.ftruncate(file, size)
    held = torch.frombuffer(mmap.mmap(file, size), dtype=torch.uint8)
    os.close(file)
    return held


def main() -> None:
    folder, config = Path(sys.argv[1]), Path(sys.argv[2])
    steps, copies = (socket.socket(fileno=int(one)) for one in sys.argv[3:5])
    without_cuda()
    group = TorchGroup(folder, Mesh(tp=RANKS).rank(1), seconds=60, device=CPU)
    model = model_of(config, Mesh(tp=RANKS).rank(1), folder, group)
    launcher = Launcher(model, group, depth=DEPTH, seconds=60)
    Follower(model, group, Channel(steps), Channel(copies), launcher=launcher).run()


if __name__ == "__main__":
    main()

"""Starts the ranks of a model and loads rank 0's piece while the others load theirs: what leads them is ready then."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, final

from msgspec.structs import replace

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.exec.calibrate import calibrated
from agentspeed_engine.exec.vocabulary import Vocabulary
from agentspeed_engine.sched.config import CoreConfig
from agentspeed_engine.serve.aside import aside
from agentspeed_engine.serve.rank_options import RankOptions, capture, loaded_shard
from agentspeed_engine.serve.rank_processes import RankProcesses

if TYPE_CHECKING:
    from agentspeed_engine.exec.executor import Executor
    from agentspeed_engine.exec.ranks.group import Group
    from agentspeed_engine.exec.ranks.lock_step import LockStep
    from agentspeed_engine.exec.ranks.model import ShardModel


@final
@dataclass(frozen=True, slots=True)
class Started:
    core: CoreConfig
    """With what copies and prefill cost."""
    model: ShardModel
    """Rank 0's piece."""
    executors: tuple[Executor, ...]
    """Of every dp rank."""
    lock_step: LockStep | None
    ranks: RankProcesses


def started(
    options: RankOptions,
    core: CoreConfig,
    vocabulary: Vocabulary,
    say: Callable[[str], None],
    *,
    loads: bool,
    progress: Callable[[float], None] | None = None,
) -> Started:
    """`options` are those of rank 0, perhaps without threads. `loads`: the vocabulary has files. `progress` is told
    what part of rank 0's weights was read: the others read theirs meanwhile. Raises `EngineFault`; then no rank is
    left."""
    if options.threads is None and options.device == "cpu":
        options = replace(options, threads=max(1, _cores() // (options.dp * options.tp)))
    _gpu_for_each(options)
    ranks = RankProcesses(options, say)
    try:
        # Imported late: the other ranks have begun to load by now.
        from agentspeed_engine.exec.ranks.leader import LeadingExecutor
        from agentspeed_engine.exec.ranks.lock_step import LockStep
        from agentspeed_engine.exec.ranks.sides import Away, Home, Side

        with ThreadPoolExecutor(1) as beside:  # it takes the interpreter's lock for long
            unusable = beside.submit(vocabulary.load) if loads else None
            group = ranks.group()
            model = aside(lambda: loaded_shard(options, group, progress))
        if unusable is not None and unusable.result():
            say(f"turns with stop strings or a grammar will be refused: {unusable.result()}")
        if options.launches:
            return _launching(options, core, vocabulary, say, ranks, group, model)
        ranks.await_readiness()
        sides: list[Side] = [Home(model, group, ranks.followers(0))]
        sides += [Away(ranks.followers(dp), options.page_tokens) for dp in range(1, options.dp)]
        executors = tuple(LeadingExecutor(side, vocabulary, ranks, depth=core.depth) for side in sides)
        lock_step = LockStep(executors) if options.lock_step else None
        if options.host_slots:
            say("measuring what copies and prefill cost")
            core = aside(partial(calibrated, core, lock_step or executors[0]))
    except BaseException:
        ranks.close()
        raise
    return Started(core, model, executors, lock_step, ranks)


def _launching(
    options: RankOptions,
    core: CoreConfig,
    vocabulary: Vocabulary,
    say: Callable[[str], None],
    ranks: RankProcesses,
    group: Group,
    model: ShardModel,
) -> Started:
    """Ranks of one dp rank that each launch steps on a GPU."""
    from agentspeed_engine.exec.cuda import CudaExecutor
    from agentspeed_engine.exec.ranks.device_leader import DeviceLeader
    from agentspeed_engine.exec.torch_model import TorchModel

    assert isinstance(model, TorchModel)
    ranks.await_loaded()
    leader = DeviceLeader(ranks.followers(0), group, ranks, seconds=options.seconds)
    with leader.named():
        ranks.together(lambda: capture(options, model, say))
    ranks.await_readiness()
    executor = CudaExecutor(model, vocabulary, depth=core.depth, others=leader)
    if options.host_slots:
        say("measuring what copies and prefill cost")
        core = aside(partial(calibrated, core, executor))
    return Started(core, model, (executor,), None, ranks)


def _cores() -> int:
    """That this process may use, where the system says so; else those of the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _gpu_for_each(options: RankOptions) -> None:
    """Raises `EngineFault` (bad_options) where there are too few GPUs."""
    if options.device != "cuda":
        return
    import torch

    count, ranks = torch.cuda.device_count(), options.dp * options.tp
    if count < ranks:
        raise EngineFault(
            "bad_options",
            f"There are {ranks} ranks, each takes a GPU, and this process sees {count}.",
            "Give a smaller tp or dp, or device='cpu'.",
        )

"""What a fork costs: time in the engine, pages a child copies, and memory of eight branches that share a prefix.

    python bench/fork.py

`fork_us_*` time `core.handle(Fork)` on a branch at rest whose rows a real model computed (float32, small random model);
the engine runs in this process so that the clock stands around the verb alone. `pages_copied_per_child` and
`branch_memory_ratio` come from a real engine process. The prefix is no multiple of a page, so that every child needs
the copy. The last line is JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "engine"), str(ROOT / "kernels")]

from agentspeed_engine.exec.cpu import CpuExecutor
from agentspeed_engine.exec.worker import Worker
from agentspeed_engine.ids import LinkId, pages_for
from agentspeed_engine.protocol.messages import Close, Command, Fork, Forked, Generate, Open, Opened, Outgoing
from agentspeed_engine.protocol.token_ids import pack_ids
from agentspeed_engine.sched.core import Core
from agentspeed_engine.serve.options import EngineOptions, build
from tests.support.engine_client import engine
from tests.support.random_checkpoint import make_checkpoint

LINK = LinkId(1)
SHORT, LONG = 1024, 32 * 1024


def main() -> None:
    options = parse_arguments()
    config = json.loads(options.config.read_text())
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = make_checkpoint(config, Path(scratch) / "model")
        times = fork_times(checkpoint, options)
        memory = shared_memory(checkpoint, Path(scratch), options)
    figures: dict[str, float] = {**times, **memory}
    ratio = times["fork_us_32k"] / times["fork_us_1k"]
    print(
        f"fork_us_1k {times['fork_us_1k']:.1f}, fork_us_32k {times['fork_us_32k']:.1f} (must be <= 100), "
        f"ratio {ratio:.2f} (must be <= 1.3)"
    )
    print(
        f"pages_copied_per_child {memory['pages_copied_per_child']} (must be <= 1), "
        f"branch_memory_ratio {memory['branch_memory_ratio']} (must be <= 1.0)"
    )
    print(json.dumps({**figures, "fork_ratio_32k_1k": round(ratio, 3)}))


def fork_times(checkpoint: Path, options: argparse.Namespace) -> dict[str, float]:
    """Median microseconds of one fork of a branch of 1 k and of 32 k tokens, taken in turns."""
    built = build(
        EngineOptions(
            model=str(checkpoint),
            pages=2 * LONG // 64,
            context_limit=LONG + 64,
            threads=options.threads,
            prefill_chunk=1024,
        )
    )
    core, worker = Core(built.core), Worker(CpuExecutor(built.model, built.vocabulary))
    draw = random.Random(options.seed)
    branches = {}
    for name, tokens in (("fork_us_1k", SHORT), ("fork_us_32k", LONG)):
        ids = [draw.randrange(built.core.vocab_size) for _ in range(tokens + 1)]
        opened = reply(core, Open(request=1, ids=pack_ids(ids)))
        assert isinstance(opened, Opened)
        reply(core, Generate(request=2, branch=opened.branch, max_tokens=0))
        while (plan := core.plan(0.0)) is not None:
            core.apply(worker.execute(plan), 0.0)
        branches[name] = opened.branch
        print(f"{name}: {tokens} tokens computed")
    samples: dict[str, list[float]] = {name: [] for name in branches}
    gc.collect()
    gc.freeze()
    for _ in range(options.repeats):
        for name, branch in branches.items():
            started = time.perf_counter()
            forked = reply(core, Fork(request=3, branch=branch, n=1))
            samples[name].append((time.perf_counter() - started) * 1e6)
            assert isinstance(forked, Forked)
            reply(core, Close(request=4, branch=forked.branches[0]))
    core.check()
    medians = {name: round(statistics.median(values), 2) for name, values in samples.items()}
    p99 = {f"{name}_p99": round(statistics.quantiles(values, n=100)[98], 2) for name, values in samples.items()}
    return medians | p99


def shared_memory(checkpoint: Path, scratch: Path, options: argparse.Namespace) -> dict[str, float]:
    """Eight children of one prefix draw in a real engine; then every page is counted."""
    draw = random.Random(options.seed + 1)
    ids = [draw.randrange(400) for _ in range(options.prefix)]
    suffixes = [[draw.randrange(400) for _ in range(length)] for length in range(30, 30 + 20 * options.children, 20)]
    with engine(scratch, model=str(checkpoint), pages=1024, context_limit=16_384, threads=options.threads) as process:
        front = process.connect()
        trunk = front.open(ids)
        front.generate(trunk, max_tokens=0)
        before = front.counts()
        children = front.fork(trunk, options.children)
        turns = [
            front.start(child, suffix, max_tokens=options.drawn)
            for child, suffix in zip(children, suffixes, strict=True)
        ]
        front.finish(*turns)
        after = front.counts()
    page = 64
    own = sum(pages_for(len(suffix) + options.drawn, page) for suffix in suffixes)
    held = after["pages_total"] - after["pages_free"]
    return {
        "pages_copied_per_child": (after["pages_copied"] - before["pages_copied"]) / options.children,
        "branch_memory_ratio": round(held / (pages_for(options.prefix, page) + own + options.children), 4),
        "pages_held": held,
    }


def reply(core: Core, command: Command) -> Outgoing:
    """The engine's answer to one command."""
    return core.handle(LINK, command, 0.0)[0][1]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "bench/models/tiny.json")
    parser.add_argument("--prefix", type=int, default=2000)
    parser.add_argument("--children", type=int, default=8)
    parser.add_argument("--drawn", type=int, default=20, help="tokens each child draws")
    parser.add_argument("--repeats", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()

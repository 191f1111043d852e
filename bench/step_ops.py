"""Where a step's time goes, by op of the kernel library: how often each is called, how long it takes, what it reads and
computes, and how near that is to what the machine does. What bench/step.py --ops prints."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch

from agentspeed_engine.exec.sampler import draw
from agentspeed_engine.models.inputs import FlatBatch
from agentspeed_engine.models.loaded import LoadedModel
from agentspeed_engine.protocol.messages import Sampling
from agentspeed_kernels.cpu.recording import each_call, kernel_clock
from agentspeed_kernels.ops import OPS
from agentspeed_kernels.signature import DTYPE_BYTES, Cost, Dtype
from bench.kernels import reader

Batches = Iterator[tuple[Sequence[FlatBatch], Sequence[FlatBatch]]]
"""Of each round: steps that are run as they are, and as many that are run call by call."""
READ_BYTES = 256 << 20
SIDE = 2048
"""Of the square matrices whose product is the peak."""
SAMPLED = Sampling(temperature=0.8, top_p=0.95)
NAMES = {
    "linear": "linear", "heads_linear": "linear by heads", "experts": "feed-forward", "gqa_rows": "attention",
    "mla_rows": "attention", "gqa_extend": "attention", "mla_extend": "attention",
}  # fmt: skip
SMALL = "norms, rope, appends, route"
"""All other ops."""


@dataclass(frozen=True, slots=True)
class Attended:
    """What rows of a step read of the cache."""

    tokens: int
    """Read once, whatever the number of rows that see them."""
    pairs: int
    """Of a row and a token it sees."""


@dataclass(slots=True)
class Spent:
    """In one round, a step."""

    calls: float = 0.0
    ms: float = 0.0
    bytes: float = 0.0
    flops: float = 0.0


def attended(batch: FlatBatch) -> Attended:
    pairs = 0
    for run in batch.runs:
        seen = batch.positions[run.queries] - run.start + 1 if run.causal else np.full(len(run.queries), run.tokens)
        pairs += int(np.clip(seen, 0, run.tokens).sum())
    return Attended(sum(run.tokens for run in batch.runs), pairs)


def cost_of(op: str, given: Sequence[Any], read: Attended, item: int) -> Cost | None:
    """Of a C call, by what it was given (`native.arguments`); None where it is small."""

    def model(**sizes: int) -> Cost:
        return OPS[op].cost(sizes, item)

    if op == "linear":
        rows, outputs, inputs = given[6:9]
        return model(T=rows, N=outputs, K=inputs)
    if op == "heads_linear":
        rows, heads, outputs, inputs = given[7:11]
        return model(T=rows, H=heads, N=outputs, K=inputs)
    if op == "experts":
        rows, top, _, inner, hidden = given[-6:-1]
        chosen = (ctypes.c_int64 * (rows * top)).from_address(given[3])
        return model(T=rows, D=hidden, I=inner, top=top, hit=len(set(chosen)))
    if op in ("gqa_rows", "gqa_extend"):
        width, heads, groups = given[6:9]
        rows = 0 if op == "gqa_rows" else given[9]
        sizes = {"H": heads, "G": groups, "W": width}
        return Cost(bytes=model(T=rows, C=read.tokens, **sizes).bytes, flops=model(T=1, C=read.pairs, **sizes).flops)
    if op == "mla_rows":
        width, rank, heads = given[5:8]
        sizes = {"H": heads, "R": rank, "rope": width - rank}
        return Cost(bytes=model(T=0, C=read.tokens, **sizes).bytes, flops=model(T=1, C=read.pairs, **sizes).flops)
    if op == "mla_extend":
        heads, rank, nope, rope, value, rows = given[8:14]
        sizes = {"H": heads, "R": rank, "rope": rope, "nope": nope, "value": value}
        attend = model(T=1, C=read.pairs, **sizes).flops - model(T=0, C=read.pairs, **sizes).flops
        whole = model(T=rows, C=read.tokens, **sizes).bytes
        return Cost(bytes=whole, flops=attend + model(T=0, C=read.tokens, **sizes).flops)
    return None


def label(op: str, given: Sequence[Any], vocabulary: int) -> str:
    if op == "linear":
        outputs, inputs = given[7:9]
        return f"head {outputs}x{inputs}" if outputs == vocabulary else f"linear {outputs}x{inputs}"
    return f"{NAMES[op]} ({op})" if op in NAMES else SMALL


@dataclass(frozen=True, slots=True)
class Watch:
    """Adds each call of a step to what its op has spent."""

    spent: dict[str, Spent]
    read: Attended
    vocabulary: int
    item: int
    steps: int

    def __call__(self, op: str, given: tuple[Any, ...], taken: int) -> None:
        to = self.spent.setdefault(label(op, given, self.vocabulary), Spent())
        cost = cost_of(op, given, self.read, self.item)
        to.calls += 1 / self.steps
        to.ms += taken / self.steps / 1e6
        if cost is not None:
            to.bytes += cost.bytes / self.steps
            to.flops += cost.flops / self.steps


def clock() -> Callable[[], int]:
    """Nanoseconds: one thread's processor time, in which other processes count less, or the time that goes by."""
    return time.thread_time_ns if torch.get_num_threads() == 1 else time.perf_counter_ns


@dataclass(frozen=True, slots=True)
class Peaks:
    read: float
    """Bytes a second."""
    flops: float
    """A second."""

    def ms(self, spent: Spent) -> float:
        """The least that it can take."""
        return max(spent.bytes / self.read, spent.flops / self.flops) * 1e3


def peaks(dtype: torch.dtype, rounds: int = 7) -> Peaks:
    """What this machine reads in large pages, and what torch's product of large matrices comes to, medians in turns."""
    threads, now = torch.get_num_threads(), clock()
    read, left, right = reader(READ_BYTES, 1, threads, True), *(torch.randn(SIDE, SIDE).to(dtype) for _ in range(2))
    took: dict[str, list[int]] = {"read": [], "product": []}
    for _ in range(rounds + 1):
        for name, run in (("read", lambda: read(0)), ("product", lambda: left @ right)):
            started = now()
            run()
            took[name].append(now() - started)
    reading, product = (median(taken[1:]) / 1e9 for taken in took.values())
    return Peaks(READ_BYTES / reading, 2 * SIDE**3 / product)


def rounds_of(
    model: LoadedModel, batches: Batches, dtype: Dtype
) -> Iterator[tuple[float, float, float, dict[str, Spent]]]:
    """(Milliseconds a step, those outside kernels, those of sampling, by op)"""
    item, now = DTYPE_BYTES[dtype], clock()
    for plain, watched in batches:
        with kernel_clock() as inside:
            started = now()
            for batch in plain:
                logits = model.forward(batch)
            whole = now() - started
        outside = whole - inside()
        rows = [row.float().numpy() for row in logits]
        started = now()
        for at, row in enumerate(rows):
            draw(row, SAMPLED, (1, 2, at), at)
        sampling = now() - started
        spent: dict[str, Spent] = {}
        for batch in watched:
            with each_call(Watch(spent, attended(batch), model.info.vocab_size, item, len(watched))):
                model.forward(batch)
        yield whole / len(plain) / 1e6, outside / len(plain) / 1e6, sampling / 1e6, spent


def by_op(model: LoadedModel, batches: Batches, dtype: Dtype) -> dict[str, Any]:
    """Prints a line an op, and gives the figures."""
    machine = peaks(torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    found = list(rounds_of(model, batches, dtype))
    whole, outside, sampling = (median(values) for values in zip(*(row[:3] for row in found), strict=True))
    print(f"the machine: {machine.read / 1e9:.1f} GB/s read, {machine.flops / 1e9:.0f} GFLOP/s of a large product")
    figures: dict[str, Any] = {"read_gbs": round(machine.read / 1e9, 1), "peak_gflops": round(machine.flops / 1e9)}
    ops: dict[str, Any] = {}
    for name in sorted(found[-1][3], key=lambda name: -found[-1][3][name].ms):
        taken = [row[3][name].ms for row in found]
        one, ms = found[-1][3][name], median(taken)
        line = f"{name:30} {one.calls:5.1f} calls {ms:8.3f} ms ({min(taken):.3f} to {max(taken):.3f})"
        line += f"  share {ms / whole:.2f}"
        ops[name] = {"ms": round(ms, 3), "share": round(ms / whole, 3)}
        if one.bytes:
            gbs, gflops, of_bound = one.bytes / ms / 1e6, one.flops / ms / 1e6, machine.ms(one) / ms
            line += f"  {gbs:6.1f} GB/s {gflops:7.1f} GFLOP/s  {of_bound:.2f} of the bound"
            ops[name] |= {"gbs": round(gbs, 1), "gflops": round(gflops, 1), "of_bound": round(of_bound, 2)}
        print(line)
    print(f"{'outside kernels':30} {outside:20.3f} ms  share {outside / whole:.2f}")
    print(f"{'a step':30} {whole:20.3f} ms ({min(r[0] for r in found):.3f} to {max(r[0] for r in found):.3f})")
    print(f"{'sampling, beside it':30} {sampling:20.3f} ms  share {sampling / whole:.2f}")
    return figures | {
        "step_ms": round(whole, 3),
        "outside_ms": round(outside, 3),
        "sampling_ms": round(sampling, 3),
        "ops": ops,
    }

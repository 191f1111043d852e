"""Sections of bench/gpu.py about latent attention: correctness, decode and peers, forks, merge, plans."""

from __future__ import annotations

import lzma
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from gpu_timing import DEVICE, Report, limit_us, relative, rotated

from agentspeed_kernels.triton import attention, backend
from agentspeed_kernels.triton.attention import AttentionShape, RowsOnDevice
from agentspeed_kernels.triton.plan import Cut, plan_rows, segments
from agentspeed_kernels.workspace import Workspace

WIDTH, RANK, ROPE, PAGE = 576, 512, 64, 64
SCALE = 192**-0.5


@final
@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    pages: Any
    start: int
    tokens: int
    queries: Any
    causal: bool


def make_pool(pages: int) -> torch.Tensor:
    pool = torch.empty(pages, PAGE, WIDTH, device=DEVICE, dtype=torch.bfloat16)
    for at in range(0, pages, 8000):
        pool[at : at + 8000].normal_()
    return pool


@final
class Batch:
    """Sequences of the given lengths with `new` query tokens each at their ends, in several sets of pages."""

    def __init__(self, pool: torch.Tensor, lengths: Sequence[int], heads: int, new: int = 1, shared: int = 0) -> None:
        """`shared` tokens at the front are the same pages for all sequences (branches of a fork)."""
        self.pool, self.lengths, self.heads, self.new, self.shared = pool, list(lengths), heads, new, shared
        own = [-(-(length - shared) // PAGE) for length in lengths]
        trunk = shared // PAGE
        total = trunk + sum(own)
        self.rotations = int(min(24, max(2, -(-500e6 // (total * PAGE * WIDTH * 2)))))
        rng = np.random.default_rng(len(lengths))
        order = rng.permutation(pool.shape[0]).astype(np.int32)
        self.sets: list[tuple[Any, list[Any]]] = []
        for rotation in range(self.rotations):
            at = (rotation * total) % max(pool.shape[0] - total, 1)
            ids = order[at : at + total]
            cuts = np.cumsum([trunk, *own])
            self.sets.append((ids[:trunk], np.split(ids[trunk:], cuts[:-1] - trunk)[1:]))
        rows = len(lengths) * new
        self.q = torch.randn(rows, heads, WIDTH, device=DEVICE, dtype=torch.bfloat16)
        self.positions = np.concatenate([np.arange(length - new, length) for length in lengths]).astype(np.int64)
        self.out = torch.full((rows, heads, RANK), float("nan"), device=DEVICE, dtype=torch.bfloat16)
        tokens = shared + sum(length - shared for length in lengths)
        self.limit = limit_us(tokens * WIDTH * 2, 2 * (WIDTH + RANK) * heads * new * sum(lengths))
        self.workspace = Workspace(DEVICE)

    def pieces(self, rotation: int, folded: bool = True) -> list[Piece]:
        trunk, tails = self.sets[rotation]
        everyone = np.arange(len(self.lengths) * self.new, dtype=np.int32)
        pieces = [Piece(trunk, 0, self.shared, everyone, False)] if self.shared and folded else []
        for i, (tail, length) in enumerate(zip(tails, self.lengths, strict=True)):
            mine = everyone[i * self.new : (i + 1) * self.new]
            if folded or not self.shared:
                pieces.append(Piece(tail, self.shared, length - self.shared, mine, True))
            else:
                pieces.append(Piece(np.concatenate([trunk, tail]), 0, length, mine, True))
        return pieces

    def prepare(self, plain: bool = False, folded: bool = True, **options: Any) -> list[RowsOnDevice]:
        shape = backend.shape_of(self.heads, RANK, ROPE, PAGE, DEVICE)
        shape = replace(shape, hopper=shape.hopper and not plain)
        return [
            attention.prepare(self.pieces(r, folded), self.positions, shape, DEVICE, **options)
            for r in range(self.rotations)
        ]

    def run(self, steps: list[RowsOnDevice], rotation: int = 0) -> torch.Tensor:
        attention.mla_rows(self.q, self.pool, steps[rotation], SCALE, self.workspace, self.out)
        return self.out

    def rows_only(self, steps: list[RowsOnDevice], rotation: int) -> None:
        attention.launch_rows(self.q, self.pool, steps[rotation], SCALE, self.workspace, self.out)

    def wanted(self, rotation: int = 0) -> torch.Tensor:
        """In float64 on the device, sequence by sequence."""
        out = torch.empty(self.q.shape[0], self.heads, RANK, device=DEVICE, dtype=torch.float64)
        trunk, tails = self.sets[rotation]
        for i, (tail, length) in enumerate(zip(tails, self.lengths, strict=True)):
            pages = torch.from_numpy(np.concatenate([trunk, tail])).long().to(DEVICE)
            latents = self.numbers(pages).reshape(-1, WIDTH)[:length]
            for j in range(self.new):
                row, seen = i * self.new + j, length - self.new + j + 1
                shares = torch.softmax(self.q[row].double() @ latents[:seen].T * SCALE, -1)
                out[row] = shares @ latents[:seen, :RANK]
        return out

    def numbers(self, pages: torch.Tensor) -> torch.Tensor:
        """float64 [pages, PAGE, WIDTH]: what attention is given."""
        return self.pool[pages].double()

    def tables(self) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Block tables [sequences, pages] of each set, and lengths, as peers take them."""
        held = []
        for trunk, tails in self.sets:
            rows = [np.concatenate([trunk, tail]) for tail in tails]
            most = max(row.size for row in rows)
            held.append(torch.from_numpy(np.stack([np.pad(row, (0, most - row.size)) for row in rows])).to(DEVICE))
        return held, torch.tensor(self.lengths, dtype=torch.int32, device=DEVICE)


def load_peers(folder: str | None) -> dict[str, Callable[[Batch], Callable[[int], torch.Tensor]]]:
    """FlashMLA and FA3 from `flashmla.so(.xz)` and `fa3.so(.xz)`; none where the files are not given."""
    peers: dict[str, Callable[[Batch], Callable[[int], torch.Tensor]]] = {}
    for name, build in (("flashmla", _flashmla), ("fa3", _fa3)):
        path = Path(folder or ".") / f"{name}.so"
        packed = path.with_suffix(".so.xz")
        if folder is None or not (path.exists() or packed.exists()):
            continue
        if not path.exists():
            path = Path("/tmp") / f"agentspeed-{os.getpid()}-{name}.so"
            with lzma.open(packed) as file:
                path.write_bytes(file.read())
        torch.ops.load_library(str(path))
        peers[name] = build
    return peers


def _flashmla(batch: Batch) -> Callable[[int], torch.Tensor]:
    tables, lengths = batch.tables()
    q = batch.q.view(len(batch.lengths), batch.new, batch.heads, WIDTH)
    cache = batch.pool.unsqueeze(2)
    plan: list[Any] = [None, None]

    def call(rotation: int) -> torch.Tensor:
        out, _, plan[0], plan[1] = torch.ops._flashmla_C.dense_decode_fwd(
            q, cache, RANK, lengths, tables[rotation], SCALE, True, plan[0], plan[1], None
        )
        return out.view(-1, batch.heads, RANK)

    return call


def _fa3(batch: Batch) -> Callable[[int], torch.Tensor]:
    tables, lengths = batch.tables()
    cache, most, sequences = batch.pool.unsqueeze(2), max(batch.lengths), len(batch.lengths)
    keys, values = cache[..., RANK:], cache[..., :RANK]
    q_rope, q_rank = batch.q[..., RANK:], batch.q[..., :RANK]
    starts = torch.arange(sequences + 1, dtype=torch.int32, device=DEVICE) * batch.new
    plan = torch.ops._vllm_fa3_C.get_scheduler_metadata(
        sequences, batch.new, most, batch.heads, 1, ROPE, RANK, torch.bfloat16, lengths, starts, None, None, None, None,
        PAGE, 0, True, -1, -1, False, 0, None, 0,
    )  # fmt: skip

    def call(rotation: int) -> torch.Tensor:
        return torch.ops._vllm_fa3_C.fwd(
            q_rope, keys, values, None, None, q_rank, None, starts, None, None, None, lengths, batch.new, most,
            tables[rotation], None, None, None, None, None, None, None, None, SCALE, True, -1, -1, 0.0, True, plan, 0,
            None, 0, None, 1, 0, None,
        )[0]  # fmt: skip

    return call


def section_check(report: Report, pool: torch.Tensor) -> None:
    """Every form and cut against float64, with ragged lengths, causal edges and forks."""
    shapes: list[tuple[str, Batch, dict[str, Any]]] = []
    ragged = [1, 63, 64, 65, 127, 1000, 4097, 8191]
    for heads in (16, 8, 32, 64, 128, 20):
        for plain in (True, False):
            shapes.append(
                (f"H{heads} ragged {'plain' if plain else 'default'}", Batch(pool, ragged, heads), {"plain": plain})
            )
    shapes += [
        ("H16 q4 edge", Batch(pool, [4, 70, 500, 2049], 16, new=4), {}),
        ("H16 q4 edge plain", Batch(pool, [4, 70, 500, 2049], 16, new=4), {"plain": True}),
        ("H16 q33 edge", Batch(pool, [33, 70, 500, 2049], 16, new=33), {}),
        ("H16 q4 edge fixed", Batch(pool, [4, 70, 500, 9000], 16, new=4), {"cut": "fixed"}),
        ("H16 q1 stream", Batch(pool, ragged, 16), {"cut": "stream"}),
        ("H64 q1 stream", Batch(pool, ragged, 64), {"cut": "stream"}),
        ("H64 T32", Batch(pool, ragged, 64), {"form": attention.HOPPER_SMALL}),
        ("H64 T64", Batch(pool, ragged, 64), {"form": attention.HOPPER_LARGE}),
        ("H16 forks", Batch(pool, [8192 + n for n in (1, 64, 65, 300)], 16, shared=8192), {}),
        ("H16 forks q3", Batch(pool, [8192 + n for n in (3, 64, 65, 300)], 16, new=3, shared=8192), {}),
        ("H128 q2", Batch(pool, [2, 700], 128, new=2), {}),
    ]
    for name, batch, options in shapes:
        steps = batch.prepare(**options)
        batch.out.fill_(float("nan"))
        first = batch.run(steps).clone()
        error = relative(first, batch.wanted())
        same = all(bool((batch.run(steps) == first).all()) for _ in range(5))
        report.add("check", name, error=error, repeats_equal=same, met=error < 6e-3 and same)


DECODE = (
    (16, 1, 4096, None), (16, 1, 32768, 0.38), (16, 1, 131072, None), (16, 8, 8192, 0.52), (16, 8, 32768, None),
    (16, 32, 8192, 0.78), (16, 64, 8192, None), (16, 128, 4096, 0.88), (16, 128, 8192, 0.88), (16, 128, 32768, 0.88),
    (64, 64, 8192, 0.70), (64, 1, 32768, None), (64, 8, 8192, None), (128, 64, 8192, 0.60), (128, 8, 8192, None),
    (128, 1, 32768, None),
)  # fmt: skip
"""(heads, batch, context, share of the limit it must reach)"""


def section_decode(report: Report, pool: torch.Tensor, peers: dict[str, Any]) -> None:
    for heads, count, context, must in DECODE:
        batch = Batch(pool, [context] * count, heads)
        _decode(report, f"H{heads} B{count} {context}", batch, must, peers)
    rng = np.random.default_rng(3)
    for count, low, high in ((32, 512, 65536), (64, 256, 16384), (8, 2048, 131072)):
        lengths = np.exp(rng.uniform(np.log(low), np.log(high), count)).astype(int).tolist()
        _decode(report, f"H16 B{count} ragged {low}..{high}", Batch(pool, lengths, 16), None, peers)
    _decode(report, "H16 q4 B32 8192", Batch(pool, [8192] * 32, 16, new=4), None, peers)
    _decode(report, "H16 q16 B8 32768", Batch(pool, [32768] * 8, 16, new=16), None, peers)
    _decode(report, "H16 q128 B1 32768", Batch(pool, [32768], 16, new=128), None, peers)


def _decode(report: Report, name: str, batch: Batch, must: float | None, peers: dict[str, Any]) -> None:
    steps = batch.prepare()
    times = {"ours": rotated(lambda r: batch.run(steps, r), batch.rotations, batch.limit * 1.3)}
    rows = rotated(lambda r: batch.rows_only(steps, r), batch.rotations, batch.limit * 1.3)
    for peer, build in peers.items():
        call = build(batch)
        call(0)
        times[peer] = rotated(call, batch.rotations, batch.limit * 1.3)
    form = steps[0].form
    share = batch.limit / times["ours"]
    best = min((taken for peer, taken in times.items() if peer != "ours"), default=float("nan"))
    figures: dict[str, Any] = {f"{peer}_us": taken for peer, taken in times.items()}
    report.add(
        "decode", name, share=share, limit_us=batch.limit, **figures, rows_us=rows, against_best=best / times["ours"],
        form=f"R{form.block_rows}T{form.tile}{'h' if form.hopper else ''}", items=len(steps[0].plan.items),
        **_bound(share, must),
    )  # fmt: skip


FORKS = (
    (8, 131072, 2048, 1.5), (16, 131072, 2048, None), (2, 131072, 2048, None), (8, 32768, 512, None),
    (8, 8192, 256, None), (4, 8192, 256, None),
)  # fmt: skip
"""(branches, shared tokens, own tokens, times faster than our best per branch that it must be)"""


def _timed(batch: Batch, steps: list[RowsOnDevice], expected: float) -> float:
    """`expected`: about how many times the limit it takes."""
    return rotated(lambda r: batch.run(steps, r), batch.rotations, batch.limit * expected)


def section_forks(report: Report, pool: torch.Tensor, peers: dict[str, Any]) -> None:
    for count, shared, own, must in FORKS:
        batch = Batch(pool, [shared + own] * count, 16, shared=shared)
        ours = _timed(batch, batch.prepare(), 2)
        cuts: tuple[Cut, ...] = ("even", "stream")
        alone = min(_timed(batch, batch.prepare(folded=False, cut=cut), 5) for cut in cuts)
        figures: dict[str, Any] = {}
        for peer, build in peers.items():
            call = build(batch)
            call(0)
            figures[f"times_{peer}"] = rotated(call, batch.rotations, batch.limit * 5) / ours
        report.add(
            "forks", f"B{count} {shared}+{own}", us=ours, share=batch.limit / ours, alone_us=alone,
            times_alone=alone / ours, **figures, **_bound(alone / ours, must),
        )  # fmt: skip


def _bound(value: float, must: float | None) -> dict[str, Any]:
    return {} if must is None else {"must": must, "met": value >= must}


def section_merge(report: Report, pool: torch.Tensor) -> None:
    """The merge as its own kernel, for the largest numbers of partials."""
    for heads, count, context in ((16, 1, 32768), (16, 8, 8192), (16, 32, 8192), (64, 1, 32768), (64, 8, 8192)):
        batch = Batch(pool, [context] * count, heads)
        steps = batch.prepare()
        batch.run(steps)
        taken = rotated(
            lambda r, b=batch, s=steps: attention.launch_merge(s[r], b.workspace, b.out), batch.rotations, 5
        )
        whole = rotated(lambda r, b=batch, s=steps: b.run(s, r), batch.rotations, batch.limit * 1.3)
        report.add(
            "merge",
            f"H{heads} B{count} {context}",
            us=taken,
            of_attention=taken / whole,
            parts=int(steps[0].plan.table.shape[1]),
        )


def section_plans(report: Report, pool: torch.Tensor) -> None:
    """What planning costs the host, and what growing a plan by a token a branch costs."""
    shape = AttentionShape(heads=16, rank=RANK, rope=ROPE, page_tokens=PAGE, processors=132, hopper=True)
    for count in (1, 8, 32, 128):
        batch = Batch(pool, [4096 + 7 * i for i in range(count)], 16)
        pieces = batch.pieces(0)
        held = segments(pieces, batch.positions, PAGE)
        layout = attention.layout_of(attention.ROWS_16, shape)
        made = _host(lambda h=held, lay=layout: plan_rows(h, lay))
        gathered = _host(lambda p=pieces, b=batch: segments(p, b.positions, PAGE))
        plan = plan_rows(held, layout)
        one, none = np.zeros(count, np.int64), [np.zeros(0, np.int32)] * count
        grown = _host(lambda p=plan, o=one, n=none: p.extend(o, n))
        report.add("plans", f"B{count}", segments_us=gathered, plan_us=made, extend_us=grown)


def _host(call: Callable[[], Any], repeats: int = 50) -> float:
    call()
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return float(np.median(taken)) * 1e6

"""The attention backend for CUDA: absorbed rows and decompressed extends, planned and uploaded once a step."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import numpy as np
import torch

from agentspeed_kernels.attention import NEVER, AttentionStep, Part, pairs_of, split_long, whole_paths
from agentspeed_kernels.tiles import Int64s, Piece
from agentspeed_kernels.triton.attention import AttentionShape, Chip, Form, choose, plan_step, upload
from agentspeed_kernels.triton.extend import NotOneBranch, prepare_extend
from agentspeed_kernels.triton.padded import general
from agentspeed_kernels.triton.plan import Cut, RowsPlan, fixed_starts, unit_rows
from agentspeed_kernels.uploads import unwaited

log = logging.getLogger("agentspeed.kernels")

EXTEND_FROM = 256
"""From this many new tokens of one branch on, decompressing the context costs less than absorbed attention (measured on
an H200 at 32 768 cached tokens, docs/performance.md)."""
ABSORBED, ABSORBED_EACH = 1 << 25, 1 << 24
"""Pairs of a query's head and a token of its context up to which long extends run absorbed all the same: those of a
step together, where it is a graph then (512 tokens of 16 heads at 4096), and those of one. What they compute more costs
less than the launches of their own kernels."""

EXTEND_GROUPED_FROM, ABSORBED_GROUPED, ABSORBED_GROUPED_EACH = 512, 1 << 27, 1 << 25
"""The same of grouped-query attention, where nothing is decompressed but tiles are wider: measured at 4096 tokens, and
pairs that cost a quarter (one head is 128 numbers wide, a latent 512)."""
MOST_PROGRAMS = 256
"""Of latents in bytes: a row may have a partial of each, and graphs have room for as many."""
GROUPED_PROGRAMS = 2
"""Programs of grouped-query attention that a multiprocessor has room for."""


PARTIAL_ITEM, PARTIAL_BYTES = 4, 1 << 30
"""Of a number of a partial, and of all those of rows that run at once under the fixed cut, where every row has one for
each part of its context."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class TritonAttention:
    """Plans are `RowsOnDevice` for rows and a tuple of `ExtendedBranch` for extends."""

    shape: AttentionShape
    device: torch.device
    invariant: bool = False
    """Every row reads its branch by itself, cut at fixed places: its attention has the same bits in any step."""
    extend_from: int = EXTEND_FROM
    absorbed: int = ABSORBED
    absorbed_each: int = ABSORBED_EACH

    def prepare(self, pieces: Sequence[Piece], positions: Int64s) -> AttentionStep:
        extend_from = NEVER if self.invariant else self.extend_from
        least = self.absorbed_each // self.shape.all_heads
        few, many, rows = split_long(pieces, positions.size, extend_from, least)
        extended = None
        if many:
            try:
                extended = prepare_extend(many, positions, self.shape.page_tokens, self.shape.all_heads, self.device)
            except NotOneBranch as error:
                log.info("a long extend runs absorbed: %s", error)
                few, rows = list(pieces), np.zeros(0, np.int64)
        absorbed = None
        if few:
            first, *others = [
                upload(general(plan), form, self.device)
                for plan, form in (self.rows(some, positions) for some in self._bounded(few))
            ]
            absorbed = replace(first, others=tuple(others)) if others else first
        return AttentionStep(few=absorbed, many=extended, many_rows=unwaited(rows, self.device))

    def absorbs(self, pieces: Sequence[Piece]) -> bool:
        """Whether a step's long extends may be rows like others: they compute more then, but not much."""
        long = (piece for piece in pieces if piece.causal and piece.queries.size >= self.extend_from)
        return self.shape.all_heads * sum(map(pairs_of, long)) <= self.absorbed

    def rows(self, pieces: Sequence[Piece], positions: Int64s) -> tuple[RowsPlan, Form]:
        """The plan for a step whose rows are all absorbed, not uploaded yet."""
        return plan_step(pieces, positions, self.shape, cut=self._cut)

    def _bounded(self, pieces: Sequence[Piece]) -> list[Sequence[Piece]]:
        """The pieces as they are or, of a batch-invariant step, by rows whose partials have room together."""
        return split_rows(pieces, self.shape, PARTIAL_BYTES) if self.invariant else [pieces]

    @property
    def _cut(self) -> Cut | None:
        return "fixed" if self.invariant else None


def split_rows(pieces: Sequence[Piece], shape: AttentionShape, most_bytes: int) -> list[Sequence[Piece]]:
    """Lists of pieces for some queries each, whose partials under the fixed cut take up to `most_bytes`, or for one."""
    whole = whole_paths(pieces, shape.page_tokens)
    if not all(piece.causal for piece in whole):  # a path of several pieces must stay in one list
        return [pieces]
    rows = choose(shape.heads, 0, shape).block_rows
    unit = unit_rows(shape.heads, rows)
    each_query, each_block = shape.heads // unit, rows // unit
    found: list[list[Piece]] = [[]]
    left = most_bytes
    for piece in whole:
        parts = fixed_starts(-(-piece.tokens // shape.page_tokens), shape.page_tokens).size
        block = parts * rows * (shape.groups or 1) * shape.rank * PARTIAL_ITEM  # full or not
        at = 0
        while at < piece.queries.size:
            if left < -(-each_query // each_block) * block and found[-1]:
                found.append([])
                left = most_bytes
            count = max(1, min(left // block * each_block // each_query, piece.queries.size - at))
            queries = piece.queries[at : at + count]
            found[-1].append(Part(piece.pages, piece.start, piece.tokens, queries, piece.causal))
            at, left = at + count, left - -(-count * each_query // each_block) * block
    return list(found)


def attention_of(
    sizes: Mapping[str, int], device: torch.device, element_bytes: int, *, invariant: bool = False
) -> TritonAttention:
    """The backend for a model whose axes, by the names of `ops`, are `sizes`, `page_tokens` among them."""
    page_tokens, given = sizes["page_tokens"], (device, element_bytes)
    if "G" in sizes:
        grouped = grouped_shape_of(sizes["H"], sizes["G"], sizes["W"], page_tokens, *given)
        return TritonAttention(
            shape=grouped,
            device=device,
            invariant=invariant,
            extend_from=EXTEND_GROUPED_FROM,
            absorbed=ABSORBED_GROUPED,
            absorbed_each=ABSORBED_GROUPED_EACH,
        )
    shape = shape_of(sizes["H"], sizes["R"], sizes["rope"], page_tokens, *given)
    return TritonAttention(shape=shape, device=device, invariant=invariant)


def shape_of(
    heads: int, rank: int, rope: int, page_tokens: int, device: torch.device, element_bytes: int = 2
) -> AttentionShape:
    """The shape for a model with latents on a device; the Gluon kernels need compute capability 9. Of latents in bytes
    a plan is cut for two programs a multiprocessor."""
    count, chip = _chip(device)
    if element_bytes == 1 and device.type == "cuda":
        count = min(2 * count, MOST_PROGRAMS)
    return AttentionShape(
        heads=heads,
        rank=rank,
        rope=rope,
        page_tokens=page_tokens,
        processors=count,
        hopper=device.type == "cuda" and chip == "sm_90" and element_bytes <= 2,
        element_bytes=element_bytes,
        chip=chip,
    )


def grouped_shape_of(
    heads: int, groups: int, width: int, page_tokens: int, device: torch.device, element_bytes: int = 2
) -> AttentionShape:
    """The shape for a model with `heads` heads of queries and `groups` heads of keys and values, each `width` wide.

    A plan is cut for the programs that one group gets of two a multiprocessor."""
    count, chip = _chip(device)
    return AttentionShape(
        heads=heads // groups,
        rank=width,
        rope=0,
        page_tokens=page_tokens,
        processors=-(-GROUPED_PROGRAMS * count // groups),
        hopper=False,
        element_bytes=element_bytes,
        chip=chip,
        groups=groups,
    )


def _chip(device: torch.device) -> tuple[int, Chip]:
    """(Multiprocessors, whose plain forms to take)."""
    if device.type != "cuda":
        return 4, "sm_90"
    properties = torch.cuda.get_device_properties(device)
    chip: Chip = "hip" if torch.version.hip else "sm_90" if properties.major == 9 else "cuda"
    return properties.multi_processor_count, chip

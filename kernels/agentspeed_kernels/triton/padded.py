"""Plans of one size for many steps, so that a CUDA graph can be replayed with another plan in the same memory.

What a graph fixes is what the launches are made of: their grids, compiled forms and addresses. A padded plan has
programs without items, units without a row and room in every array; the kernels take both as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from agentspeed_kernels.tiles import Int32s
from agentspeed_kernels.triton.attention import ALIGN, SECTIONS, AttentionShape, Form, RowsOnDevice
from agentspeed_kernels.triton.plan import FIELDS, RowsPlan, unit_rows

PAGES = 1 << 16
"""Entries of the page lists of all segments together."""
PARTS, FIXED_PARTS = (4, 16, 64, 128, 256), (16, 48, 96)
"""Partials of a row that shapes have room for, and those of the fixed cut, whose contexts they are. Few sizes, so that
steps share graphs; those that are not there cost the merge a load that is masked."""
MANY_QUERIES, MANY_PARTS, MANY_BRANCHES = 64, (16, 256), 128
"""Above so many queries there are fewer shapes, which compute edges whether there are any or not, and room for blocks
as where most queries belong to extends: those of some branches fill them, of each other one two are taken."""
ORDER = ("items", "bounds", "rows", "visible", "unit_row", "table", "pages")
"""Of sections in memory; the last is copied as far as it is used."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class PaddedShape:
    """What plans must have in common to take each other's place."""

    form: Form
    heads: int
    queries: int
    """Query rows of the step, those that pad it included."""
    programs: int
    parts: int
    """The most partials that a row is merged of."""
    edge: bool
    fixed: bool = False
    """Of plans that are cut at fixed places."""

    @property
    def blocks(self) -> int:
        """Twice those of a step whose rows share nothing, or fewer (`MANY_BRANCHES`)."""
        most = 2 * self.queries * max(1, -(-self.heads // self.form.block_rows))
        if self.queries <= MANY_QUERIES or self.heads >= self.form.block_rows:
            return most
        return min(most, -(-self.queries * self.heads // self.form.block_rows) + 2 * MANY_BRANCHES)

    @property
    def items(self) -> int:
        return self.blocks // 2 * self.parts if self.fixed else self.blocks + self.programs

    @property
    def units(self) -> int:
        return self.queries * (self.heads // unit_rows(self.heads, self.form.block_rows))


def shape_for(plan: RowsPlan, form: Form, queries: int, shape: AttentionShape) -> PaddedShape | None:
    """The smallest padded shape that takes `plan`; None where there is none."""
    if plan.pages.size > PAGES:
        return None
    many = queries > MANY_QUERIES
    if many and plan.fixed:  # each of its rows has partials of its own: gigabytes of scratch memory for a graph
        return None
    room = FIXED_PARTS if plan.fixed else MANY_PARTS if many else PARTS
    parts = next((most for most in room if most >= plan.table.shape[1]), 0)
    found = PaddedShape(
        form=form,
        heads=shape.heads,
        queries=queries,
        programs=max(shape.processors, plan.programs),
        parts=parts,
        edge=plan.edge or many,
        fixed=plan.fixed,
    )
    fits = plan.rows.shape[0] <= found.blocks and plan.items.shape[0] <= found.items and parts > 0
    return found if fits and plan.unit_row.size <= found.units else None


def general(plan: RowsPlan) -> RowsPlan:
    """`plan` as one of few forms, which are compiled before the first turn (of a padded plan they are the same)."""
    units, parts = plan.table.shape
    table = np.full((units, next((most for most in PARTS if most >= parts), parts)), -1, np.int32)
    table[:, :parts] = plan.table
    return replace(plan, one=False, run=False, edge=True, table=table)


def padded(plan: RowsPlan, shape: PaddedShape) -> RowsPlan:
    """`plan` in the arrays of `shape`; it computes the same."""
    bounds = np.full(shape.programs + 1, plan.bounds[-1], np.int32)
    bounds[: plan.bounds.size] = plan.bounds
    table = np.full((shape.units, shape.parts), -1, np.int32)
    table[: plan.table.shape[0], : plan.table.shape[1]] = plan.table
    width = shape.form.block_rows
    return RowsPlan(
        items=_filled((shape.items, FIELDS), 0, plan.items),
        bounds=bounds,
        rows=_filled((shape.blocks, width), -1, plan.rows),
        visible=_filled((shape.blocks, width), 0, plan.visible),
        pages=plan.pages,
        slots=shape.items,
        unit=unit_rows(shape.heads, width),
        unit_row=_filled((shape.units,), -1, plan.unit_row),
        table=table,
        one=False,
        run=False,
        edge=shape.edge,
        fixed=plan.fixed,
        tokens_read=plan.tokens_read,
        tails=plan.tails,
    )


def _filled(shape: tuple[int, ...], with_what: int, held: Int32s) -> Int32s:
    found = np.full(shape, with_what, np.int32)
    found[: held.shape[0]] = held
    return found


@final
class PlanMemory:
    """Device memory for the plans of one padded shape."""

    def __init__(self, shape: PaddedShape, device: torch.device) -> None:
        self.shape = shape
        width = shape.form.block_rows
        sizes = {
            "items": shape.items * FIELDS,
            "bounds": shape.programs + 1,
            "rows": shape.blocks * width,
            "visible": shape.blocks * width,
            "unit_row": shape.units,
            "table": shape.units * shape.parts,
            "pages": PAGES,
        }
        self._starts: dict[str, int] = {}
        at = 0
        for name in ORDER:
            self._starts[name] = at
            at += -(-sizes[name] // ALIGN) * ALIGN
        self._block = torch.zeros(at, dtype=torch.int32, device=device)
        self._arrays = {name: self._block[self._starts[name] : self._starts[name] + sizes[name]] for name in SECTIONS}

    def load(self, plan: RowsPlan) -> RowsOnDevice:
        """Puts a padded plan in place of the one before, after whatever the device still has to do with that."""
        used = self._starts["pages"] + plan.pages.size
        flat = torch.empty(used, dtype=torch.int32, pin_memory=self._block.is_cuda)
        view: Any = flat.numpy()
        for name in ORDER:
            part = getattr(plan, name).reshape(-1)
            view[self._starts[name] : self._starts[name] + part.size] = part
        self._block[:used].copy_(flat, non_blocking=True)
        return RowsOnDevice(form=self.shape.form, plan=plan, arrays=self._arrays, block=self._block)

    @property
    def block(self) -> Tensor:
        return self._block

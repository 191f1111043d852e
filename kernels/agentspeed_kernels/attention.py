"""What an attention backend is: it alone knows how the attention kernels of a device want a step cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from agentspeed_kernels.tiles import Int32s, Int64s, Piece


@final
@dataclass(frozen=True, slots=True, eq=False)
class AttentionStep:
    """One step's attention, prepared once for all layers. Every row is in `few` or in `many`, with all it sees."""

    few: Any | None
    """For `mla_rows`: decode rows and short extends."""
    many: Any | None
    """For `mla_extend`: the rows of long extends."""
    many_rows: Tensor
    """Rows of the step that `many` writes, ascending: int64, on the kernels' device."""


NEVER = 1 << 62
"""As a threshold for long extends: every row attends in the latent space."""


class AttentionBackend(Protocol):
    """Prepares what its kernels need from the step's pieces and positions; thresholds are its own.

    What it returns is handed to the kernels of the same device and to no one else. Called once a step, by the thread
    that launches."""

    def prepare(self, pieces: Sequence[Piece], positions: Int64s) -> AttentionStep:
        """What the kernels of all layers take for one step, and for that step alone. `pieces`: what rows of what pages
        are read by which rows of the step; a row reads its own causal piece and what its branch shares. `positions`
        [T]: of the step's rows."""
        ...


@final
@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """A piece with some of its queries."""

    pages: Int32s
    start: int
    tokens: int
    queries: Int32s
    causal: bool


def split_long(
    pieces: Sequence[Piece], count: int, extend_from: int, least_pairs: int = 0
) -> tuple[list[Piece], list[Piece], Int64s]:
    """(pieces of the other rows, pieces of rows of long extends, those rows).

    A row belongs to a long extend when its own causal piece has `extend_from` queries or more and there are more than
    `least_pairs` pairs of one of them and a token of its context."""
    long = np.zeros(count, dtype=bool)
    for piece in pieces:
        if piece.causal and piece.queries.size >= extend_from and pairs_of(piece) > least_pairs:
            long[piece.queries] = True
    rows = np.flatnonzero(long).astype(np.int64)
    if not rows.size:
        return list(pieces), [], rows
    return _kept(pieces, ~long), _kept(pieces, long), rows


def pairs_of(piece: Piece) -> int:
    """Of the queries of a causal piece and the tokens of their context, as if each saw all of them."""
    return piece.queries.size * (piece.start + piece.tokens)


def _kept(pieces: Sequence[Piece], kept: NDArray[np.bool_]) -> list[Piece]:
    parts: list[Piece] = []
    for piece in pieces:
        mask = kept[piece.queries]
        if mask.all():
            parts.append(piece)
        elif mask.any():
            parts.append(Part(piece.pages, piece.start, piece.tokens, piece.queries[mask], piece.causal))
    return parts


def paths(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Of each causal piece: all that its queries read, in the order of positions, for these queries alone.

    What branches share is named once for each; the causal piece comes last."""
    found: list[list[Piece]] = []
    for tail in (piece for piece in pieces if piece.causal):
        above = [piece for piece in pieces if not piece.causal and np.isin(tail.queries, piece.queries).all()]
        chain = sorted(above, key=lambda piece: piece.start)
        alone = [Part(piece.pages, piece.start, piece.tokens, tail.queries, piece.causal) for piece in chain]
        found.append([*alone, tail])
    return found


def whole_paths(pieces: Sequence[Piece], page_tokens: int) -> list[Piece]:
    """`paths` with one piece for each, from the first token on: nothing is shared, and where a piece is cut depends on
    positions alone. Pieces that others follow end with a page; where one does not, it stays a piece of its own."""
    found: list[Piece] = []
    for path in paths(pieces):
        whole = path[0]
        for piece in path[1:]:
            if whole.tokens % page_tokens or piece.start != whole.start + whole.tokens:
                found.append(whole)
                whole = piece
            else:
                pages = np.concatenate([whole.pages[: whole.tokens // page_tokens], piece.pages])
                whole = Part(pages, whole.start, whole.tokens + piece.tokens, piece.queries, piece.causal)
        found.append(whole)
    return found

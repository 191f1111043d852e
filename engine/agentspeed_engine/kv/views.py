"""What a step may know of owned pages: read-only values, never the owners."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from agentspeed_engine.ids import BranchId, NodeId, PageId
from agentspeed_engine.protocol.messages import Grammar, Sampling


@final
@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class NodeRun:
    """The rows of one node, as a step reads them. Compared by identity: one object per node and residence, so a
    consumer may cache what it derives from it."""

    node: NodeId
    start: int
    """Position of the first token."""
    tokens: int
    pages: tuple[PageId, ...]


@final
@dataclass(frozen=True, slots=True)
class PageCopy:
    """The first `rows` rows of `src` go to `dst` before anything of the step is computed."""

    src: PageId
    dst: PageId
    rows: int


@final
@dataclass(frozen=True, slots=True, eq=False)
class TurnSpec:
    """What sampling needs to know of a turn; one object per turn, so a worker may key its matcher by `turn`."""

    turn: int
    """Unique over the engine's life."""
    branch: BranchId
    sampling: Sampling
    draw_key: tuple[int, int, int]
    """(seed, turn serial, child index)."""
    stop_strings: tuple[bytes, ...]
    grammar: Grammar | None
    consumed_ids: tuple[int, ...]
    """Ids at the end of the log when the turn was queued: those of the message it goes on with, which the grammar and
    the stop strings go through first. Without a grammar only those that may have begun a stop string."""
    prompt_tokens: int
    """Known ids when the turn was queued: position of the first drawn token."""
    stop_ids: frozenset[int] = frozenset()
    seen: bytes = b""
    """The log when the turn was queued, packed, for a repetition penalty; empty where the turn has none."""
    counted: bytes = b""
    """The ids of the message that the turn goes on with, packed, for frequency and presence penalties; empty where the
    turn has none."""

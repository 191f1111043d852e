"""What a branch is, whatever state it is in (`Branch`), and what it holds only while a turn of it runs (`Room`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

from agentspeed_engine.ids import BranchId, LinkId, PageId, SessionId
from agentspeed_engine.kv.token_log import Log
from agentspeed_engine.kv.tree import Node, RootKey
from agentspeed_engine.kv.views import NodeRun, PageCopy


@final
@dataclass(slots=True, kw_only=True, eq=False)
class Branch:
    """One path that can be extended. Its state object (`branches`) holds it and is its only writer."""

    id: BranchId
    session: SessionId
    link: LinkId
    root: RootKey
    private: bool
    draw_seed: int
    log: Log
    leaf: Node
    """The node this branch at rest ends on; its end is a page boundary."""
    seed: Node | None = None
    """Holds `seed_rows` rows right after the leaf, still to be copied when this branch next runs."""
    seed_rows: int = 0
    computed: int = 0
    """Rows of this log that were computed once, wherever they are now. What was dropped is recomputed, not new."""
    lost_why: str = ""
    """Why some of them are gone, while some are."""
    serial: int = 0
    """Turns begun; never goes back, so that a retry after a rewind draws anew."""
    child_index: int = 0
    forks: int = 0
    epoch: int = 0
    """Raised whenever room is given back: rows of an older epoch are late."""
    moves: int = 0
    """Raised by every change of the log; a child adopted later must find it as it was at the fork."""
    trunk: tuple[BranchId, int] | None = None
    """(parent, its `moves` at the fork)."""
    rested_at: float = 0.0
    """Since when it is silent: it gave its room back, or its turn ended without any. The pauses learnt begin here."""

    @property
    def known(self) -> int:
        return self.log.length

    @property
    def resident(self) -> int:
        """Known tokens whose rows are on its path, on the device or on the host."""
        return min(self.leaf.end + self.seed_rows, self.known)


@final
@dataclass(slots=True, kw_only=True)
class Room:
    """What an active branch holds: pins on its path, and a tail of pages it alone writes."""

    tenant: str
    """The tenant whose quota the tail's pages count for."""
    path: tuple[NodeRun, ...]
    tail_start: int
    tail: list[PageId]
    issued: int
    done: int
    """Rows acknowledged: `done <= known - 1` while schedulable."""
    copy: PageCopy | None = None
    """The seed's rows, copied at the head of the first step; the seed stays pinned until that step is acknowledged."""
    flight: int = 0
    """Steps in flight that hold rows of this branch."""
    stale: bool = field(default=False)
    """Nodes of the path were loaded: `path` must be read anew before the next step."""

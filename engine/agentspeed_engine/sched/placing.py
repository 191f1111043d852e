"""On which dp rank a new session goes: where least is left to compute before its first token, if no rank fills up.

Every dp rank has a core and a pool of its own, and a session stays with all its branches where it was opened: what it
shares with its forks lies there. So the choice is made once, when it opens. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from agentspeed_engine.kv.branch_states import Held, Queued, Settling
from agentspeed_engine.kv.tree import ID_BYTES, RootKey, tenant_of
from agentspeed_engine.sched import quotas
from agentspeed_engine.sched.state import SchedulerState

SLACK = 2
"""Sessions that a rank may have beyond the emptiest, and half of the emptiest's number more, before what it has kept
of a prefix counts for nothing: a prefix that everybody shares would else draw all sessions to one pool."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class RankLoad:
    """One dp rank, as a session that is about to open sees it."""

    kept: int
    """Tokens of its ids whose rows the rank has, on the device or the host."""
    backlog: int
    """Tokens of prompts that turns there still have to compute."""
    sessions: int
    limit: int
    """Most sessions it may have; 0 where the new one's tenant has all that it may have there."""


def place(tokens: int, loads: Sequence[RankLoad]) -> int | None:
    """The rank for a session that begins with `tokens` tokens; None where every rank has its limit of sessions.

    Among those that are not too full beside the emptiest, the one where the fewest tokens are computed before its
    first: its own that are not kept there, behind those of others. Of equal ones the one with fewer sessions, then the
    first.
    """
    open_ranks = [rank for rank, load in enumerate(loads) if load.sessions < load.limit]
    if not open_ranks:
        return None
    fewest = min(loads[rank].sessions for rank in open_ranks)
    fair = [rank for rank in open_ranks if loads[rank].sessions <= fewest + fewest // 2 + SLACK]

    def cost(rank: int) -> tuple[int, int, int]:
        load = loads[rank]
        return load.backlog + max(0, tokens - load.kept), load.sessions, rank

    return min(fair, key=cost)


def load_of(world: SchedulerState, root: RootKey, packed: bytes) -> RankLoad:
    """Of a core, for a session of these ids (packed) below this root. The core is only looked at."""
    backlog = 0
    for state in world.states.values():
        match state:
            case Held():
                continue
            case Queued():
                backlog += state.branch.known - state.branch.resident
            case Settling():
                continue  # it gives its room back
            case _:
                backlog += max(0, state.branch.known - state.room.done - 1)
    return RankLoad(
        kept=_kept(world, root, packed),
        backlog=backlog,
        sessions=len(world.sessions),
        limit=0 if quotas.has_all_sessions(world, tenant_of(root)) else world.config.max_sessions,
    )


def _kept(world: SchedulerState, root: RootKey, packed: bytes) -> int:
    """Tokens of whole pages that a path from the root has in common with the ids."""
    node = world.kv.tree.roots.get(root)
    page_tokens = world.config.page_tokens
    offset, size = 0, page_tokens * ID_BYTES
    while node is not None:
        child = node.children.get(packed[offset : offset + size])
        if child is None:
            break
        pages = 0
        while (pages + 1) * size <= len(child.ids) and child.ids[pages * size : (pages + 1) * size] == packed[
            offset + pages * size : offset + (pages + 1) * size
        ]:
            pages += 1
        offset += pages * size
        if pages * size < len(child.ids):
            break
        node = child
    return offset // ID_BYTES

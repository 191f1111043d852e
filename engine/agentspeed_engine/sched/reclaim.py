"""Room for older turns: cached rows go first, then the room of strictly younger turns (L4)."""

from __future__ import annotations

from enum import Enum

from agentspeed_engine.kv.branches import Decoding, Held, Next, Prefilling, Queued, Then
from agentspeed_engine.kv.nodes import Device
from agentspeed_engine.kv.owners import Branch
from agentspeed_engine.kv.tree import Node
from agentspeed_engine.sched.world import World

_UNREFERENCED = 1
_REFERENCED = 0


class Room(Enum):
    """What came of asking for pages."""

    GOT = "got"
    WAIT = "wait"
    """Younger turns are settling: their pages come back when their rows are acknowledged."""
    NONE = "none"


def reclaim(world: World, pages: int, now: float) -> bool:
    """Evicts cached rows until `pages` are free; as much as it can when they are not enough."""
    kv = world.kv
    while kv.pages.free < pages:
        victim = _victim(world, now)
        if victim is None:
            return False
        missing = pages - kv.pages.free
        holders = kv.holders(victim)
        held = len(victim.pages)
        if missing < held and not kv.tree.is_stub(victim):
            kv.pages.give(kv.tree.shrink(victim, missing))
            world.victim = victim
            world.evicted_pages += missing
        else:
            world.victim = kv.drop(victim)
            world.evicted_pages += held
        for holder in holders:
            world.change_lease(holder, "its device pages were needed by a running turn")
    return True


def obtain(world: World, pages: int, age: int, now: float) -> Room:
    """`pages` free pages for the turn of `age`, preempting strictly younger turns if it must."""
    while not reclaim(world, pages, now):
        youngest = world.active[-1] if world.active else None
        if youngest is None or youngest[0] <= age:
            return Room.WAIT if _settling(world) else Room.NONE
        state = world.states[youngest[1]]
        assert isinstance(state, Prefilling | Decoding)
        state.turn.preempted += 1
        state.turn.why = "preempted: an older turn needed its pages"
        world.preemptions += 1
        world.leave(state, Then(Next.REQUEUE), now)
    return Room.GOT


def _settling(world: World) -> bool:
    """Rows in flight hold pages that will come back by themselves."""
    return len(world.kv.rooms) > len(world.active)


def next_use(world: World, branch: Branch, now: float) -> float:
    """Expected seconds until a branch at rest runs again: its lease, else the learnt law of pauses."""
    lease = world.leases.get(branch.id)
    if lease is not None and lease.until >= now:
        return lease.until - now
    return world.law.residual(now - branch.rested_at)


def _victim(world: World, now: float) -> Node | None:
    """The tip whose rows are needed last. The one at hand is finished first: victims are whole branches."""
    last = world.victim
    if last is not None and last.id in world.kv.tree.tips and _evictable(world, last, now):
        return last
    best: Node | None = None
    best_key = (-1, -1.0)
    for tip in world.kv.tree.tips.values():
        if not _evictable(world, tip, now):
            continue
        key = _key(world, tip, now)
        if key > best_key:
            best, best_key = tip, key
    return best


def _evictable(world: World, tip: Node, now: float) -> bool:
    if tip.pinned_by or not isinstance(tip.state, Device):
        return False
    for number in (*tip.leaf_of, *tip.seed_of):
        firm = world.firm.get(number)
        if firm is not None and firm[0] > now:
            return False
    return True


def _key(world: World, tip: Node, now: float) -> tuple[int, float]:
    if not tip.leaf_of and not tip.seed_of:
        return _UNREFERENCED, now - tip.used
    soonest = float("inf")
    for number in (*tip.leaf_of, *tip.seed_of):
        match world.states[number]:
            case Held() as held:
                soonest = min(soonest, next_use(world, held.branch, now))
            case Queued():
                soonest = 0.0
            case _:
                soonest = 0.0
    return _REFERENCED, soonest

"""Room for older turns: cached rows go first, then the room of strictly younger turns (L4)."""

from __future__ import annotations

from enum import Enum

from agentspeed_engine.ids import BranchId
from agentspeed_engine.kv.branches import Decoding, Held, Next, Prefilling, Promoting, Queued, Then
from agentspeed_engine.kv.nodes import Both, Device, Host
from agentspeed_engine.kv.owners import Branch
from agentspeed_engine.kv.tree import Node, upward
from agentspeed_engine.sched import tickets
from agentspeed_engine.sched.policy import POLICIES, Facts, worth_saving
from agentspeed_engine.sched.world import World

_UNREFERENCED = 1
_REFERENCED = 0
_SAVE_PAGES = 64
"""Most pages of one save that somebody waits for: room comes back in portions, not after a whole context."""


class Room(Enum):
    """What came of asking for pages."""

    GOT = "got"
    WAIT = "wait"
    """Pages will come back by themselves: rows in flight are acknowledged, or copies to the host end."""
    NONE = "none"


def reclaim(world: World, pages: int, now: float) -> bool:
    """Evicts cached rows until `pages` are free; as much as it can when they are not enough."""
    kv = world.kv
    coming = tickets.saving(world) if world.tickets else 0
    while kv.pages.free < pages:
        victim = _victim(world, now)
        if victim is None or kv.pages.free + coming >= pages:
            return False
        missing = pages - kv.pages.free
        state = victim.state
        holders = kv.holders(victim)
        if isinstance(state, Both):
            _evict(world, victim, missing)
            why = "its rows moved to the host: a running turn needed their device pages"
        elif isinstance(state, Device) and _to_host(world, victim, missing - coming, now):
            coming = tickets.saving(world)
            continue
        else:
            _drop(world, victim, missing)
            why = "its device pages were needed by a running turn"
        for holder in holders:
            world.change_lease(holder, why)
    return True


def obtain(world: World, pages: int, age: int, now: float) -> Room:
    """`pages` free pages for the turn of `age`, preempting strictly younger turns if it must."""
    while not reclaim(world, pages, now):
        if world.tickets and tickets.saving(world):
            return Room.WAIT
        youngest = world.active[-1] if world.active else None
        if youngest is None or youngest[0] <= age:
            return Room.WAIT if _settling(world) or world.tickets else Room.NONE
        state = world.states[youngest[1]]
        assert isinstance(state, Promoting | Prefilling | Decoding)
        state.turn.preempted += 1
        state.turn.why = "preempted: an older turn needed its pages"
        world.preemptions += 1
        world.leave(state, Then(Next.REQUEUE), now)
    return Room.GOT


def _settling(world: World) -> bool:
    """Rows in flight hold pages that will come back by themselves."""
    return len(world.kv.rooms) > len(world.active)


def _evict(world: World, victim: Node, missing: int) -> None:
    """The end of a clean node, or all of it, stays on the host alone."""
    count = len(victim.pages)
    if missing < count:
        world.victim = world.kv.tree.split(victim, count - missing)
    else:
        world.victim = victim.parent
    world.evicted_pages += len(victim.pages)
    world.kv.evict(victim)


def _drop(world: World, victim: Node, missing: int) -> None:
    kv = world.kv
    held = len(victim.pages)
    childless = not victim.children and not victim.stubs
    if missing < held and childless and not kv.tree.is_stub(victim):
        kv.pages.give(kv.tree.shrink(victim, missing))
        world.victim = victim
        world.evicted_pages += missing
    else:
        world.victim = kv.drop_with_all_below(victim)
        world.evicted_pages += held


def _to_host(world: World, victim: Node, missing: int, now: float) -> bool:
    """Begins to save the end of a victim, if that is worth it and the host has room or something of later use."""
    config, kv = world.config, world.kv
    if not config.host_slots or victim.failures or not _held_below(victim):
        return False
    if not worth_saving(config.copy_seconds_per_token, config.recompute_seconds_per_token):
        return False
    count = min(len(victim.pages), max(missing, _SAVE_PAGES))
    if not _host_room(world, count, _key(world, victim, now), now):
        return False
    if count < len(victim.pages):
        world.victim = kv.tree.split(victim, len(victim.pages) - count)
    else:
        world.victim = victim.parent
    _ = tickets.save(world, victim, now)
    return True


def _host_room(world: World, slots: int, key: tuple[int, float], now: float) -> bool:
    """Free slots: first the copies of rows that are in use on the device, then rows of later use than `key`."""
    kv = world.kv
    if kv.slots.free >= slots:
        return True
    for node in list(kv.tree.nodes.values()):
        if node.pinned_by and isinstance(node.state, Both):
            kv.forget(node)
            if kv.slots.free >= slots:
                return True
    while kv.slots.free < slots:
        ranked = [(rank, tip) for tip in kv.tree.host_tips.values()
                  if not tip.pinned_by and isinstance(tip.state, Host) and (rank := _key(world, tip, now)) > key]
        if not ranked:
            return False
        tip = max(ranked, key=lambda pair: pair[0])[1]
        holders = kv.holders(tip)
        _ = kv.drop(tip)
        for holder in holders:
            world.change_lease(holder, "the host is full: its rows were of the latest use")
    return True


def save_early(world: World, now: float) -> None:
    """While the link is idle and device pages run short, the next victims are copied, so that evicting them is free."""
    kv, config = world.kv, world.config
    low = config.pages // 8
    if not config.host_slots or world.tickets or kv.pages.free >= low or not kv.slots.free:
        return
    if not worth_saving(config.copy_seconds_per_token, config.recompute_seconds_per_token):
        return
    if world.early_seen == world.pressure():
        return
    world.early_seen = world.pressure()
    best: Node | None = None
    best_key = (-1, -float("inf"))
    clean = kv.pages.free
    for tip in kv.tree.tips.values():
        if clean >= low:
            return
        if tip.pinned_by or not _evictable(world, tip, now):
            continue
        if not _held_below(tip):
            clean += _unheld_pages(tip)  # nobody would miss them: to drop them costs nothing either
            continue
        key = _key(world, tip, now)
        for node in upward(tip):
            if isinstance(node.state, Both) and not node.pinned_by:
                clean += len(node.pages)
                continue
            savable = isinstance(node.state, Device) and not node.pinned_by and not node.failures
            if savable and key > best_key and _clean_below(node):
                best, best_key = node, key
            break
    if best is None or clean >= low:
        return
    count = min(len(best.pages), _SAVE_PAGES, kv.slots.free)
    if count < len(best.pages):
        _ = kv.tree.split(best, len(best.pages) - count)
    _ = tickets.save(world, best, now)


def _unheld_pages(tip: Node) -> int:
    """Pages of a tip that no branch would lose, and of the nodes above it that only it holds."""
    pages = 0
    for node in upward(tip):
        if node.leaf_of or node.seed_of or len(node.children) + len(node.stubs) > 1:
            break
        pages += len(node.pages)
    return pages


def _clean_below(node: Node) -> bool:
    return all(not isinstance(child.state, Device) for child in (*node.children.values(), *node.stubs.values()))


def next_use(world: World, branch: Branch, now: float) -> float:
    """Expected seconds until a branch at rest runs again: its lease, else the learnt law of pauses of its tool."""
    lease = world.leases.get(branch.id)
    if lease is not None and lease.until >= now:
        return lease.until - now
    law = world.tool_laws.get(world.tools.get(branch.id, ""), world.law)
    return law.residual(now - branch.rested_at)


def _victim(world: World, now: float) -> Node | None:
    """The tip whose rows are needed last. The one at hand is finished first: victims are whole branches."""
    last = world.victim
    if last is not None and last.id in world.kv.tree.tips and _evictable(world, last, now):
        return last
    best: Node | None = None
    best_key = (-1, -float("inf"))
    for tip in world.kv.tree.tips.values():
        if not _evictable(world, tip, now):
            continue
        key = _key(world, tip, now)
        if key > best_key and key[1] > -float("inf"):
            best, best_key = tip, key
    return best


def _evictable(world: World, tip: Node, now: float) -> bool:
    if tip.pinned_by or not isinstance(tip.state, Device | Both):
        return False
    for number in (*tip.leaf_of, *tip.seed_of):
        firm = world.firm.get(number)
        if firm is not None and firm[0] > now:
            return False
    return True


def _held_below(node: Node) -> set[BranchId]:
    """The branches that would lose these rows."""
    holders: set[BranchId] = set()
    nodes = [node]
    while nodes:
        here = nodes.pop()
        holders |= here.leaf_of
        holders |= here.seed_of
        nodes += here.children.values()
        nodes += here.stubs.values()
    return holders


def _key(world: World, node: Node, now: float) -> tuple[int, float]:
    """Larger goes first: what nobody refers to by age, then by the policy."""
    holders = _held_below(node)
    if not holders:
        return _UNREFERENCED, now - node.used
    soonest, rested = float("inf"), float("inf")
    truth: float | None = None
    oldest: int | None = None
    for number in holders:
        match world.states[number]:
            case Held() as held:
                branch = held.branch
                soonest = min(soonest, next_use(world, branch, now))
                rested = min(rested, now - branch.rested_at)
                if world.oracle is not None:
                    told = world.oracle(branch.id, now)
                    truth = told if truth is None else min(told, truth)
            case Queued() as queued:
                oldest = queued.turn.age if oldest is None else min(oldest, queued.turn.age)
                soonest, rested = 0.0, min(rested, now - queued.branch.rested_at)
            case _:
                return _REFERENCED, -float("inf")
    config = world.config
    rank = POLICIES[config.policy](Facts(
        tokens=node.tokens, rested=rested, expected=soonest, copy_seconds=config.copy_seconds_per_token,
        recompute_seconds=config.recompute_seconds_per_token, oracle=truth, waiting=oldest,
    ))
    return _REFERENCED, -float("inf") if rank is None else rank

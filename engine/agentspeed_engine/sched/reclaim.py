"""Room for older turns: cached rows go first, then the room of strictly younger turns (L4)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from enum import Enum
from functools import partial

from agentspeed_engine.errors import BrokenInvariant
from agentspeed_engine.ids import BranchId, NodeId
from agentspeed_engine.kv.branch import Branch
from agentspeed_engine.kv.branch_states import Decoding, Held, Next, Prefilling, Promoting, Queued, Then
from agentspeed_engine.kv.node_states import Both, Device, Host
from agentspeed_engine.kv.tree import Node, tenant_of, upward
from agentspeed_engine.sched import tickets
from agentspeed_engine.sched.config import CoreConfig
from agentspeed_engine.sched.policy import POLICIES, Facts, needed_in, worth_saving
from agentspeed_engine.sched.ranking import Key, Ranking, Rankings
from agentspeed_engine.sched.state import SchedulerState

_NEVER = float("inf")
_UNREFERENCED = 1
_REFERENCED = 0
_NEEDED = "evicted while at rest: a running turn needed its device pages"
_SAVE_PAGES = 64
"""Most pages of one save that a turn waits for: room comes back in portions, not after a whole context."""
_OWN = (Device, Both)
"""States whose device pages may go. Asked for every tip: a union would be made anew each time."""
_AHEAD = 8
"""One part in so many of the pool is kept free, or such that nothing is lost with it."""


class Grant(Enum):
    """What came of asking for pages."""

    GOT = "got"
    WAIT = "wait"
    """Pages will come back by themselves: rows in flight are acknowledged, or copies to the host end."""
    NONE = "none"
    QUOTA = "quota"
    """The tenant has all it may have: its younger turns wait too, those of others do not."""


def reclaim(world: SchedulerState, pages: int, now: float) -> bool:
    """Evicts cached rows until `pages` are free; as much as it can when they are not enough."""
    kv = world.kv
    coming = tickets.saving(world) if world.tickets else 0
    while kv.pages.free < pages:
        victim = next_victim(world, None, now)
        if victim is None or kv.pages.free + coming >= pages:
            return False
        missing = pages - kv.pages.free
        if not let_go(world, victim, missing, missing - coming, now):
            coming = tickets.saving(world)
    return True


def let_go(world: SchedulerState, victim: Node, missing: int, unsaved: int, now: float) -> bool:
    """Takes up to `missing` pages off a victim. False: so many of them as are `unsaved` come back when the host has
    their rows."""
    if isinstance(victim.state, Both):
        _evict(world, victim, missing)
    elif isinstance(victim.state, Device) and _to_host(world, victim, unsaved, now):
        return False
    else:
        _drop(world, victim, missing)
    return True


def obtain(world: SchedulerState, pages: int, order: tuple[int, BranchId], now: float) -> Grant:
    """`pages` free pages for the turn of this age and branch, preempting younger turns if it must."""
    while not reclaim(world, pages, now):
        if world.tickets and tickets.saving(world):
            return Grant.WAIT
        youngest = world.active[-1] if world.active else None
        if youngest is None or youngest <= order:
            return Grant.WAIT if _settling(world) or world.tickets else Grant.NONE
        state = world.states[youngest[1]]
        assert isinstance(state, Promoting | Prefilling | Decoding)
        preempt(world, state, "preempted: an older turn needed its pages", now)
    return Grant.GOT


def preempt(world: SchedulerState, state: Promoting | Prefilling | Decoding, why: str, now: float) -> None:
    """A turn waits again, at its age."""
    state.turn.preempted += 1
    state.turn.why = why
    world.preemptions += 1
    branch = state.branch
    world.leave(state, Then(Next.REQUEUE), now)
    _rankings(world).moved(branch.leaf, branch.seed)


def make_way(
    world: SchedulerState,
    tenant: str | None,
    available: Callable[[], float],
    pages: int,
    reserve: int,
    due: Node,
    now: float,
) -> bool:
    """Makes so many pages `available` (in the pool, or of a tenant's quota) for rows that are soon `due`, without loss:
    rows that no branch has go, or the device copies of rows that the host has too and that are needed later. Does so
    only if `reserve` pages can still be had after that."""
    kv = world.kv
    spare = available() - pages - reserve
    if spare >= 0:
        return True
    own, above = _key(world, due, now), {node.id for node in upward(due)}
    free: list[Node] = []
    for key, tip in _victims(world, tenant, now).candidates():
        if spare >= 0 or key <= own:
            break
        free.append(tip)
        for node in upward(tip):
            if node.pages_below > (node is not tip) or not _goes_without_loss(world, node, own, above, now):
                break
            spare += len(node.pages)
    if spare < 0:
        return False
    for tip in free:
        here: Node | None = tip
        while here is not None and available() < pages and here.id in kv.tree.tips:
            if not _goes_without_loss(world, here, own, above, now):
                break
            _ = let_go(world, here, pages - int(available()), 0, now)
            rankings = _rankings(world)
            here = rankings.left  # or the node above it
            rankings.moved(here)
    return available() >= pages


def _goes_without_loss(world: SchedulerState, node: Node, own: Key, above: set[NodeId], now: float) -> bool:
    """Whether no branch has these rows, or the host has them too and they are needed later than `own`, the key of
    the node that is due, which is not below them."""
    if node.id in above or not _evictable(world, node, now):
        return False
    return not _held_below(node) or (isinstance(node.state, Both) and _key(world, node, now) > own)


def _settling(world: SchedulerState) -> bool:
    """Whether branches that stopped still hold pages: those come back when their rows in flight are acknowledged."""
    return len(world.kv.rooms) > len(world.active)


def _evict(world: SchedulerState, victim: Node, missing: int) -> None:
    """The end of a clean node, or all of it, stays on the host alone."""
    count = len(victim.pages)
    _rankings(world).left = world.kv.tree.split(victim, count - missing) if missing < count else victim.parent
    world.evicted_pages += len(victim.pages)
    world.kv.evict(victim)
    if (hosts := _rankings(world).hosts) is not None:
        hosts.again(victim)


def _drop(world: SchedulerState, victim: Node, missing: int) -> None:
    kv = world.kv
    held = len(victim.pages)
    childless = not victim.children and not victim.stubs
    if missing < held and childless and not kv.tree.is_stub(victim):
        kv.shrink(victim, missing, _NEEDED)
        _rankings(world).left = victim
        world.evicted_pages += missing
    else:
        _rankings(world).left = kv.drop_with_all_below(victim, _NEEDED)
        world.evicted_pages += held


def _to_host(world: SchedulerState, victim: Node, missing: int, now: float) -> bool:
    """Begins to save the end of a victim, if that is worth it and the host has room or something of later use."""
    kv = world.kv
    if victim.failures or not _held_below(victim) or not _saves(world.config):
        return False
    count = min(len(victim.pages), max(missing, _SAVE_PAGES))
    if not _host_room(world, count, _key(world, victim, now), now):
        return False
    whole = count == len(victim.pages)
    _rankings(world).left = victim.parent if whole else kv.tree.split(victim, len(victim.pages) - count)
    _ = tickets.save(world, victim, now)
    return True


def _host_room(world: SchedulerState, slots: int, key: tuple[int, float], now: float) -> bool:
    """Free slots: first the copies of rows that are in use on the device, then rows of later use than `key`."""
    kv = world.kv
    if kv.slots.free >= slots:
        return True
    for node in _in_use(world):
        if isinstance(node.state, Both):
            kv.forget(node)
            if kv.slots.free >= slots:
                return True
    ranking = _hosts(world, now)
    while kv.slots.free < slots:
        first = ranking.first()
        if first is None or not first[0] > key:
            return False
        above = kv.drop(first[1], "the host is full: its rows were of the latest use")
        ranking.again(above)
        _rankings(world).moved(above)
    return True


def _in_use(world: SchedulerState) -> Iterator[Node]:
    """The nodes that are pinned: those on the paths of active branches."""
    seen: set[NodeId] = set()
    for number in world.kv.rooms:
        branch = world.kv.branches[number]
        for node in upward(branch.leaf if branch.seed is None else branch.seed):
            if node.id in seen:
                break
            seen.add(node.id)
            if node.pinned_by:
                yield node


def save_early(world: SchedulerState, now: float) -> None:
    """Where device pages run short, the rows that would go next are copied, so that evicting them takes no time: a turn
    that enters would wait for the copies, and the turns behind it for theirs after that."""
    kv, config = world.kv, world.config
    ahead, budget = config.pages // _AHEAD, _SAVE_PAGES - tickets.saving(world)
    if kv.pages.free >= ahead or budget <= 0 or world.early_seen == world.pressure() or not _saves(config):
        return
    world.early_seen = world.pressure()
    if not any(map(_is_unsaved, kv.tree.tips.values())):
        return  # without a ranking, which takes longer than all else that a plan does
    clean, unsaved = kv.pages.free, list[tuple[Key, Node, int]]()
    for key, node in _next_to_go(world, now):
        if clean >= ahead or budget <= 0:
            break
        clean += len(node.pages)
        if _to_be_saved(node):
            unsaved.append((key, node, min(len(node.pages), budget)))
            budget -= len(node.pages)
    for key, node, count in unsaved:
        if not _host_room(world, count, key, now):
            continue
        if count < len(node.pages):
            _ = kv.tree.split(node, len(node.pages) - count)
        _ = tickets.save(world, node, now)


def _saves(config: CoreConfig) -> bool:
    """Whether rows are saved before they leave the device."""
    measured = config.copy_seconds_per_token, config.recompute_seconds_per_token
    return config.host_slots > 0 and (config.host_saves == "always" or worth_saving(*measured))


def _to_be_saved(node: Node) -> bool:
    """Whether a branch would lose rows with its device pages. What could not be saved once is not tried again."""
    return isinstance(node.state, Device) and not node.failures and bool(_held_below(node))


def _is_unsaved(tip: Node) -> bool:
    """Whether something is to be saved at this tip or right above it, in whatever order they would go."""
    for node in upward(tip):
        if node.pinned_by or not isinstance(node.state, _OWN):
            return False
        if _to_be_saved(node):
            return True
    return False


def _next_to_go(world: SchedulerState, now: float) -> Iterator[tuple[Key, Node]]:
    """Nodes in the order in which they lose their device pages, each with the key of its tip."""
    made = None in _rankings(world).victims
    ranking = _victims(world, None, now)
    for key, tip in ranking.candidates() if made else ranking.as_made():
        here: Node | None = tip
        gone = 0
        while here is not None and here.pages_below <= gone and not here.pinned_by and isinstance(here.state, _OWN):
            yield key, here
            here, gone = here.parent, 1


def next_use(world: SchedulerState, branch: Branch, now: float) -> float:
    """Expected seconds until a branch at rest runs again: what was announced, else the learnt law of its pauses."""
    lease = world.leases.get(branch.id)
    if lease is not None and lease.until is not None and lease.until > now:
        return lease.until - now
    return world.law_of(branch).residual(now - branch.rested_at)


def next_victim(world: SchedulerState, tenant: str | None, now: float) -> Node | None:
    """The tip to evict first, of all or of one tenant's; None when there is none.

    The policy chooses a branch, and the whole branch goes before another is chosen: so tips that only the last victims
    hold come first. Tips that other branches hold too, and tips that no branch holds, are ranked as usual."""
    rankings = _rankings(world)
    left = rankings.left
    if left is not None and tenant in (None, tenant_of(left.root)) and _goes_on(world, left, rankings.losing, now):
        return left
    rankings.moved(left)
    first = _victims(world, tenant, now).first()
    rankings.losing = frozenset() if first is None else frozenset(_held_below(first[1]))
    return None if first is None else first[1]


def _goes_on(world: SchedulerState, left: Node, losing: frozenset[BranchId], now: float) -> bool:
    if not losing or left.id not in world.kv.tree.tips or not _evictable(world, left, now):
        return False
    return _held_below(left) == losing


def _rankings(world: SchedulerState) -> Rankings:
    if world.rankings is None:
        raise BrokenInvariant("rows were to go outside of a plan")
    return world.rankings


def _victims(world: SchedulerState, tenant: str | None, now: float) -> Ranking:
    """The tips in the order in which their pages go, all or one tenant's."""
    victims = _rankings(world).victims
    if tenant not in victims:
        tree = world.kv.tree
        tips = tree.tips if tenant is None else tree.tips_of.get(tenant, {})
        victims[tenant] = Ranking(tips.values(), partial(_victim_key, world, now))
    return victims[tenant]


def _hosts(world: SchedulerState, now: float) -> Ranking:
    """The tips of what is on the host alone, in the order in which their slots go."""
    rankings = _rankings(world)
    if rankings.hosts is None:
        rankings.hosts = Ranking(world.kv.tree.host_tips.values(), partial(_host_key, world, now))
    return rankings.hosts


def _victim_key(world: SchedulerState, now: float, tip: Node) -> Key | None:
    if tip.id not in world.kv.tree.tips or not _evictable(world, tip, now):
        return None
    key = _key(world, tip, now)
    return key if key[1] > -_NEVER else None


def _host_key(world: SchedulerState, now: float, tip: Node) -> Key | None:
    if tip.pinned_by or tip.id not in world.kv.tree.host_tips or not isinstance(tip.state, Host):
        return None
    return _key(world, tip, now)


def _evictable(world: SchedulerState, tip: Node, now: float) -> bool:
    if tip.pinned_by or not isinstance(tip.state, _OWN):
        return False
    firm = world.firm.keys()
    if firm.isdisjoint(tip.leaf_of) and firm.isdisjoint(tip.seed_of):  # asked for every tip: most are under none
        return True
    return all(world.firm[number][0] <= now for number in firm & (tip.leaf_of | tip.seed_of))


def _held_below(node: Node) -> AbstractSet[BranchId]:
    """The branches that would lose these rows."""
    if not node.children and not node.stubs:
        return node.leaf_of | node.seed_of if node.seed_of and node.leaf_of else node.leaf_of or node.seed_of
    holders: set[BranchId] = set()
    nodes = [node]
    while nodes:
        here = nodes.pop()
        holders |= here.leaf_of
        holders |= here.seed_of
        nodes += here.children.values()
        nodes += here.stubs.values()
    return holders


def _key(world: SchedulerState, node: Node, now: float) -> Key:
    """Larger goes first: rows that no branch refers to by age, before all others by the policy."""
    holders = _held_below(node)
    if not holders:
        return _UNREFERENCED, now - node.used
    soonest, rested = _NEVER, _NEVER
    truth: float | None = None
    oldest: int | None = None
    for number in holders:  # comparisons, not min(): this runs for every tip that rests
        state = world.states[number]
        branch = state.branch
        if isinstance(state, Held):
            expected = next_use(world, branch, now)
            if world.oracle is not None:
                told = world.oracle(branch.id, now)
                truth = told if truth is None or told < truth else truth
        elif isinstance(state, Queued):
            expected, age = 0.0, state.turn.age
            oldest = age if oldest is None or age < oldest else oldest
        else:
            return _REFERENCED, -_NEVER
        if expected < soonest:
            soonest = expected
        if now - branch.rested_at < rested:
            rested = now - branch.rested_at
    config = world.config
    if config.policy == "next_use":
        return _REFERENCED, needed_in(soonest, oldest)
    rank = POLICIES[config.policy](
        Facts(
            node.tokens,
            rested,
            soonest,
            config.copy_seconds_per_token,
            config.recompute_seconds_per_token,
            truth,
            oldest,
        )
    )
    return _REFERENCED, -_NEVER if rank is None else rank

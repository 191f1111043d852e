"""Faults put into the production machines one at a time: the search must find each, or it proves nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from agentspeed_engine.kv import branch_states
from agentspeed_engine.kv.branch_states import Held, Next, Queued, Settling, Then
from agentspeed_engine.kv.kv_cache import KvCache
from agentspeed_engine.kv.node_states import Device, Saving
from agentspeed_engine.kv.tree import subtree, upward
from agentspeed_engine.sched import leases, outcome, quotas, reclaim, step, tickets
from agentspeed_engine.sched.plan import TokenOf
from agentspeed_engine.sched.reclaim import Grant
from agentspeed_engine.sched.state import SchedulerState
from tests.modelcheck import named_bounds
from tests.modelcheck.explorer import Bounds


@dataclass(frozen=True, slots=True)
class Mutant:
    """One fault: what is replaced by what, and bounds small enough to find it fast."""

    name: str
    why: str
    patches: tuple[tuple[Any, str, Any], ...]
    bounds: Bounds = field(default_factory=lambda: Bounds(verbs=4))

    @contextmanager
    def applied(self) -> Iterator[None]:
        with ExitStack() as stack:
            for owner, name, new in self.patches:
                stack.enter_context(mock.patch.object(owner, name, new))
            yield


def _rest_at_once(kv: Any, branch: Any, turn: Any, room: Any, then: Any, now: float) -> Any:
    return branch_states._come_to_rest(kv, branch, turn, room, then, now)


def _only_held_is_evictable(world: Any, tip: Any, now: float) -> bool:
    if tip.pinned_by or not isinstance(tip.state, Device):
        return False
    return all(isinstance(world.states[number], Held) for number in (*tip.leaf_of, *tip.seed_of))


def _room_for_forks_at_rest(world: Any, pages: int, age: int, now: float) -> Grant:
    reserved = sum(1 for state in world.states.values() if isinstance(state, Held) and state.branch.trunk is not None)
    return Grant.GOT if reclaim.reclaim(world, pages + 2 * reserved, now) else Grant.NONE


def _take_from_anyone(world: Any, pages: int, age: int, now: float) -> Grant:
    while not reclaim.reclaim(world, pages, now):
        others = [entry for entry in world.active if entry[0] != age]
        if not others:
            return Grant.WAIT if reclaim._settling(world) else Grant.NONE
        state = world.states[others[0][1]]
        state.turn.preempted += 1
        world.leave(state, Then(Next.REQUEUE), now)
    return Grant.GOT


def _firm_without_bound(world: Any, branch: Any, pages: int) -> str:
    return ""


def _pin_without_seed(self: Any, branch: Any) -> None:
    for node in upward(branch.leaf):
        node.pinned_by.add(branch.id)


def _rewind_keeps_the_leaf(self: Any, branch: Any, tokens: int) -> None:
    """The log is cut, the references stay."""


def _seal_what_is_issued(original: Any) -> Any:
    def seal(self: Any, branch: Any, room: Any, now: float) -> None:
        done, room.done = room.done, room.issued + 1
        original(self, branch, room, now)
        room.done = done

    return seal


def _never_give_back(world: Any, state: Any, now: float) -> None:
    """A turn that cannot grow keeps its room."""


def _release_keeps_the_leaf(self: Any, branch: Any, now: float) -> None:
    """A closed branch stays counted on its leaf."""


def _copy_is_forgotten(self: Any, branch: Any, room: Any) -> None:
    room.copy = None


def _waits_for_anyone(world: Any, branch: Any) -> bool:
    """Waiting for a sibling that is itself only queued."""
    return any(isinstance(state, Queued) and state.branch is not branch for state in world.states.values())


def _quota_takes_from_nobody(world: Any, tenant: str, pages: int, age: int, now: float) -> bool:
    return quotas._shed(world, tenant, pages, now)


def _tails_are_not_counted(self: Any, room: Any, pages: int) -> None:
    room.tail.extend(self.pages.take(pages))


_TWO = Bounds(verbs=2, pages=5, context_limit=8, setup=((1,), (2, 1)))
"""Two sessions whose prompts fit at once and whose answers do not: the older must get its room."""


def _failed_save_keeps_slots(self: Any) -> Any:
    return Device(self._take()), ()


def _failed_load_keeps_waiting(world: Any, nodes: Any, ok: bool, now: float) -> None:
    for node in nodes:
        if ok:
            world.kv.tree.change(node, node.state.acked())
            continue
        host, pages = node.state.failed()
        world.kv.tree.change(node, host)
        world.kv.pages.give(pages)


def _saving_is_evictable(world: Any, tip: Any, now: float) -> bool:
    return not tip.pinned_by


def _drop_what_is_saved(world: Any, victim: Any, missing: int) -> None:
    pages = victim.pages
    world.kv.orphan(victim)
    world.rankings.left = world.kv.tree.detach(victim)
    world.kv.pages.give(pages)


def _ages_alone_decide(real: Callable[..., Any]) -> Callable[..., Any]:
    return lambda world, pages, order, now: real(world, pages, (order[0], 1 << 62), now)


def _two_ahead(state: Any) -> bool:
    return bool(state.turn.drawn + 2 < state.turn.max_tokens)


def _two_unknown(branch: Any, room: Any, tokens: int, unknown: int = 0) -> None:
    room.issued += tokens
    room.flight += 1


def _dead_rows_count(branch: Any, room: Any) -> int:
    return int(room.done)


def _ahead_of_the_last(state: Any) -> bool:
    return bool(state.room.issued == state.branch.known) and not state.turn.spec.stop_strings


def _ahead_of_stop_strings(state: Any) -> bool:
    return bool(state.room.issued == state.branch.known and state.turn.drawn + 1 < state.turn.max_tokens)


def _fed_with_the_first_token(world: Any) -> Any:
    return {
        row.branch: TokenOf(seq, 0)
        for seq, plan in world.flights.items()
        for row in plan.rows
        if row.sample is not None
    }


def _late_row_is_ignored(original: Any) -> Any:
    """A row whose turn has ended by the token before it is taken for one of an older epoch."""

    def came_back(world: Any, row: Any, token: Any, refusal: Any, now: float) -> None:
        state = world.states.get(row.branch)
        if row.token_of is not None and isinstance(state, Settling):
            world.ignored += 1
            return
        original(world, row, token, refusal, now)

    return came_back


def _ahead_takes_room(world: Any, run: Any, state: Any, now: float) -> None:
    oldest = world.active[0][1]
    if world.kv.pages_to(state.room, state.room.issued + 1):
        if not world.kv.pages.free and oldest != state.branch.id:
            reclaim.preempt(world, world.states[oldest], "preempted", now)
        if not world.kv.pages.free:
            return
        world.kv.grow(state.room, 1)
    step._row(world, run, state, 1, run.sampled[state.branch.id])


def _prepared_stays_out(world: Any, turn: int, refusal: Any, now: float) -> None:
    """What was prepared is taken off the list, and put on no other."""
    if (number := world.preparing.get(turn)) is not None:
        world.dequeue(world.states[number].turn, world.states[number].branch)


def _forgets_what_waits(original: Any) -> Any:
    """A turn that waits to be prepared is taken off no list when it is cancelled, forked or closed."""

    def dequeue(self: Any, turn: Any, branch: Any) -> None:
        if not turn.waits:
            original(self, turn, branch)

    return dequeue


def _rows_are_kept(self: Any, branch: Any, room: Any, now: float, why: str) -> None:
    self.freeze(branch, room, now)


def _only_a_branch_that_stays_gives_up(original: Any) -> Any:
    def rest(kv: Any, branch: Any, turn: Any, room: Any, then: Any, now: float) -> Any:
        turn.spoilt &= then.next is Next.HOLD
        return original(kv, branch, turn, room, then, now)

    return rest


def _spoilt_too_late(original: Any) -> Any:
    """Where a turn has been left already, nobody looks at what its rows came to."""

    def came_back(world: Any, row: Any, token: Any, refusal: Any, now: float) -> None:
        settling = isinstance(world.states.get(row.branch), Settling)
        original(world, row, token, None if settling else refusal, now)

    return came_back


def _copies_are_not_waited_for(original: Any) -> Any:
    def disown_from(self: Any, tip: Any) -> None:
        original(self, tip)
        for node in self.tree.nodes.values():
            node.disowned = False

    return disown_from


def _copy_ends_and_the_rows_stay(self: Any, node: Any) -> None:
    node.disowned = False


def _the_cache_keeps_them(self: Any, tip: Any) -> None:
    """Rows that no branch has hang below, and lead there."""
    waits = self._drop_unreferenced(tip)
    if waits is not None:
        waits.disowned = True


def _all_rows_go(self: Any, tip: Any) -> None:
    """Also those that others rest on or run on."""
    for node in [] if tip.parent is None else reversed(list(subtree(tip))):
        _ = self.drop(node)


MUTANTS = (
    Mutant(
        "held-with-rows-in-flight",
        "a branch lets go of its room while a step still writes it",
        ((branch_states, "_leave", _rest_at_once),),
    ),
    Mutant(
        "only-held-reclaimable",
        "rows of queued turns hold the pool against an older turn",
        ((reclaim, "_evictable", _only_held_is_evictable),),
        Bounds(verbs=3, pages=5, context_limit=8, setup=((1,), (2, 1))),
    ),
    Mutant(
        "room-for-forks-at-rest",
        "forks at rest reserve room that running turns need",
        ((step, "obtain", _room_for_forks_at_rest),),
    ),
    Mutant(
        "preempt-anyone",
        "a younger turn takes room from an older one, which takes it back",
        ((step, "obtain", _take_from_anyone),),
        _TWO,
    ),
    Mutant(
        "firm-past-the-bound",
        "firm leases may hold what a turn of the context limit needs (L1)",
        ((leases, "_no_firm", _firm_without_bound),),
        Bounds(verbs=3, firm_pages=1, pages=5, setup=((1,), (2,))),
    ),
    Mutant(
        "seed-not-pinned",
        "the page that is copied may be evicted before the step",
        ((KvCache, "pin", _pin_without_seed),),
        Bounds(verbs=3, setup=((1,),)),
    ),
    Mutant(
        "rewind-keeps-the-leaf",
        "a branch rests on rows its log no longer has",
        ((KvCache, "position", _rewind_keeps_the_leaf),),
    ),
    Mutant(
        "seal-before-done",
        "rows are published before they are computed",
        ((KvCache, "seal", _seal_what_is_issued(KvCache.seal)),),
        Bounds(verbs=4, depth=1),
    ),
    Mutant(
        "release-keeps-the-leaf",
        "a closed branch keeps its rows from being freed",
        ((KvCache, "release", _release_keeps_the_leaf),),
        Bounds(verbs=3),
    ),
    Mutant(
        "copy-forgets-the-seed",
        "the seed stays pinned after its rows were copied",
        ((KvCache, "copied", _copy_is_forgotten),),
        Bounds(verbs=3, setup=((1,),)),
    ),
    Mutant(
        "failed-save-keeps-slots",
        "host slots of a copy that failed belong to nobody",
        ((Saving, "failed", _failed_save_keeps_slots),),
        named_bounds.HOST,
    ),
    Mutant(
        "failed-load-keeps-waiting",
        "a branch goes on waiting for rows whose load failed",
        ((tickets, "_loaded", _failed_load_keeps_waiting),),
        named_bounds.HOST,
    ),
    Mutant(
        "evict-before-the-copy",
        "device pages go while the host has no copy yet",
        ((reclaim, "_evictable", _saving_is_evictable), (reclaim, "_drop", _drop_what_is_saved)),
        named_bounds.HOST,
    ),
    Mutant(
        "quota-takes-from-nobody",
        "an older turn waits for the quota that a younger one of its tenant holds",
        ((quotas, "make_room", _quota_takes_from_nobody),),
        named_bounds.QUOTA,
    ),
    Mutant(
        "quota-forgets-tails",
        "what a running turn writes counts for no tenant",
        ((KvCache, "grow", _tails_are_not_counted),),
        named_bounds.QUOTA,
    ),
    Mutant(
        "wait-for-the-queued",
        "a turn waits for one that is not computing what it needs",
        ((step, "_waits_for_sibling", _waits_for_anyone),),
        Bounds(verbs=4),
    ),
    Mutant(
        "two-tokens-ahead",
        "a row is issued for the token of a row whose own token is not known",
        ((step, "_may_run_ahead", _two_ahead), (branch_states, "_issue", _two_unknown)),
        named_bounds.AHEAD_FAR,
    ),
    Mutant(
        "dead-rows-count",
        "a row counts as done whose token the log never took",
        ((branch_states, "_without_dead_row", _dead_rows_count),),
        named_bounds.AHEAD,
    ),
    Mutant(
        "rest-with-a-row-ahead",
        "a turn that ends lets go of its room while the row after its last token runs",
        ((branch_states, "_leave", _rest_at_once),),
        named_bounds.AHEAD,
    ),
    Mutant(
        "ahead-of-the-last-token",
        "a row is issued for a token that ends its turn for certain",
        ((step, "_may_run_ahead", _ahead_of_the_last),),
        named_bounds.AHEAD,
    ),
    Mutant(
        "ahead-of-stop-strings",
        "a row is issued for a token that the host must see first",
        ((step, "_may_run_ahead", _ahead_of_stop_strings),),
        named_bounds.AHEAD,
    ),
    Mutant(
        "fed-with-anothers-token",
        "a row names the token of another branch in the step before",
        ((step, "_sampled", _fed_with_the_first_token),),
        named_bounds.AHEAD_TWO,
    ),
    Mutant(
        "dead-row-is-ignored",
        "a dead row is never acknowledged, and its branch settles for ever",
        ((outcome, "_row_came_back", _late_row_is_ignored(outcome._row_came_back)),),
        named_bounds.AHEAD,
    ),
    Mutant(
        "ahead-takes-room",
        "a turn that runs ahead takes room from an older one",
        ((step, "_decode_ahead", _ahead_takes_room),),
        named_bounds.AHEAD_TWO,
    ),
    Mutant(
        "ages-alone-decide",
        "turns of one place take no room from each other, so that the first waits for ever",
        ((step, "obtain", _ages_alone_decide(step.obtain)),),
        named_bounds.PLACES_OF_FORKS,
    ),
    Mutant(
        "prepared-stays-out",
        "a turn whose grammar is ready is in no queue",
        ((outcome, "prepared", _prepared_stays_out),),
        named_bounds.PREPARED,
    ),
    Mutant(
        "cancelled-still-prepares",
        "a turn that ended while its grammar was compiled is awaited",
        ((SchedulerState, "dequeue", _forgets_what_waits(SchedulerState.dequeue)),),
        named_bounds.PREPARED,
    ),
    Mutant(
        "spoilt-rows-are-kept",
        "what a spoilt turn wrote is published like any other rows",
        ((KvCache, "disown", _rows_are_kept),),
        named_bounds.SPOILT,
    ),
    Mutant(
        "spoilt-rows-outlive-the-turn",
        "a spoilt turn that waits again or is closed leaves its rows",
        ((branch_states, "_come_to_rest", _only_a_branch_that_stays_gives_up(branch_states._come_to_rest)),),
        named_bounds.SPOILT,
    ),
    Mutant(
        "spoilt-after-it-was-left",
        "rows that come back after their turn was left are taken for sound",
        ((outcome, "_row_came_back", _spoilt_too_late(outcome._row_came_back)),),
        named_bounds.SPOILT,
    ),
    Mutant(
        "spoilt-rows-in-copy-stay",
        "rows of a spoilt turn that are being copied are not marked",
        ((KvCache, "_disown_from", _copies_are_not_waited_for(KvCache._disown_from)),),
        named_bounds.SPOILT_SAVED,
    ),
    Mutant(
        "spoilt-rows-outlive-the-copy",
        "the end of a copy does not drop the rows that are marked",
        ((KvCache, "copy_ended", _copy_ends_and_the_rows_stay),),
        named_bounds.SPOILT_SAVED,
    ),
    Mutant(
        "spoilt-rows-below-cached-ones",
        "rows that only the cache holds keep those of a spoilt turn above them",
        ((KvCache, "_disown_from", _the_cache_keeps_them),),
        named_bounds.SPOILT_LOADED,
    ),
    Mutant(
        "spoilt-rows-of-others",
        "a spoilt turn takes rows from branches that run on them",
        ((KvCache, "_disown_from", _all_rows_go),),
        named_bounds.SPOILT_SHARED,
    ),
)

__all__ = ["MUTANTS", "Mutant"]

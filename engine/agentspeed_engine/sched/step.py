"""Builds the next step: one pass over all turns in age order decides room (L2-L4), budgets decide tokens."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from heapq import heapify, heappop, heapreplace, merge

from agentspeed_engine.errors import BrokenInvariant
from agentspeed_engine.ids import BranchId, StepSeq, pages_for
from agentspeed_engine.kv.branch import Branch, Room
from agentspeed_engine.kv.branch_states import Decoding, Next, Prefilling, Promoting, Queued, Then
from agentspeed_engine.kv.node_states import Host
from agentspeed_engine.kv.tree import Node, tenant_of
from agentspeed_engine.kv.turn import Turn
from agentspeed_engine.protocol.messages import TurnStarted
from agentspeed_engine.protocol.sampling import counts_log, counts_message
from agentspeed_engine.sched import prefetch, quotas, tickets
from agentspeed_engine.sched.admission import held_by_firm, lacks, lacks_quota, target
from agentspeed_engine.sched.plan import PageCopy, Row, StepPlan, TokenOf
from agentspeed_engine.sched.ranking import Rankings
from agentspeed_engine.sched.reclaim import Grant, obtain, reclaim, save_early
from agentspeed_engine.sched.state import SchedulerState, usage

_PASSED_OVER = 32
_FEW = 8
"""When pages are short, a seed of at most `page_tokens / _FEW` rows is computed again: holding its node until the copy
is made would cost more."""
_LAST_TOKEN = "its last token is computed once more: the next one is drawn from what comes of it"


@dataclass(slots=True)
class _Pass:
    """One pass in age order."""

    cold: int
    """Tokens left for cold chunks."""
    short: int
    """Tokens left for short extends."""
    refused: bool = False
    """An older turn lacked room: no younger one is admitted or grows (L3)."""
    full: dict[str, BranchId] = field(default_factory=dict[str, BranchId])
    """By tenant: the branch that lacked pages of its quota. No younger turn of that tenant is admitted or grows."""
    passed_over: int = 0
    """Cold prompts that found no tokens left. After `_PASSED_OVER` of them the pass looks for no short extend."""
    rows: list[Row] = field(default_factory=list[Row])
    copies: list[PageCopy] = field(default_factory=list[PageCopy])
    sampled: dict[BranchId, TokenOf] = field(default_factory=dict[BranchId, TokenOf])
    """The newest token in flight of each branch, where turns may run ahead of it."""


def plan(world: SchedulerState, now: float) -> StepPlan | None:
    """The next step, or None when nothing can be computed now."""
    tickets.expire(world, now)
    world.rankings = Rankings()
    run = _Pass(world.config.prefill_chunk, world.config.extend_tokens)
    if world.config.decode_ahead:
        run.sampled = _sampled(world)
    walked = len(world.flights) <= world.config.depth
    if walked:
        _walk(world, run, now)
    prefetch.due(world, now, everybody_chose=walked)
    world.rankings = None
    if not run.rows:
        return None
    seq = StepSeq(world.next_seq)
    world.next_seq += 1
    step = StepPlan(seq=seq, rows=tuple(run.rows), copies=tuple(run.copies), ended=tuple(world.ended))
    world.ended.clear()
    world.flights[seq] = step
    world.copied_pages += len(run.copies)
    return step


def _walk(world: SchedulerState, run: _Pass, now: float) -> None:
    """The pass itself, and what it tells of those who wait."""
    world.refused = None
    # The pass moves turns between the two lists, so it walks over what they were.
    for _, number in merge(list(world.active), _Entrants(world, run)):
        match world.states.get(number):
            case Decoding() as state:
                if not state.room.flight:
                    _decode(world, run, state, now)
                elif world.config.decode_ahead and _may_run_ahead(state):
                    _decode_ahead(world, run, state, now)
            case Prefilling() as state:
                _prefill(world, run, state, now)
            case Queued() as state:
                if not run.refused:  # the walk looks one turn ahead
                    _admit(world, run, state, now)
            case Promoting():
                pass  # it waits for its loads
            case _:
                pass  # an older turn took its room in this very pass
    world.over_quota = list(run.full.values())
    world.spent = world.next_age if run.cold <= 0 else 0
    save_early(world, now)


class _Entrants:
    """The queue in age order, ending at the first refusal, without the turns of tenants that are full: a turn that
    waits costs nothing."""

    __slots__ = ("_heads", "_last", "_preemptions", "_queues", "_run", "_world")

    def __init__(self, world: SchedulerState, run: _Pass) -> None:
        self._world = world
        self._run = run
        self._queues = {"": world.queue} if world.config.tenant_pages is None else world.queues
        self._last = (-1, BranchId(-1))
        self._heads: list[tuple[tuple[int, BranchId], str]] = []
        """The next turn of each queue, as a heap; some may be behind."""
        self._preemptions = -1

    def __iter__(self) -> _Entrants:
        return self

    def __next__(self) -> tuple[int, BranchId]:
        run = self._run
        if run.refused or run.passed_over >= _PASSED_OVER or (run.cold <= 0 and run.short <= 0):
            raise StopIteration
        if self._preemptions != self._world.preemptions:  # the pass itself has put turns back
            self._preemptions = self._world.preemptions
            self._heads = [(head, tenant) for tenant in self._queues if (head := self._after_last(tenant)) is not None]
            heapify(self._heads)
        while self._heads:
            head, tenant = self._heads[0]
            now = None if tenant in run.full else self._after_last(tenant)
            if now is None:
                _ = heappop(self._heads)
            elif now != head:
                _ = heapreplace(self._heads, (now, tenant))
            else:
                self._last = head
                return head
        raise StopIteration

    def _after_last(self, tenant: str) -> tuple[int, BranchId] | None:
        queue = self._queues.get(tenant, [])
        position = bisect_right(queue, self._last)
        return queue[position] if position < len(queue) else None


# ---- one turn of the pass -----------------------------------------------------------------------------------------
def _decode(world: SchedulerState, run: _Pass, state: Decoding, now: float) -> None:
    room = state.room
    if world.kv.pages_to(room, room.issued + 1) and not _grow(world, run, state, now):
        return
    _row(world, run, state, 1)


def _sampled(world: SchedulerState) -> dict[BranchId, TokenOf]:
    found: dict[BranchId, TokenOf] = {}
    for seq, step in world.flights.items():
        rows = [row for row in step.rows if row.sample is not None]
        found.update((row.branch, TokenOf(seq, place)) for place, row in enumerate(rows))
    return found


def _may_run_ahead(state: Decoding) -> bool:
    """Whether a row may be issued for the token that is in flight. It must be the only one that is not known, not the
    last that the turn may draw, and of a turn whose next token does not depend on what the host finds in this one."""
    turn = state.turn
    spec = turn.spec
    if spec.grammar is not None or spec.stop_strings or counts_message(spec.sampling) or counts_log(spec.sampling):
        return False
    return state.room.issued == state.branch.known and turn.drawn + 1 < turn.max_tokens


def _decode_ahead(world: SchedulerState, run: _Pass, state: Decoding, now: float) -> None:
    """A row for the token in flight. The row is dead if that token ends the turn, so no running turn gives up room for
    it: where no page is to be had otherwise, the turn grows when the token is there."""
    room = state.room
    if world.kv.pages_to(room, room.issued + 1):
        if run.refused or room.tenant in run.full:
            return
        _stretch(world, room, 1, now)
        if world.kv.pages_to(room, room.issued + 1):
            return
    _row(world, run, state, 1, run.sampled[state.branch.id])


def _prefill(world: SchedulerState, run: _Pass, state: Prefilling, now: float) -> None:
    room, branch = state.room, state.branch
    wanted = min(target(state.turn, branch) - room.issued, _share(world, run, state))
    if wanted <= 0:
        return
    if world.kv.pages_to(room, room.issued + 1) and not _grow(world, run, state, now):
        return
    if not run.refused and room.tenant not in run.full:  # else older ones wait for what a longer chunk would take
        _stretch(world, room, wanted, now)
    _row(world, run, state, min(wanted, world.kv.capacity(room) - room.issued))


def _grow(world: SchedulerState, run: _Pass, state: Prefilling | Decoding, now: float) -> bool:
    """One page more, from younger turns if it must be; else the turn gives its own room back (L4)."""
    if run.refused:
        return False
    asked = _obtain(world, run, state.branch, 1, 0, state.turn.age, now)
    if asked is Grant.GOT:
        world.kv.grow(state.room, 1)
        return True
    if asked is Grant.QUOTA:
        return False
    _refuse(world, run, state, _shortage(world, asked, 1, now))
    if asked is Grant.NONE and not state.room.flight and world.active[0][1] != state.branch.id:
        give_back(world, state, now)
    return False


def _obtain(world: SchedulerState, run: _Pass, branch: Branch, pages: int, spare: int, age: int, now: float) -> Grant:
    """`obtain`, within what the branch's tenant may have; `spare` pages more are to stay free."""
    tenant, order = tenant_of(branch.root), (age, branch.id)
    if tenant in run.full or not quotas.make_room(world, tenant, pages, order, now):
        _ = run.full.setdefault(tenant, branch.id)
        return Grant.QUOTA
    return obtain(world, pages + spare, order, now)


def _refuse(world: SchedulerState, run: _Pass, state: Queued | Prefilling | Decoding, why: str) -> None:
    run.refused = True
    world.refused = (state.branch.id, why)


def _shortage(world: SchedulerState, asked: Grant, pages: int, now: float) -> str:
    """What holds the pages that `obtain` did not get."""
    if asked is Grant.NONE:
        return "firm leases" if world.kv.pages.free + held_by_firm(world, now) >= pages else "room"
    if tickets.saving(world):
        return "saves in flight"
    return "loads in flight" if world.tickets else "rows in flight"


def give_back(world: SchedulerState, state: Prefilling | Decoding, now: float) -> None:
    """A turn that cannot grow, with no younger turn to take from, waits again at its old age."""
    state.turn.preempted += 1
    state.turn.why = "gave its room back: older turns hold the rest of the pool"
    world.preemptions += 1
    branch = state.branch
    world.leave(state, Then(Next.REQUEUE), now)
    _moved(world, branch)


def _moved(world: SchedulerState, branch: Branch, *others: Node | None) -> None:
    """A branch rests elsewhere, or lets go of its path: who goes first may change there, and at `others`."""
    if world.rankings is not None:
        world.rankings.moved(branch.leaf, branch.seed, *others)


def _stretch(world: SchedulerState, room: Room, tokens: int, now: float) -> None:
    """Takes more pages for a longer chunk, as far as no other turn has to give up room for them."""
    missing = quotas.allowed(world, room.tenant, world.kv.pages_to(room, room.issued + tokens), now)
    if missing:
        _ = reclaim(world, missing, now)
        world.kv.grow(room, min(missing, world.kv.pages.free))


def _row(
    world: SchedulerState, run: _Pass, state: Prefilling | Decoding, tokens: int, token_of: TokenOf | None = None
) -> None:
    """`token_of`: the one token of the row, when it is not known yet."""
    room, branch, turn = state.room, state.branch, state.turn
    if tokens <= 0:
        raise BrokenInvariant(f"branch {branch.id} was given a row of {tokens} tokens")
    if room.stale or world.kv.tree.reshaped:
        world.kv.refresh(branch, room)
    position = room.issued
    if room.copy is not None and room.flight == 0:
        run.copies.append(room.copy)
    last = position + tokens == branch.known or token_of is not None
    state.issue(tokens)
    run.rows.append(
        Row(
            branch=branch.id,
            epoch=branch.epoch,
            position=position,
            ids=branch.log.ids(position, position + tokens),
            path=room.path,
            tail_start=room.tail_start,
            tail_pages=tuple(room.tail),
            sample=turn.spec if last and turn.max_tokens else None,
            token_of=token_of,
        )
    )
    if isinstance(state, Prefilling):
        short = min(tokens, run.short) if _is_short(world, turn, branch, position) else 0
        run.short -= short
        run.cold -= tokens - short


def _share(world: SchedulerState, run: _Pass, state: Prefilling) -> int:
    """Tokens this turn may compute now."""
    if _is_short(world, state.turn, state.branch, state.room.issued):
        return run.short + max(0, run.cold)
    return max(0, run.cold)


def _is_short(world: SchedulerState, turn: Turn, branch: Branch, position: int) -> bool:
    return target(turn, branch) - position <= world.config.extend_tokens


# ---- entry --------------------------------------------------------------------------------------------------------
def _admit(world: SchedulerState, run: _Pass, state: Queued, now: float) -> None:
    branch, turn, kv = state.branch, state.turn, world.kv
    if tenant_of(branch.root) in run.full or _waits_for_sibling(world, branch):
        return
    if run.cold <= 0 and not _is_short(world, turn, branch, branch.resident):
        run.passed_over += 1
        return
    if turn.max_tokens == 0 and branch.resident >= branch.known - 1:
        _nothing_to_fill(world, state, now)
        return
    before = (branch.leaf, branch.seed)
    if branch.resident > branch.known - 1:
        kv.position(branch, branch.known - 1)
        branch.lost_why = branch.lost_why or _LAST_TOKEN
    kv.extend(branch)
    _moved(world, branch, *before)
    if _joins_sibling(world, branch):
        return
    if turn.max_tokens == 0 and branch.resident >= branch.known - 1:
        _nothing_to_fill(world, state, now)
        return
    chain = kv.unreadable(branch)
    if not all(isinstance(node.state, Host) for node in chain):
        return  # rows it needs are on their way: they come, or their ticket fails by its deadline (L6)
    if branch.seed is not None and (chain or kv.seed_page(branch) is None):
        _give_up_seed(world, branch, "less than a page of its rows was given up: those before it are on the host")
    short = _is_short(world, turn, branch, branch.resident)
    if (run.cold if not short else run.short + max(0, run.cold)) <= 0:
        return
    if lacks_quota(world, state, now):  # first: what its own tenant has is no reason for others to wait
        run.full[tenant_of(branch.root)] = branch.id
        return
    lacking = lacks(world, state, now)
    if lacking:
        _refuse(world, run, state, lacking)
        return
    # A page for each older turn stays free, or the turn would be let in to be preempted at their next page.
    loads, spare = tickets.pages_of(chain), bisect_left(world.active, (turn.age, branch.id))
    if _pins_much_for_little(world, state, loads + spare):
        _give_up_seed(world, branch, "a few of its rows were given up: all of the node that has them would have stayed")
    kv.pin(branch)
    asked = _obtain(world, run, branch, loads + _entry_pages(world, branch), spare, turn.age, now)
    if asked is not Grant.GOT and branch.seed is not None:
        kv.unpin_seed(branch)
        # Less than a page to recompute, against waiting for ever.
        _give_up_seed(world, branch, "less than a page of its rows was given up: no page was free to copy it into")
        _ = run.full.pop(tenant_of(branch.root), None)
        asked = _obtain(world, run, branch, loads + 1, spare, turn.age, now)
    if asked is not Grant.GOT:
        kv.unpin(branch)
        _moved(world, branch)
        if asked is not Grant.QUOTA:
            _refuse(world, run, state, _shortage(world, asked, loads + spare + 1, now))
        return
    _enter(world, run, state, now)


def _pins_much_for_little(world: SchedulerState, state: Queued, others: int) -> bool:
    """Whether its seed saves a few rows and costs the choice of a victim: pages are short, and the whole node of the
    seed stays until the copy is made."""
    branch, page = state.branch, world.config.page_tokens
    if branch.seed is None or branch.seed_rows * _FEW > page or world.kv.sole_stub(branch):
        return False
    return world.kv.pages.free < others + pages_for(target(state.turn, branch) - branch.leaf.end, page)


def _give_up_seed(world: SchedulerState, branch: Branch, why: str) -> None:
    seed = branch.seed
    world.kv.give_up_seed(branch, why)
    _moved(world, branch, seed)


def _enter(world: SchedulerState, run: _Pass, state: Queued, now: float) -> None:
    """All or nothing (L2): the loads, the copy and the first quantum have their pages."""
    branch, turn, kv = state.branch, state.turn, world.kv
    _count(world, turn, branch)
    world.dequeue(turn, branch)
    chain = kv.unreadable(branch)
    if chain:
        tickets.load(world, chain, now)
    entered = state.admit(kv, kv.enter(branch, _entry_pages(world, branch)))
    world.activate(entered)
    if not turn.admitted:
        turn.admitted = True
        turn.started_at = now
        world.tell(branch, TurnStarted(branch=branch.id, usage=usage(turn, now)))
    if isinstance(entered, Prefilling):
        _prefill(world, run, entered, now)


def _entry_pages(world: SchedulerState, branch: Branch) -> int:
    return 0 if branch.seed is not None and world.kv.sole_stub(branch) else 1


def _nothing_to_fill(world: SchedulerState, state: Queued, now: float) -> None:
    """A prefill-only turn whose rows are all there ends without room."""
    turn = state.turn
    _count(world, turn, state.branch)
    turn.admitted, turn.started_at, turn.end = True, now, "max_tokens"
    world.dequeue(turn, state.branch)
    held = state.abort()
    world.rest(held)
    world.tell(held.branch, TurnStarted(branch=held.branch.id, usage=usage(turn, now)))
    world.finish_turn(held.branch, turn, now)


def _count(world: SchedulerState, turn: Turn, branch: Branch) -> None:
    """What this admission resumes, recomputes and computes anew."""
    available, computed = branch.resident, min(branch.computed, branch.known)
    lost = max(0, computed - available)
    if lost and not turn.why:
        turn.why = branch.lost_why if lost > (computed == branch.known) else _LAST_TOKEN
    if turn.admitted:
        turn.recomputed += lost
        return
    turn.resumed_device = min(world.kv.on_device(branch), computed)
    turn.resumed_host = min(available, computed) - turn.resumed_device
    turn.shared = max(0, available - computed)
    turn.recomputed = lost
    turn.new = branch.known - turn.resumed_device - turn.resumed_host - lost


# ---- one prefill for simultaneous siblings ------------------------------------------------------------------------
def _waits_for_sibling(world: SchedulerState, branch: Branch) -> bool:
    waiting = world.fill_of.get(branch.id)
    if waiting is None:
        return False
    filler = world.states.get(waiting[0])
    if isinstance(filler, Prefilling) and filler.turn.spec.turn == waiting[1]:
        return True
    del world.fill_of[branch.id]
    return False


def _joins_sibling(world: SchedulerState, branch: Branch) -> bool:
    """True when an active turn is computing the next page this one needs: it waits instead of computing it again."""
    page = world.config.page_tokens
    start = branch.leaf.end
    if start + page > branch.known - 1:
        return False
    wanted = branch.log.packed(start, start + page)
    for _, number in world.actives.get(tenant_of(branch.root), ()):
        filler = world.states[number]
        if not isinstance(filler, Prefilling) or filler.branch.root != branch.root:
            continue
        other = filler.branch
        if (
            filler.room.tail_start <= start
            and other.known >= start + page
            and other.log.packed(start, start + page) == wanted
            and other.log.packed(0, start) == branch.log.packed(0, start)
        ):
            world.fill_of[branch.id] = (number, filler.turn.spec.turn)
            return True
    return False

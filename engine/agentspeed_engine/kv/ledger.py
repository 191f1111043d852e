"""The invariants of the ownership machines, recounted from the owners themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Protocol

from agentspeed_engine.errors import BrokenInvariant
from agentspeed_engine.ids import BranchId, PageId, pages_for
from agentspeed_engine.kv.branch_states import BranchState, Decoding, Prefilling, Promoting, Settling
from agentspeed_engine.kv.kv_cache import KvCache
from agentspeed_engine.kv.node_states import Both, Host, Loading, Saving
from agentspeed_engine.kv.tree import tenant_of, upward


def check(kv: KvCache, states: Mapping[BranchId, BranchState]) -> None:
    """Raises `BrokenInvariant` naming the rule that does not hold."""
    _device_pages_are_conserved(kv, states)
    _nodes_are_sound(kv, states)
    for number, state in states.items():
        _branch_is_sound(kv, number, state)
    private = Counter(branch.session for branch in kv.branches.values() if branch.private)
    if private != kv.private:
        raise BrokenInvariant(f"private sessions have {dict(private)} branches and are counted {kv.private}")
    active = {n for n, state in states.items() if isinstance(state, Promoting | Prefilling | Decoding | Settling)}
    if set(kv.rooms) != active:
        raise BrokenInvariant("(3) a branch at rest has room")
    if not kv.tree.reshaped <= active:
        raise BrokenInvariant(f"the path of {kv.tree.reshaped - active} is to be read anew, and they read none")


class RowInFlight(Protocol):
    """What the ledger needs of a row of a step that has not come back."""

    @property
    def branch(self) -> BranchId: ...
    @property
    def epoch(self) -> int: ...
    @property
    def tail_pages(self) -> tuple[PageId, ...]: ...


def check_flights(states: Mapping[BranchId, BranchState], rows: Iterable[RowInFlight]) -> None:
    """(4): rows in flight mean an active branch that still owns every page they write."""
    for row in rows:
        state = states.get(row.branch)
        if not isinstance(state, Prefilling | Decoding | Settling) or state.branch.epoch != row.epoch:
            raise BrokenInvariant(f"(4) rows of branch {row.branch} are in flight and it let go of its room")
        held = {*state.room.tail, *(page for run in state.room.path for page in run.pages)}
        if not held.issuperset(row.tail_pages):
            raise BrokenInvariant(f"(4) rows of branch {row.branch} in flight write pages it no longer holds")


def _device_pages_are_conserved(kv: KvCache, states: Mapping[BranchId, BranchState]) -> None:
    owned: list[int] = list(kv.pages.free_numbers())
    owned += [page for node in kv.tree.nodes.values() for page in node.pages]
    owned += [page for room in kv.rooms.values() for page in room.tail]
    if sorted(owned) != list(range(kv.pages.total)):
        raise BrokenInvariant("(1) device pages are not conserved: one is owned twice or by nobody")
    by_tenant = Counter(dict.fromkeys(kv.tree.owned, 0))
    for node in kv.tree.nodes.values():
        by_tenant[tenant_of(node.root)] += len(node.pages)
    for number, room in kv.rooms.items():
        by_tenant[tenant_of(states[number].branch.root)] += len(room.tail)
    if +by_tenant != kv.tree.owned:
        raise BrokenInvariant(f"tenants own {dict(+by_tenant)} pages and are counted {kv.tree.owned}")
    slots: list[int] = list(kv.slots.free_numbers())
    for node in kv.tree.nodes.values():
        if isinstance(node.state, Saving | Both | Host | Loading):
            slots += node.state.slots
    if sorted(slots) != list(range(kv.slots.total)):
        raise BrokenInvariant("(1) host slots are not conserved: one is owned twice or by nobody")


def _nodes_are_sound(kv: KvCache, states: Mapping[BranchId, BranchState]) -> None:
    page_tokens = kv.page_tokens
    for node in kv.tree.nodes.values():
        parent = node.parent
        if node.state is None or parent is None:
            raise BrokenInvariant(f"(6) {node!r} exists without a copy")
        if node.start != parent.end or node.start % page_tokens:
            raise BrokenInvariant(f"{node!r} does not start where {parent!r} ends")
        if parent.parent is not None and parent.id not in kv.tree.nodes:
            raise BrokenInvariant(f"{node!r} hangs below a node that is gone")
        if node.owns_pages and len(node.pages) != pages_for(node.tokens, page_tokens):
            raise BrokenInvariant(f"{node!r} has {len(node.pages)} pages for {node.tokens} tokens")
        if node.owns_pages != bool(node.pages):
            raise BrokenInvariant(f"{node!r} is wrongly filed as owning pages")
        if node.readable and not parent.readable:
            raise BrokenInvariant(f"(2) {node!r} is on the device below {parent!r}, which is not")
        if node.owns_pages and parent.parent is not None and not parent.owns_pages:
            raise BrokenInvariant(f"(2) {node!r} has device pages below {parent!r}, which has none")
        if isinstance(node.state, Saving | Loading) and node not in kv.tree.in_copy.get(node.state.ticket, ()):
            raise BrokenInvariant(f"{node!r} waits for a ticket that does not know it")
        if node.disowned and not isinstance(node.state, Saving | Loading):
            raise BrokenInvariant(f"(10) {node!r} is not to be kept and is not being copied")
        if node.tokens % page_tokens and (node.children or node.stubs or node.tokens > page_tokens):
            raise BrokenInvariant(f"(7) {node!r} is a stub with children")
        below = (*node.children.values(), *node.stubs.values())
        tip = node.owns_pages and not any(child.owns_pages for child in below)
        if node.pages_below != sum(child.owns_pages for child in below):
            raise BrokenInvariant(f"{node!r} counts {node.pages_below} nodes with pages below it")
        if (not below and not node.owns_pages) != (node.id in kv.tree.host_tips):
            raise BrokenInvariant(f"{node!r} is wrongly listed among the host's tips")
        of_tenant = node.id in kv.tree.tips_of.get(tenant_of(node.root), {})
        if not tip == of_tenant == (node.id in kv.tree.tips):
            raise BrokenInvariant(f"{node!r} is wrongly listed among the tips")
        for holder in _all(node.leaf_of, node.seed_of, node.pinned_by):
            if holder not in states:
                raise BrokenInvariant(f"(5) {node!r} is held by branch {holder}, which is closed")


def _branch_is_sound(kv: KvCache, number: BranchId, state: BranchState) -> None:
    branch = state.branch
    if branch.id != number or kv.branches.get(number) is not branch:
        raise BrokenInvariant(f"branch {number} is filed under another number")
    if number not in branch.leaf.leaf_of:
        raise BrokenInvariant(f"(5) branch {number} is not counted on its leaf")
    if branch.seed is not None and number not in branch.seed.seed_of:
        raise BrokenInvariant(f"(5) branch {number} is not counted on its seed")
    ids = b"".join(node.ids for node in reversed(list(upward(branch.leaf))))
    if ids != branch.log.packed(0, branch.leaf.end) or branch.leaf.end > branch.known:
        raise BrokenInvariant(f"branch {number} rests on rows of other ids than its log's")
    if isinstance(state, Promoting | Prefilling | Decoding | Settling):
        room = state.room
        if kv.rooms.get(number) is not room:
            raise BrokenInvariant(f"(3) branch {number} has room nobody knows of")
        unknown = room.issued - branch.known
        if unknown > 0:
            _runs_ahead_soundly(number, state, unknown)
        if not room.done <= min(room.issued, branch.known):
            raise BrokenInvariant(f"branch {number}: done {room.done}, issued {room.issued}, known {branch.known}")
        if not isinstance(state, Settling) and room.done > branch.known - 1:
            raise BrokenInvariant(f"(8) branch {number} has no token left to feed")
        if room.issued > kv.capacity(room):
            raise BrokenInvariant(f"(4) branch {number} writes past its tail")
        for node in upward(branch.leaf):
            coming = isinstance(state, Promoting) and isinstance(node.state, Loading)
            if number not in node.pinned_by or not (node.readable or coming):
                raise BrokenInvariant(f"(4) branch {number} reads {node!r}, which is not pinned or not on the device")
        if room.copy is not None and (branch.seed is None or number not in branch.seed.pinned_by):
            raise BrokenInvariant(f"(4) branch {number} copies rows of a seed it does not pin")
        if room.tail_start != branch.leaf.end:
            raise BrokenInvariant(f"(4) branch {number} has a gap between path and tail")
    elif any(number in node.pinned_by for node in upward(branch.leaf)):
        raise BrokenInvariant(f"(3) branch {number} is at rest and pins its path")


def _runs_ahead_soundly(number: BranchId, state: Promoting | Prefilling | Decoding | Settling, unknown: int) -> None:
    """(9): at most one row is fed with a token that is not known, and only where the token may be followed by one."""
    turn, room = state.turn, state.room
    if unknown > 1 or isinstance(state, Promoting | Prefilling) or not room.flight:
        raise BrokenInvariant(f"(9) branch {number} issued {unknown} rows of ids it does not know")
    if isinstance(state, Decoding) and turn.drawn + 1 >= turn.max_tokens:
        raise BrokenInvariant(f"(9) branch {number} runs ahead of the last token that its turn may draw")
    if turn.spec.grammar is not None or turn.spec.stop_strings:
        raise BrokenInvariant(f"(9) branch {number} runs ahead of a token that its grammar or stop strings must see")


def _all(*sets: set[BranchId]) -> set[BranchId]:
    return {number for some in sets for number in some}

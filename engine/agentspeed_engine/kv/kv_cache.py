"""Every move of a page, a reference or a pin: the one class whose methods change who owns what."""

from __future__ import annotations

from typing import final

from agentspeed_engine.errors import BrokenInvariant
from agentspeed_engine.ids import BranchId, NodeId, PageId, SessionId, SlotId, TicketId, page_floor, pages_for
from agentspeed_engine.kv.branch import Branch, Room
from agentspeed_engine.kv.node_states import Both, Device, Host
from agentspeed_engine.kv.pool import Pool
from agentspeed_engine.kv.tree import Match, Node, RootKey, Tree, session_of, subtree, tenant_of, upward
from agentspeed_engine.kv.views import PageCopy


@final
class KvCache:
    """The pools, the tree, and every move of a page, a reference or a pin between them.

    The scheduler and the states of branches call it; both run on the core's one thread, and nothing here blocks. Every
    method checks what it needs before it takes anything: it raises `BrokenInvariant`, which is always a bug of ours,
    or it is carried out whole. References (`leaf_of`, `seed_of`) and pins change here alone, but for the first
    reference of a branch that is opened.

    - A branch at rest is moved with `settle_on`, `position` (to at most so many tokens), `extend` (onto rows that
      others computed) and `release` (it ends). These allocate and copy nothing.
    - Room is entered with `pin` and `enter`, grown with `grow`, and given back whole with `freeze`, whose full pages
      become a segment that others can share, or with `disown`, which keeps nothing. `enter` and `grow` need as many
      free pages as they take; the caller has made them free (`sched.reclaim`). `freeze` and `disown` may be called
      only when no row of the branch is in flight.
    - `drop`, `shrink`, `evict` and `forget` take rows from nodes that nobody pins. Branches at rest that held them are
      moved to the parent and told why (`Branch.lost_why`).
    """

    def __init__(self, *, pages: int, page_tokens: int, slots: int = 0) -> None:
        self.page_tokens = page_tokens
        self.slots: Pool[SlotId] = Pool([SlotId(number) for number in range(slots)])
        self.pages: Pool[PageId] = Pool([PageId(number) for number in range(pages)])
        self.branches: dict[BranchId, Branch] = {}
        """Every branch that is not closed."""
        self.private: dict[SessionId, int] = {}
        """How many of them each private session has: with the last one its rows end."""
        self.rooms: dict[BranchId, Room] = {}
        """The rooms of active branches. Entries come and go with pins."""
        self.moved: set[BranchId] = set()
        """Branches whose rows may have moved since `taken_moves` was last called, beside those below `Tree.moved`."""
        self.tree = Tree(page_tokens)

    # ---- branches at rest -----------------------------------------------------------------------------------------
    def join(self, branch: Branch) -> None:
        """A branch begins; `release` is its end."""
        self.branches[branch.id] = branch
        if branch.private:
            self.private[branch.session] = self.private.get(branch.session, 0) + 1

    def settle_on(self, branch: Branch, leaf: Node, seed: Node | None, rows: int) -> None:
        """Moves the leaf and seed references."""
        branch.leaf.leaf_of.discard(branch.id)
        if branch.seed is not None:
            branch.seed.seed_of.discard(branch.id)
        branch.leaf, branch.seed, branch.seed_rows = leaf, (seed if rows else None), (rows if seed is not None else 0)
        leaf.leaf_of.add(branch.id)
        if branch.seed is not None:
            branch.seed.seed_of.add(branch.id)

    def position(self, branch: Branch, tokens: int) -> None:
        """Makes the path end at `tokens` at most: leaf at the page floor, the rest a seed. Copies nothing."""
        leaf = branch.leaf
        if tokens >= leaf.end:
            rows = min(branch.seed_rows, tokens - leaf.end)
            self.settle_on(branch, leaf, branch.seed, rows)
            return
        while leaf.start > tokens:
            if leaf.parent is None:
                raise BrokenInvariant(f"branch {branch.id} positioned before its root")
            leaf = leaf.parent
        cut = page_floor(tokens, self.page_tokens)
        rows = tokens - cut
        if cut == leaf.start:
            if leaf.parent is None:
                self.settle_on(branch, leaf, None, 0)
            else:
                self.settle_on(branch, leaf.parent, leaf, rows)
            return
        upper = self.tree.split(leaf, (cut - leaf.start) // self.page_tokens)
        self.settle_on(branch, upper, leaf, rows)

    def extend(self, branch: Branch) -> None:
        """Moves a branch at rest onto rows that others computed of what it knows, keeping one token to feed."""
        start, last = branch.leaf.end, branch.known - 1
        if last <= start:
            return
        page = branch.log.packed(start, min(last, start + self.page_tokens))
        # Every plan calls this for every waiting turn, so the rest is compared only when the tree has the first page.
        ids = branch.log.packed(start, last) if page in branch.leaf.children else page
        match = self.tree.match(branch.leaf, ids)
        if match.node is branch.leaf and match.rows <= branch.seed_rows:
            return
        self.settle_on(branch, match.node, match.seed, match.rows)

    def open_at(self, branch: Branch) -> None:
        """A new branch settles on the longest match of its whole log."""
        match: Match = self.tree.match(branch.leaf, branch.log.packed(0, branch.known))
        self.settle_on(branch, match.node, match.seed, match.rows)

    def release(self, branch: Branch, now: float) -> None:
        """A branch that ends drops its references; a private one also its rows, as far as nobody shares them."""
        branch.leaf.leaf_of.discard(branch.id)
        ends = [branch.leaf]
        if branch.seed is not None:
            branch.seed.seed_of.discard(branch.id)
            ends.insert(0, branch.seed)
            branch.seed, branch.seed_rows = None, 0
        if branch.private:
            self.private[branch.session] -= 1
            if not self.private[branch.session]:
                del self.private[branch.session]
            for end in ends:
                _ = self._drop_unreferenced(end)
            self.drop_private(branch.root)
        for node in upward(branch.leaf):
            node.used = now
        self.tree.forget_root(branch.leaf)

    def copy_ended(self, node: Node) -> None:
        """No copy of the node is in flight any more: if it was disowned meanwhile it goes, as far as nobody has come
        to refer to it since."""
        if node.disowned:
            node.disowned = False
            self._disown_from(node)

    def _disown_from(self, tip: Node) -> None:
        """Drops a node and those above it as far as no branch has rows there or below. What only the cache holds below
        them was computed from theirs, and would keep them to be found: it goes too. A copy is waited for."""
        top: Node | None = None
        for node in upward(tip):
            beside = [child for child in (*node.children.values(), *node.stubs.values()) if child is not top]
            if node.held or any(below.held for child in beside for below in subtree(child)):
                break
            top = node
        if top is None:
            return
        for node in reversed(list(subtree(top))):
            waits = self._drop_unreferenced(node)
            if waits is not None:
                waits.disowned = True

    def _drop_unreferenced(self, tip: Node) -> Node | None:
        """Drops a node that nobody refers to or pins, and those above it that only it referred to. Returns the first
        that must stay because it is being copied: it is dropped when room is needed, a private one and one that is
        disowned when that ends."""
        node = tip
        while node.parent is not None and not node.referenced and not node.pinned_by and node.id in self.tree.nodes:
            if not isinstance(node.state, Device | Both | Host):
                return node
            node = self.drop(node)
        return None

    def drop_private(self, key: RootKey) -> None:
        """With the last branch of a private root all its rows end, also those a branch went back from; what is being
        copied ends with its copy."""
        root = self.tree.roots.get(key)
        if root is None or session_of(key) in self.private:
            return
        for node in reversed(list(subtree(root))):
            if not node.referenced and isinstance(node.state, Device | Both | Host):
                _ = self.drop(node)

    # ---- room -----------------------------------------------------------------------------------------------------
    def seed_page(self, branch: Branch) -> PageId | None:
        """The device page that holds the seed's rows; None when there is none to read, or when the rest of the seed's
        segment is on the host: an entry pins all of it, and what is pinned may not be waiting for a copy."""
        node = branch.seed
        while node is not None and node.start > branch.leaf.end:
            if not node.readable:
                return None
            node = node.parent  # the segment was split since: its first page belongs to an upper half now
        if node is None or not node.readable or not node.pages:
            return None
        return node.pages[(branch.leaf.end - node.start) // self.page_tokens]

    def sole_stub(self, branch: Branch) -> bool:
        """The seed is a stub that nobody else refers to: its page can become the tail without a copy."""
        node = branch.seed
        return (
            node is not None
            and self.tree.is_stub(node)
            and isinstance(node.state, Device)
            and node.pinned_by <= {branch.id}
            and not node.leaf_of
            and node.seed_of == {branch.id}
        )

    def pin(self, branch: Branch) -> None:
        """Holds every node of the path, and the seed's, so that nothing a step reads can move."""
        for node in upward(branch.leaf):
            node.pinned_by.add(branch.id)
        node_or_none = branch.seed
        while node_or_none is not None and node_or_none.start >= branch.leaf.end and node_or_none is not branch.leaf:
            node_or_none.pinned_by.add(branch.id)
            node_or_none = node_or_none.parent

    def unpin(self, branch: Branch) -> None:
        """The inverse of `pin`."""
        self.unpin_seed(branch)
        for node in upward(branch.leaf):
            node.pinned_by.discard(branch.id)
        self.tree.reshaped.discard(branch.id)

    def unpin_seed(self, branch: Branch) -> None:
        """Releases the seed's nodes alone: its rows are copied, or the branch needs them no more."""
        node = branch.seed
        while node is not None and node is not branch.leaf and node.start >= branch.leaf.end:
            node.pinned_by.discard(branch.id)
            node = node.parent

    def enter(self, branch: Branch, pages: int) -> Room:
        """Room for a branch whose path is pinned: `pages` fresh pages, and the seed's rows taken or to be copied."""
        start = branch.leaf.end
        rows = branch.seed_rows
        copy = None
        if rows and self.sole_stub(branch) is False:
            source = self.seed_page(branch)
            if source is None:
                raise BrokenInvariant(f"branch {branch.id} entered with a seed that is not on the device")
            tail = list(self.pages.take(pages))
            copy = PageCopy(source, tail[0], rows)
        elif rows:
            tail = [*self._take_stub(branch), *self.pages.take(pages)]
        else:
            tail = list(self.pages.take(pages))
        room = Room(
            tenant=tenant_of(branch.root),
            path=self.tree.path(branch.leaf),
            tail_start=start,
            tail=tail,
            issued=start + rows,
            done=start + rows,
            copy=copy,
        )
        self.tree.reshaped.discard(branch.id)
        self.tree.count(room.tenant, len(tail))
        self.rooms[branch.id] = room
        return room

    def _take_stub(self, branch: Branch) -> tuple[PageId, ...]:
        stub = branch.seed
        if stub is None or not isinstance(stub.state, Device):
            raise BrokenInvariant(f"branch {branch.id} has no stub to take")
        self.unpin_seed(branch)
        stub.seed_of.discard(branch.id)
        branch.seed, branch.seed_rows = None, 0
        _ = self.tree.detach(stub)
        return stub.state.drop().pages

    def copied(self, branch: Branch, room: Room) -> None:
        """The step that copied the seed was acknowledged: the rows are the branch's own now."""
        room.copy = None
        self.unpin_seed(branch)
        self.settle_on(branch, branch.leaf, None, 0)

    def grow(self, room: Room, pages: int) -> None:
        """Adds `pages` fresh pages to the tail; the caller has made them free. Raises `BrokenInvariant`."""
        room.tail.extend(self.pages.take(pages))
        self.tree.count(room.tenant, pages)

    def seal(self, branch: Branch, room: Room, now: float) -> None:
        """Full pages that are done become a segment others can share; the branch stays active on it."""
        full = (room.done - room.tail_start) // self.page_tokens
        if full == 0 or room.copy is not None:
            return
        ids = branch.log.packed(room.tail_start, room.tail_start + full * self.page_tokens)
        if self.tree.match(branch.leaf, ids).node is not branch.leaf:
            return  # someone else published the same rows first; ours stay in the tail until we leave
        sealed = tuple(room.tail[:full])
        node = self.tree.attach(branch.leaf, ids, Device(sealed), now)
        node.pinned_by.add(branch.id)
        self.settle_on(branch, node, None, 0)
        del room.tail[:full]
        self.tree.count(room.tenant, -full)
        room.tail_start += full * self.page_tokens
        self.tree.merge_above(node)
        self._read_path(branch, room)

    def freeze(self, branch: Branch, room: Room, now: float) -> None:
        """Room goes back: full pages of the tail become a segment, the rest a stub that is the branch's seed."""
        self._leave_room(branch, room, now)
        if room.copy is not None:  # the first step never came: the seed still holds the rows
            self.pages.give(room.tail)
            return
        if room.done >= branch.computed:
            branch.computed, branch.lost_why = room.done, ""
        full = (room.done - room.tail_start) // self.page_tokens
        rows = (room.done - room.tail_start) % self.page_tokens
        leaf, kept = branch.leaf, 0
        if full:
            ids = branch.log.packed(room.tail_start, room.tail_start + full * self.page_tokens)
            leaf, kept = self._published(branch, room, ids)
            if kept < full and leaf.readable:
                rest = ids[kept * self.page_tokens * 4 :]
                leaf = self.tree.attach(leaf, rest, Device(tuple(room.tail[kept:full])), now)
                kept = full
        seed = None
        if rows and kept == full and leaf.readable:
            stub_start = room.tail_start + full * self.page_tokens
            ids = branch.log.packed(stub_start, stub_start + rows)
            seed = self.tree.attach(leaf, ids, Device((room.tail[full],)), now)
            self.pages.give(room.tail[full + 1 :])
        else:
            self.pages.give(room.tail[kept:])
            if rows or kept < full:
                branch.lost_why = "its last rows could not be kept: the same ones before them are on the host"
        self.settle_on(branch, leaf, seed, rows)
        for node in upward(leaf):
            if node.used >= now:
                break
            node.used = now
        self.tree.merge_above(leaf)

    def _leave_room(self, branch: Branch, room: Room, now: float) -> None:
        del self.rooms[branch.id]
        branch.epoch += 1
        branch.rested_at = now
        self.tree.count(room.tenant, -len(room.tail))
        self.unpin(branch)

    def disown(self, branch: Branch, room: Room, now: float, why: str) -> None:
        """As `freeze`, where nobody shall find the rows: the whole tail is free again, and the branch gives up all
        rows of its path. Those that nothing else leads to go, what is being copied when its copy ends. What others
        refer to or run on stays. `why` is told."""
        self._leave_room(branch, room, now)
        self.pages.give(room.tail)
        branch.computed = max(branch.computed, room.done)
        root = branch.leaf
        while root.parent is not None:
            root = root.parent
        self.settle_on(branch, root, None, 0)
        self._rows_lost([branch], why)
        ids = branch.log.packed(0, branch.known)
        found: Node | None = None
        while found is None or (found is not root and found.id not in self.tree.nodes):  # it went: what is found now?
            match = self.tree.match(root, ids)
            found = match.node
            if match.seed is not None:  # it may have copied these rows, and refers to them no more
                self._disown_from(match.seed)
            self._disown_from(found)

    def _published(self, branch: Branch, room: Room, ids: bytes) -> tuple[Node, int]:
        """How far others have published the same full pages. Rows they have on the host alone come back to the
        device with ours; elsewhere ours are free again. Returns the node and the pages it covers."""
        leaf = self.tree.match(branch.leaf, ids).node
        chain: list[Node] = []
        node = leaf
        while node is not branch.leaf and node.parent is not None:
            chain.append(node)
            node = node.parent
        kept = 0
        for node in reversed(chain):
            pages = tuple(room.tail[kept : kept + node.tokens // self.page_tokens])
            kept += len(pages)
            if isinstance(node.state, Host) and node.parent is not None and node.parent.readable:
                self.tree.change(node, node.state.load(pages, TicketId(0)).acked())
            else:
                self.pages.give(pages)
        return leaf, kept

    # ---- eviction -------------------------------------------------------------------------------------------------
    def drop(self, node: Node, why: str = "") -> Node:
        """A node that nobody pins and with none below goes; holders at rest move to its parent and have lost rows,
        `why` says what for. Returns the parent."""
        if node.parent is None or not isinstance(node.state, Device | Both | Host):
            raise BrokenInvariant(f"{node!r} cannot be dropped")
        _ = self.orphan(node, why)
        parent = self.tree.detach(node)
        gone = node.state.drop()
        self.pages.give(gone.pages)
        self.slots.give(gone.slots)
        return parent

    def drop_with_all_below(self, node: Node, why: str = "") -> Node:
        """`drop`, after everything that hangs below it (which is on the host alone)."""
        parent = node
        for below in reversed(list(subtree(node))):
            parent = self.drop(below, why)
        return parent

    def shrink(self, node: Node, pages: int, why: str) -> None:
        """The last pages of a tip are free again; its holders stay and have less."""
        self.pages.give(self.tree.shrink(node, pages))
        self._rows_lost(self.holders(node), why)

    def give_up_seed(self, branch: Branch, why: str) -> None:
        """The branch gives up the rows of its seed, less than a page, and computes them again. `why` is told."""
        self.settle_on(branch, branch.leaf, None, 0)
        self._rows_lost([branch], why)

    def _rows_lost(self, branches: list[Branch], why: str) -> None:
        for branch in branches:
            branch.lost_why = why
            self.moved.add(branch.id)

    def evict(self, node: Node) -> None:
        """The device copy of a clean node goes, at once."""
        if not isinstance(node.state, Both) or node.pinned_by or node.pages_below:
            raise BrokenInvariant(f"{node!r} cannot be evicted")
        host, pages = node.state.evict()
        self.tree.change(node, host)
        self.pages.give(pages)

    def forget(self, node: Node) -> None:
        """The host copy of a clean node goes."""
        if not isinstance(node.state, Both):
            raise BrokenInvariant(f"{node!r} has no host copy to forget")
        device, slots = node.state.forget()
        self.tree.change(node, device)
        self.slots.give(slots)

    def on_device(self, branch: Branch) -> int:
        """Rows of a branch at rest that a step could read now."""
        rows = branch.seed_rows if branch.seed is not None and branch.seed.readable else 0
        return self.readable_end(branch) + (rows if branch.leaf.readable else 0)

    def readable_end(self, branch: Branch) -> int:
        """Where the readable part of its path ends."""
        end = branch.leaf.end
        for node in upward(branch.leaf):
            if not node.readable:
                end = node.start
        return end

    def unreadable(self, branch: Branch) -> list[Node]:
        """The nodes of its path that no step may read yet, root first."""
        chain = [node for node in upward(branch.leaf) if not node.readable]
        chain.reverse()
        return chain

    def orphan(self, node: Node, why: str = "") -> list[Branch]:
        """Takes a tip's holders off it. Returns them."""
        holders = self.holders(node)
        for holder in holders:
            if holder.seed is node:
                self.settle_on(holder, holder.leaf, None, 0)
            if holder.leaf is node and node.parent is not None:
                self.settle_on(holder, node.parent, None, 0)
        self._rows_lost(holders, why)
        return holders

    def holders(self, node: Node) -> list[Branch]:
        """The branches whose leaf or seed `node` is."""
        return [self.branches[number] for number in sorted(node.leaf_of | node.seed_of)]

    def taken_moves(self) -> set[BranchId]:
        """The branches whose rows may be elsewhere than when this was last asked, each once."""
        moved, self.moved = self.moved, set()
        tops, self.tree.moved = self.tree.moved, {}
        seen: set[NodeId] = set()
        for top in tops.values():
            waiting = [top]
            while waiting:
                node = waiting.pop()
                if node.id in seen:
                    continue
                seen.add(node.id)
                moved |= node.leaf_of
                moved |= node.seed_of
                waiting += node.children.values()
                waiting += node.stubs.values()
        return moved

    # ---- the border to active branches ----------------------------------------------------------------------------
    def is_stale(self, branch: BranchId, room: Room) -> bool:
        """Whether the nodes of the path are others than `room.path` says."""
        return room.stale or branch in self.tree.reshaped

    def refresh(self, branch: Branch, room: Room) -> None:
        """Reads the path anew if it was split, merged or loaded: due before a step reads it."""
        if self.is_stale(branch.id, room):
            self._read_path(branch, room)

    def _read_path(self, branch: Branch, room: Room) -> None:
        room.path, room.stale = self.tree.path(branch.leaf), False
        self.tree.reshaped.discard(branch.id)

    def capacity(self, room: Room) -> int:
        """Position up to which rows fit into the tail."""
        return room.tail_start + len(room.tail) * self.page_tokens

    def pages_to(self, room: Room, position: int) -> int:
        """Fresh pages needed before rows up to `position` can be written."""
        return max(0, pages_for(position - room.tail_start, self.page_tokens) - len(room.tail))

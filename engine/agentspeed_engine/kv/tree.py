"""The tree of computed rows: the only index there is. Lookup walks it and compares ids.

A node is a segment (full pages) or a stub (less than one page, never a parent). Every node but a root has a state
(`nodes`), which owns its pages. Who refers to a node stands on the node: branches whose leaf or seed it is, active
branches that pin it, and its children. A node that nobody refers to is cached: kept, first victim.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypeAlias, final

from agentspeed_engine.errors import BrokenInvariant
from agentspeed_engine.ids import BranchId, NodeId, PageId, SessionId, TicketId, pages_for
from agentspeed_engine.kv.node_states import Both, Device, Host, Loading, NodeState, Saving
from agentspeed_engine.kv.views import NodeRun

RootKey: TypeAlias = tuple[str, str, str]
"""(model, adapter, tenant salt): rows are never shared across different ones. The salt is the tenant's name, NUL, and
for a private session its number; a name has no NUL (`sched.commands`)."""

ID_BYTES = 4
_SEED_SEARCH = 64
"""Children looked at for a partly matching page; a lookup must not grow with the number of sessions."""


@final
class Node:
    """One segment or stub. Mutated by `Tree` alone."""

    __slots__ = (
        "children",
        "disowned",
        "failures",
        "id",
        "ids",
        "leaf_of",
        "owns_pages",
        "pages_below",
        "parent",
        "pinned_by",
        "root",
        "run",
        "seed_of",
        "start",
        "state",
        "stubs",
        "used",
    )

    def __init__(
        self, node_id: NodeId, root: RootKey, parent: Node | None, start: int, ids: bytes, state: NodeState | None
    ) -> None:
        self.id = node_id
        self.root = root
        self.parent = parent
        self.start = start
        self.ids = ids
        self.state = state
        """None for a root, which has no rows."""
        self.children: dict[bytes, Node] = {}
        """Segments below, by the ids of their first page."""
        self.stubs: dict[NodeId, Node] = {}
        self.leaf_of: set[BranchId] = set()
        self.seed_of: set[BranchId] = set()
        self.pinned_by: set[BranchId] = set()
        self.run: NodeRun | None = None
        self.used = 0.0
        """When a branch last computed on it."""
        self.pages_below = 0
        """Nodes right below that own device pages: while there are any, this one keeps its own (2)."""
        self.owns_pages = state is not None and not isinstance(state, Host)
        self.failures = 0
        """Host copies of it that failed: a second failed load loses it, a failed save is not tried again."""
        self.disowned = False
        """It is being copied, and its rows are not to be kept: it goes when the copy ends, unless it is referred to."""

    @property
    def tokens(self) -> int:
        return len(self.ids) // ID_BYTES

    @property
    def end(self) -> int:
        return self.start + len(self.ids) // ID_BYTES

    @property
    def readable(self) -> bool:
        """A step may read it."""
        return self.state is None or isinstance(self.state, Device | Saving | Both)

    @property
    def referenced(self) -> bool:
        return bool(self.leaf_of or self.seed_of or self.children or self.stubs)

    @property
    def held(self) -> bool:
        """A branch itself refers to it or runs on it."""
        return bool(self.leaf_of or self.seed_of or self.pinned_by)

    @property
    def pages(self) -> tuple[PageId, ...]:
        """Device pages; none for a root and for rows on the host."""
        match self.state:
            case Device() | Saving() | Both() | Loading() as state:
                return state.pages
            case _:
                return ()

    def __repr__(self) -> str:
        return f"<Node {self.id} [{self.start}, {self.end}) {type(self.state).__name__}>"


class Match(NamedTuple):
    """The longest known prefix of some ids: whole pages up to `node`.end, then `rows` rows of `seed`'s first page."""

    node: Node
    seed: Node | None
    rows: int


@final
class Tree:
    """All nodes of one engine, one root per key, and what is listed of them.

    `KvCache` attaches and removes nodes; the scheduler splits them and files the states of copies (`sched.reclaim`,
    `sched.tickets`). Lookup (`match`) compares ids and takes time in the length of what matches, not
    in the number of sessions; it may split a segment that matches in part, which changes no holder.

    - `attach` adds a node whose rows were computed; `detach` removes one that nobody refers to or pins. Both raise
      `BrokenInvariant` when the shape would not be a tree of distinct prefixes.
    - `split` gives the first pages of a node to a new parent above it; the node keeps its identity and all holders.
      `merge_above` is the inverse, for nodes that only one child refers to. Neither moves a row, so both are safe under
      a pin; the branches that pin the node are collected in `reshaped`, and their paths are read anew.
    - `change` files the state that a verb of `nodes` returned, and keeps all lists: every transition passes there.
    - `tips`, `tips_of`, `host_tips` and `in_copy` are kept, never searched for: they are what eviction chooses from.
    """

    def __init__(self, page_tokens: int) -> None:
        self.page_tokens = page_tokens
        self.roots: dict[RootKey, Node] = {}
        self.nodes: dict[NodeId, Node] = {}
        """Every node with rows."""
        self.tips: dict[NodeId, Node] = {}
        """Nodes with device pages and none with pages below: the only ones whose pages may go. Insertion ordered, so
        that runs repeat."""
        self.tips_of: dict[str, dict[NodeId, Node]] = {}
        """`tips` by tenant; no tenant without any."""
        self.host_tips: dict[NodeId, Node] = {}
        """Nodes on the host alone with no node below: the only ones whose slots may go."""
        self.in_copy: dict[TicketId, list[Node]] = {}
        """The nodes that wait for a ticket, those above first."""
        self.owned: dict[str, int] = {}
        """Device pages by tenant: of its nodes, cached ones included, and in its tails (`KvCache` counts those)."""
        self.moved: dict[NodeId, Node] = {}
        """Nodes that came to the device or left it since `KvCache.taken_moves` was last called."""
        self.reshaped: set[BranchId] = set()
        """Pinning branches of which a node was split or merged since `KvCache` last read their paths."""
        self._next = 0
        self._page_bytes = page_tokens * ID_BYTES

    # ---- lookup ---------------------------------------------------------------------------------------------------
    def root(self, key: RootKey) -> Node:
        """The root of a key; made when it is first asked for. `forget_root` takes it away again."""
        node = self.roots.get(key)
        if node is None:
            node = self.roots[key] = Node(self._fresh_id(), key, None, 0, b"", None)
        return node

    def match(self, start: Node, packed: bytes) -> Match:
        """The longest match of `packed` ids below `start`, splitting a segment that matches in part."""
        node, offset, size = start, 0, self._page_bytes
        while True:
            child = node.children.get(packed[offset : offset + size])
            if child is None:
                break
            pages = self._common_pages(child.ids, packed, offset)
            if pages * size < len(child.ids):
                node = self.split(child, pages)
                offset += pages * size
                break
            node = child
            offset += len(child.ids)
        seed, rows = self._partial(node, packed[offset : offset + size])
        return Match(node, seed, rows)

    def _common_pages(self, ids: bytes, packed: bytes, offset: int) -> int:
        length = min(len(ids), len(packed) - offset) // self._page_bytes
        low, high = 1, length
        if ids[: high * self._page_bytes] == packed[offset : offset + high * self._page_bytes]:
            return high
        while low < high:  # the largest number of whole pages that agree
            middle = (low + high + 1) // 2
            if ids[: middle * self._page_bytes] == packed[offset : offset + middle * self._page_bytes]:
                low = middle
            else:
                high = middle - 1
        return low

    def _partial(self, node: Node, wanted: bytes) -> tuple[Node | None, int]:
        """The node below with most rows of its first page in common with `wanted`."""
        best, best_rows = None, 0
        for count, child in enumerate(_below(node)):
            if count == _SEED_SEARCH:
                break
            rows = _common_ids(child.ids, wanted)
            if rows > best_rows and child.readable:
                best, best_rows = child, rows
        return best, best_rows

    def path(self, leaf: Node) -> tuple[NodeRun, ...]:
        """What a step reads of a leaf's path, root first."""
        runs: list[NodeRun] = []
        for node in upward(leaf):
            if node.run is None:
                node.run = NodeRun(node.id, node.start, node.tokens, node.pages)
            runs.append(node.run)
        runs.reverse()
        return tuple(runs)

    # ---- shape ----------------------------------------------------------------------------------------------------
    def attach(self, parent: Node, ids: bytes, state: NodeState, now: float) -> Node:
        """A new node below `parent`. An equal segment may not be there yet; stubs may repeat."""
        node = Node(self._fresh_id(), parent.root, parent, parent.end, ids, state)
        node.used = now
        self._link(parent, node)
        self.nodes[node.id] = node
        self.count(tenant_of(node.root), len(node.pages))
        self._list(node)
        return node

    def count(self, tenant: str, pages: int) -> None:
        """Pages more (or less) that a tenant owns. One without any is forgotten."""
        owned = self.owned.get(tenant, 0) + pages
        if owned:
            self.owned[tenant] = owned
        else:
            _ = self.owned.pop(tenant, None)

    def change(self, node: Node, state: NodeState) -> None:
        """Files a node under the state that a verb returned. Every transition of a node passes here."""
        had, readable = node.owns_pages, node.readable
        node.state = state
        node.run = None
        if node.readable != readable:
            self.moved[node.id] = node
        if node.parent is not None and had != bool(node.pages):
            pages = pages_for(node.tokens, self.page_tokens)
            self.count(tenant_of(node.root), pages if node.pages else -pages)
            node.parent.pages_below += 1 if node.pages else -1
            self._list(node.parent)
        node.owns_pages = bool(node.pages)
        self._list(node)

    def child(self, parent: Node, ids: bytes) -> Node | None:
        """The segment below `parent` that starts with the first page of `ids`."""
        return parent.children.get(ids[: self._page_bytes])

    def split(self, node: Node, upper_pages: int) -> Node:
        """A new node takes the first pages; `node` keeps its identity, its holders and the rest. Returns the new."""
        if node.parent is None or not isinstance(node.state, Device | Saving | Both | Host | Loading):
            raise BrokenInvariant("a root has no rows to split")
        cut = upper_pages * self._page_bytes
        if not 0 < cut < len(node.ids):
            raise BrokenInvariant(f"{node!r} cannot be split after {upper_pages} pages")
        parent = node.parent
        self._unlink(parent, node)
        above, below = node.state.split(upper_pages)
        upper = Node(self._fresh_id(), node.root, parent, node.start, node.ids[:cut], above)
        upper.used = node.used
        upper.pinned_by = set(node.pinned_by)
        self._link(parent, upper)
        node.state, node.ids, node.start, node.parent, node.run = below, node.ids[cut:], upper.end, upper, None
        upper.children[node.ids[: self._page_bytes]] = node
        upper.pages_below = 1 if node.owns_pages else 0
        upper.failures, upper.disowned = node.failures, node.disowned
        self.nodes[upper.id] = upper
        if node.id in self.moved:
            self.moved[upper.id] = upper
        self._list(upper)
        self._list(node)
        if isinstance(above, Saving | Loading):
            waiting = self.in_copy[above.ticket]
            waiting.insert(waiting.index(node), upper)
        self.reshaped |= node.pinned_by
        return upper

    def merge_above(self, leaf: Node) -> None:
        """Joins nodes of the path with their parents while a parent's only reference is that one child and both are
        in the same place."""
        node = leaf
        while node.parent is not None and node.parent.parent is not None:
            if not self._merged(node, node.parent, node.parent.parent):
                node = node.parent

    def _merged(self, node: Node, parent: Node, above: Node) -> bool:
        if len(parent.children) != 1 or parent.stubs or parent.leaf_of or parent.seed_of:
            return False
        if parent.pinned_by != node.pinned_by or self.is_stub(node):
            return False
        upper, lower = parent.state, node.state
        self._unlink(above, parent)
        match upper, lower:
            case Device(), Device():
                node.state = upper.joined(lower)
            case Both(), Both():
                node.state = upper.joined(lower)
            case _:
                self._link(above, parent)
                return False
        node.ids, node.start, node.parent, node.run = parent.ids + node.ids, parent.start, above, None
        self._link(above, node)
        del self.nodes[parent.id]
        if self.moved.pop(parent.id, None) is not None:
            self.moved[node.id] = node
        self.reshaped |= node.pinned_by
        return True

    def shrink(self, node: Node, pages: int) -> tuple[PageId, ...]:
        """Takes the last pages off a tip that nobody pins; its holders stay and have less."""
        if node.pinned_by or node.children or node.stubs or not isinstance(node.state, Device):
            raise BrokenInvariant(f"{node!r} cannot shrink")
        node.state, freed = node.state.shrink(pages)
        node.ids = node.ids[: -pages * self._page_bytes]
        node.run = None
        self.count(tenant_of(node.root), -pages)
        return freed

    def detach(self, node: Node) -> Node:
        """Removes a tip that nobody pins and whose leaf and seed holders have moved on. Returns its parent."""
        if node.pinned_by or node.referenced or node.parent is None:
            raise BrokenInvariant(f"{node!r} is still referred to")
        parent = node.parent
        self._unlink(parent, node)
        del self.nodes[node.id]
        self._is_tip(node, False)
        _ = self.host_tips.pop(node.id, None)
        _ = self.moved.pop(node.id, None)
        node.parent = None
        self.count(tenant_of(node.root), -len(node.pages))
        self.forget_root(parent)
        return parent

    def forget_root(self, node: Node) -> None:
        """A root that nobody refers to goes: tenants and private sessions come and go without end."""
        if node.parent is None and not node.referenced and self.roots.get(node.root) is node:
            del self.roots[node.root]

    def is_stub(self, node: Node) -> bool:
        return len(node.ids) < self._page_bytes and node.parent is not None

    def _link(self, parent: Node, node: Node) -> None:
        if len(node.ids) < self._page_bytes:
            parent.stubs[node.id] = node
        else:
            key = node.ids[: self._page_bytes]
            if key in parent.children:
                raise BrokenInvariant(f"two segments below {parent!r} start with the same page")
            parent.children[key] = node
        parent.pages_below += node.owns_pages
        self._list(parent)

    def _unlink(self, parent: Node, node: Node) -> None:
        if len(node.ids) < self._page_bytes:
            del parent.stubs[node.id]
        else:
            del parent.children[node.ids[: self._page_bytes]]
        parent.pages_below -= node.owns_pages
        self._list(parent)

    def _list(self, node: Node) -> None:
        """Keeps `tips`, `tips_of` and `host_tips`."""
        if node.parent is None or node.id not in self.nodes:
            return
        self._is_tip(node, node.owns_pages and not node.pages_below)
        if node.owns_pages or node.children or node.stubs:
            _ = self.host_tips.pop(node.id, None)
        else:
            self.host_tips[node.id] = node

    def _is_tip(self, node: Node, tip: bool) -> None:
        if tip == (node.id in self.tips):
            return
        tenant = tenant_of(node.root)
        if tip:
            self.tips[node.id] = self.tips_of.setdefault(tenant, {})[node.id] = node
            return
        of_tenant = self.tips_of[tenant]
        del self.tips[node.id], of_tenant[node.id]
        if not of_tenant:
            del self.tips_of[tenant]

    def _fresh_id(self) -> NodeId:
        self._next += 1
        return NodeId(self._next)


def upward(leaf: Node) -> Iterator[Node]:
    """The nodes with rows from `leaf` to the root."""
    node = leaf
    while node.parent is not None:
        above = node.parent  # read before the caller may detach the node
        yield node
        node = above


def subtree(top: Node) -> Iterator[Node]:
    """`top` and all below it, those above first; reversed, a list of it takes every node after what hangs below it.
    Every rewind may make the tree one node deeper, so nothing that walks it may recurse."""
    waiting = [top]
    while waiting:
        node = waiting.pop()
        yield node
        waiting += _below(node)


def tenant_of(key: RootKey) -> str:
    """The tenant whose rows hang below a root."""
    return key[2].partition("\0")[0]


def session_of(key: RootKey) -> SessionId | None:
    """The private session that alone has rows below a root; None for a root that a tenant's sessions share."""
    number = key[2].partition("\0")[2]
    return SessionId(int(number)) if number else None


def _below(node: Node) -> Iterator[Node]:
    yield from node.stubs.values()
    yield from node.children.values()


def _common_ids(left: bytes, right: bytes) -> int:
    length = min(len(left), len(right)) // ID_BYTES
    if left[: length * ID_BYTES] == right[: length * ID_BYTES]:
        return length
    low, high = 0, length - 1
    while low < high:
        middle = (low + high + 1) // 2
        if left[: middle * ID_BYTES] == right[: middle * ID_BYTES]:
            low = middle
        else:
            high = middle - 1
    return low
